"""Metrics against their definitions, their identities and what is known of their statistics."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import Moments, metrics


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
        tf_gsnr.gsnr(m), tf_gsnr.gsnr(m, bias_corrected=True), gradients
    ):
        np.testing.assert_allclose(ratio, g.mean(0) ** 2 / g.var(0))
        s2 = g.var(0, ddof=1)
        np.testing.assert_allclose(corrected, (g.mean(0) ** 2 - s2 / 50) / s2, atol=1e-12)


def test_corrected_gsnr_is_unbiased_where_there_is_no_signal():
    rng = np.random.default_rng(1)
    noise = [rng.normal(size=[32, 50_000]).astype(np.float32)]
    m = moments_of(noise)
    assert np.mean(tf_gsnr.gsnr(m)[0]) == pytest.approx(1 / 32, rel=0.15)
    # E[(mean^2 - s2/n) / s2] = (n-1)/(n-3)/n - 1/n for normal gradients: 2e-3 of a bias of 3e-2
    assert abs(np.mean(tf_gsnr.gsnr(m, bias_corrected=True)[0])) < 3e-3
    large = moments_of([rng.normal(size=[1000, 20_000])])
    assert abs(np.mean(tf_gsnr.gsnr(large, bias_corrected=True)[0])) < 1e-4


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
    alive = np.concatenate([tf_gsnr.gsnr(m)[0][1:].ravel(), tf_gsnr.gsnr(m)[1]])
    assert summary["dead"] == 3 and summary["parameters"] == 15
    assert summary["gsnr/mean"] == pytest.approx(alive.mean())
    assert summary["gsnr/median"] == pytest.approx(np.median(alive))
    assert summary["gsnr/p95"] == pytest.approx(np.percentile(alive, 95))
    assert sum(v for k, v in summary.items() if k.startswith("gap_share/")) == pytest.approx(1)
    assert {f"gsnr/{v.path}" for v in model.trainable_variables} <= set(summary)


def test_all_dead(model):
    summary = tf_gsnr.summarize(moments_of([np.zeros([9, 4, 3]), np.zeros([9, 3])]), model)
    assert summary["dead"] == 15
    assert np.isnan(summary["gsnr/mean"]) and np.isnan(summary["gsnr/median"])


def test_same_sign(gradients):
    m = moments_of(gradients, sign_counts=True)
    positive = (gradients[1] > 0).mean(0)
    np.testing.assert_allclose(tf_gsnr.same_sign(m)[1], np.maximum(positive, 1 - positive))


def test_noise_scale_and_diversity(gradients):
    m = moments_of(gradients)
    flat = np.concatenate([g.reshape(50, -1) for g in gradients], 1)
    signal = (flat.mean(0) ** 2).sum()
    assert tf_gsnr.noise_scale(m) == pytest.approx(flat.var(0).sum() / signal)
    trace = flat.var(0, ddof=1).sum()
    corrected = tf_gsnr.noise_scale(m, bias_corrected=True)
    assert corrected == pytest.approx(trace / (signal - trace / 50))
    diversity = (flat**2).sum() / (flat.sum(0) ** 2).sum()
    assert tf_gsnr.gradient_diversity(m) == pytest.approx(diversity)


def test_noise_scale_without_signal_is_infinite():
    m = moments_of([np.array([[1.0], [-1.0]])])
    assert tf_gsnr.noise_scale(m) == np.inf
    assert tf_gsnr.noise_scale(m, bias_corrected=True) == np.inf


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
        assert float(in_graph[name]) == pytest.approx(value, rel=1e-5), name


def test_too_few_examples_and_no_signs():
    one = moments_of([np.ones([1, 2])])
    with pytest.raises(ValueError, match=r"1 example.*expected at least 2"):
        tf_gsnr.gsnr(one)
    with pytest.raises(ValueError, match="sign_counts=True"):
        tf_gsnr.same_sign(one)
