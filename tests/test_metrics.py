"""Metrics against their definitions, their identities and what is known of their statistics."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import Moments, metrics, significance


def moments_of(gradients, sign_counts=False):
    return Moments.of(gradients, np.zeros(len(gradients[0])), sign_counts=sign_counts).numpy()


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return [rng.normal(0.3, 1.0, size=[50, 4, 3]), rng.normal(-0.5, 2.0, size=[50, 3])]


@pytest.fixture
def model():
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])


def test_gsnr_is_squared_mean_over_variance(gradients):
    m = moments_of(gradients)
    for ratio, corrected, g in zip(
        tf_gsnr.gsnr(m, bias_corrected=False), tf_gsnr.gsnr(m), gradients
    ):
        np.testing.assert_allclose(ratio, g.mean(0) ** 2 / g.var(0))
        s2 = g.var(0, ddof=1)
        np.testing.assert_allclose(corrected, (g.mean(0) ** 2 - s2 / 50) / s2, atol=1e-12)


def test_corrected_gsnr_is_unbiased_where_there_is_no_signal():
    rng = np.random.default_rng(1)
    noise = [rng.normal(size=[32, 50_000]).astype(np.float32)]
    m = moments_of(noise)
    assert np.mean(tf_gsnr.gsnr(m, bias_corrected=False)[0]) == pytest.approx(1 / 32, rel=0.15)
    # E[(mean^2 - s2/n) / s2] = (n-1)/(n-3)/n - 1/n for normal gradients: 2e-3 of a bias of 3e-2
    assert abs(np.mean(tf_gsnr.gsnr(m)[0])) < 3e-3
    large = moments_of([rng.normal(size=[1000, 20_000])])
    assert abs(np.mean(tf_gsnr.gsnr(large)[0])) < 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_the_loss_leaves_gsnr_alone(gradients, scale):
    plain = moments_of([g.astype(np.float32) for g in gradients])
    scaled = moments_of([(g * scale).astype(np.float32) for g in gradients])
    for a, b in zip(tf_gsnr.gsnr(plain), tf_gsnr.gsnr(scaled)):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert tf_gsnr.noise_scale(scaled) == pytest.approx(tf_gsnr.noise_scale(plain), rel=1e-5)


def test_dead_parameters_are_left_out_and_counted(gradients, model):
    gradients[0][:, 0, :] = 0.0
    m = moments_of(gradients, sign_counts=True)
    assert np.isnan(tf_gsnr.gsnr(m)[0][0]).all()
    assert np.isnan(tf_gsnr.same_sign(m)[0][0]).all()
    summary = tf_gsnr.summarize(m, model)
    assert summary["dead"] == 3 and summary["parameters"] == 15
    for name, corrected in (("gsnr", True), ("gsnr_plain", False)):
        ratios = tf_gsnr.gsnr(m, corrected)
        alive = np.concatenate([ratios[0][1:].ravel(), ratios[1]])
        assert summary[f"{name}/mean"] == pytest.approx(alive.mean())
        assert summary[f"{name}/median"] == pytest.approx(np.median(alive))
        assert summary[f"{name}/p95"] == pytest.approx(np.percentile(alive, 95))
    for name, corrected in (("same_sign", True), ("same_sign_plain", False)):
        shares = tf_gsnr.same_sign(m, corrected)
        alive = np.concatenate([shares[0][1:].ravel(), shares[1]])
        assert summary[f"{name}/mean"] == pytest.approx(alive.mean())
    assert summary["osgr_predicted"] == tf_gsnr.osgr(m, 50)
    assert summary["osgr_predicted_plain"] == tf_gsnr.osgr_predicted(m)
    assert summary["noise_scale_plain"] == tf_gsnr.noise_scale(m, bias_corrected=False)
    assert sum(v for k, v in summary.items() if k.startswith("gap_share/")) == pytest.approx(1)
    kernel, bias = (f"gsnr/{v.path}" for v in model.trainable_variables)
    assert summary[kernel] == pytest.approx(np.nanmean(tf_gsnr.gsnr(m)[0]))
    assert summary[bias] == pytest.approx(np.mean(tf_gsnr.gsnr(m)[1]))


def test_all_dead(model):
    summary = tf_gsnr.summarize(moments_of([np.zeros([9, 4, 3]), np.zeros([9, 3])]), model)
    assert summary["dead"] == 15
    for name in ("gsnr/mean", "gsnr/median", "noise_scale", "osgr_predicted", "gsnr_plain/mean"):
        assert np.isnan(summary[name]), name
    assert not np.isinf(list(summary.values())).any()


def test_what_was_not_measured_is_left_out(gradients, model):
    """Its moments are NaN: all other numbers are those of the rest."""
    m = moments_of(gradients, sign_counts=True)
    nothing = np.full([3], np.nan)
    part = m._replace(mean=[m.mean[0], nothing], m2=[m.m2[0], nothing])
    part = part._replace(positives=[m.positives[0], np.zeros([3], int)])
    part = part._replace(negatives=[m.negatives[0], np.zeros([3], int)])
    rest = m._replace(**{k: getattr(m, k)[:1] for k in ("mean", "m2", "positives", "negatives")})
    found = tf_gsnr.summarize(part, model)
    kernel = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, use_bias=False)])
    kernel.layers[0].kernel._path = model.trainable_variables[0].path
    for name, value in tf_gsnr.summarize(rest, kernel).items():
        assert found[name] == pytest.approx(value, nan_ok=True) or name == "parameters", name
    assert np.isnan(found[f"gsnr/{model.trainable_variables[1].path}"])


def test_same_sign(gradients):
    m = moments_of(gradients, sign_counts=True)
    positive = gradients[1] > 0
    share = positive.mean(0)
    plain = tf_gsnr.same_sign(m, bias_corrected=False)[1]
    np.testing.assert_allclose(plain, np.maximum(share, 1 - share))
    pairs = [(i, j) for i in range(50) for j in range(i)]
    agree = np.mean([positive[i] == positive[j] for i, j in pairs], axis=0)
    np.testing.assert_allclose(tf_gsnr.same_sign(m)[1], agree)


@pytest.mark.parametrize("n", [2, 4, 32])
def test_signs_of_a_coin_agree_half_of_the_time(n):
    rng = np.random.default_rng(5)
    m = moments_of([rng.normal(size=[n, 40_000])], sign_counts=True)
    assert np.mean(tf_gsnr.same_sign(m)[0]) == pytest.approx(0.5, abs=0.01)
    chance = {2: 0.75, 4: 0.6875, 32: 0.57}[n]
    plain = tf_gsnr.same_sign(m, bias_corrected=False)[0]
    assert np.mean(plain) == pytest.approx(chance, abs=0.01)
    m = moments_of([rng.normal(0.5244, 1, size=[n, 40_000])], sign_counts=True)  # 70 % positive
    assert np.mean(tf_gsnr.same_sign(m)[0]) == pytest.approx(0.7**2 + 0.3**2, abs=0.01)


def test_noise_scale_osgr_and_diversity(gradients):
    m = moments_of(gradients)
    flat = np.concatenate([g.reshape(50, -1) for g in gradients], 1)
    square, trace = (flat.mean(0) ** 2).sum(), flat.var(0, ddof=1).sum()
    plain = tf_gsnr.noise_scale(m, bias_corrected=False)
    assert plain == pytest.approx(flat.var(0).sum() / square)
    signal = square - trace / 50
    assert tf_gsnr.noise_scale(m) == pytest.approx(trace / signal)
    assert tf_gsnr.osgr(m, 200) == pytest.approx(signal / (signal + trace / 200))
    assert tf_gsnr.osgr(m) == pytest.approx(1 - trace / 50 / square)
    plain = tf_gsnr.osgr(m, 200, bias_corrected=False)
    assert plain == pytest.approx(square / (square + flat.var(0).sum() / 200))
    diversity = (flat**2).sum() / (flat.sum(0) ** 2).sum()
    assert tf_gsnr.gradient_diversity(m) == pytest.approx(diversity)


def test_without_signal_there_is_no_ratio():
    m = moments_of([np.array([[1.0], [-1.0]])])
    for corrected in (True, False):
        assert np.isnan(tf_gsnr.noise_scale(m, corrected))
    assert np.isnan([tf_gsnr.osgr(m), tf_gsnr.osgr(m, 10, bias_corrected=False)]).all()
    assert np.isnan(tf_gsnr.gradient_diversity(m))


def draws(rng, n, directions, correlated, shift=0.0, parameters=40):
    """Gradients `[n, parameters]` that vary in so many directions, of a total variance of 1."""
    g = rng.normal(size=[n, directions]) / np.sqrt(directions)
    if correlated:
        g = g @ np.linalg.qr(rng.normal(size=[parameters, directions]))[0].T
    return g + shift / np.sqrt(g.shape[1])


@pytest.mark.parametrize("n", [2, 4, 32, 500])
@pytest.mark.parametrize(
    "directions, correlated", [(1, False), (2, False), (5, False), (30, False), (8, True)]
)
def test_noise_is_told_from_signal(n, directions, correlated):
    """Of one batch: without signal 5 % show a number, with one of 6 standard errors most do."""
    rng = np.random.default_rng(6)
    error = np.sqrt(np.sqrt(2 / directions) / n)  # of |G|^2, as a length
    shown = {0: [], 6: []}
    for times, found in shown.items():
        for _ in range(300):
            g = draws(rng, n, directions, correlated, np.sqrt(times) * error)
            m = moments_of_numpy(g)
            mean = metrics._shown_mean(m, tf_gsnr.gsnr(m))
            found.append((~np.isnan(tf_gsnr.noise_scale(m)), ~np.isnan(mean)))
    assert (np.mean(shown[0], axis=0) <= 0.05 + 2 * 0.0126).all(), np.mean(shown[0], axis=0)
    if n > 4:
        assert (np.mean(shown[6], axis=0) > 0.5).all(), np.mean(shown[6], axis=0)


@pytest.mark.parametrize("n", [2, 8, 32])
@pytest.mark.parametrize("steps", [4, 16, 64])
@pytest.mark.parametrize("directions", [1, 3, 20])
def test_noise_is_told_from_signal_over_steps(n, steps, directions):
    """K batches, whose gradients are three times as large in the first as in the others."""
    rng = np.random.default_rng(7)
    size = np.where(np.arange(steps) == 0, 3.0, 1.0)[:, None, None, None]
    error = np.sqrt(2 / directions * np.sum(size**4)) / (n * np.sum(size**2))  # of |G|^2 / size^2
    shown = {}
    for times in (0, 6):
        g = size * rng.normal(size=[steps, 400, n, directions]) / np.sqrt(directions)
        g += size * np.sqrt(times * error / directions)
        s2 = g.var(2, ddof=1)
        trace, diagonal = s2.sum(-1), (s2**2).sum(-1)
        u = n * (g.mean(2) ** 2).sum(-1) - trace
        products = (u * trace).sum(0), (u**2).sum(0)
        sums = [v.sum(0) for v in (u, trace, trace**2, diagonal)]
        told, _ = significance.told_from_zero(*sums, float(n * steps), float(steps), products)
        shown[times] = told.mean()
    assert shown[0] <= 0.05 + 3 * 0.011, shown
    assert shown[6] > 0.6 or n == 2, shown


def moments_of_numpy(g):
    mean = g.mean(0)
    return Moments(np.int64(len(g)), np.float64(0), [mean], [((g - mean) ** 2).sum(0)])


def test_the_forms_22_and_24_are_one_number():
    rng = np.random.default_rng(3)
    sets = [
        moments_of([rng.normal(0.2, 1, size=[30, 5, 2]), rng.normal(0, 3, size=[30, 4])])
        for _ in range(6)
    ]
    sets[0].m2[0][0] = 0.0
    by_definition = 1 - sum(np.sum(v) for m in sets for v in m.variance()) / (
        30 * sum(np.sum(g**2) for m in sets for g in m.mean)
    )
    assert tf_gsnr.osgr_predicted(sets) == pytest.approx(by_definition, rel=1e-12)
    assert metrics.osgr_from_gsnr(sets) == pytest.approx(by_definition, rel=1e-12)


def test_osgr_measured_is_a_ratio_of_sums():
    train = np.array([[2.0, 1.0], [3.0, 2.9]])
    test = np.array([[2.0, 1.5], [3.0, 2.8]])
    assert tf_gsnr.osgr_measured(train, test) == pytest.approx(0.7 / 1.1)
    with pytest.raises(ValueError, match=r"test_losses has shape \(3,\); expected \[M, 2\]"):
        tf_gsnr.osgr_measured(train, [1, 2, 3])


def test_standard_errors_cover():
    """Over many repetitions the standard errors are the spread of the estimates."""
    rng = np.random.default_rng(4)
    predicted, measured = [], []
    for _ in range(400):
        a, b = rng.normal(1.0, 0.2, 10), rng.normal(2.0, 0.2, 10)
        predicted.append(metrics.ratio_of_sums(a, b))
        shared = rng.normal(0.0, 0.05 * np.sqrt(1000), 1000)  # of the test examples, for all M
        train = np.stack([b, np.zeros(10)], 1)
        test = np.stack([a + shared.mean(), np.zeros(10)], 1)
        ratio = tf_gsnr.osgr_measured(train, test)
        measured.append((ratio, metrics.osgr_measured_se(train, test, 1 + shared)))
    for estimates in (np.array(predicted), np.array(measured)):
        assert np.sqrt((estimates[:, 1] ** 2).mean()) == pytest.approx(
            estimates[:, 0].std(), rel=0.15
        )


def test_in_a_graph_as_in_numpy(gradients, model):
    m = moments_of(gradients, sign_counts=True)
    tensors = tf.nest.map_structure(tf.constant, m)
    in_graph = tf.function(lambda m: tf_gsnr.summarize(m, model))(tensors)
    for name, value in tf_gsnr.summarize(m, model).items():
        assert float(in_graph[name]) == pytest.approx(value, rel=1e-5, nan_ok=True), name


def test_too_few_examples_and_no_signs():
    one = moments_of([np.ones([1, 2])])
    with pytest.raises(ValueError, match=r"1 example.*expected at least 2"):
        tf_gsnr.gsnr(one)
    with pytest.raises(ValueError, match="sign_counts=True"):
        tf_gsnr.same_sign(one)
