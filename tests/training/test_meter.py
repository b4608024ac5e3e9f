"""GSNRMeter: its sums over steps against numpy, in what it says and in what it does not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import Moments, data
from tf_gsnr.training.meter import SHOWN, GSNRMeter

SHAPES = {"one/kernel": [4, 3], "one/bias": [3], "two/kernel": [3, 5]}
EXAMPLES = 1000


def gradients(rng, n, scale=1.0):
    """Per variable `[n, *shape]`; the last two parameters of the last are dead."""
    found = [scale * (0.5 + rng.normal(size=[n, *shape])) for shape in SHAPES.values()]
    found[2][:, 2, 3:] = 0
    return found


def moments_of(steps, dtype="float32"):
    """Of float64 gradients."""
    found = []
    for g in steps:
        m = Moments.of([tf.constant(v) for v in g], np.zeros(len(g[0])), sign_counts=True)
        found.append(m.astype(dtype))
    return found


def meter_of(shown=SHOWN, **options):
    variables = [keras.Variable(np.zeros(s, "float32")) for s in SHAPES.values()]
    options = dict(pool="epoch", bias_corrected=True, per_layer=True, examples=EXAMPLES) | options
    meter = GSNRMeter(variables, shown, paths=list(SHAPES), **options)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(variables)

    @tf.function
    def update(moments):
        meter.advance(moments.count)
        meter.update_state(moments, optimizer)

    return meter, update


def results(meter):
    return {name: float(value) for name, value in tf.function(meter.result)().items()}


def expected(steps, corrected=True, measured=(0, 1, 2)):
    """The same from the definitions, in float64, untested against zero."""
    signal, noise = [0.0] * 3, [0.0] * 3
    agree, gap = [], 0.0
    for g in steps:
        n = len(g[0])
        gap += 0.1 * sum(g[i].var(0, ddof=1).sum() for i in measured) / EXAMPLES
        shares = []
        for i in measured:
            mean, variance = g[i].mean(0), g[i].var(0, ddof=int(corrected))
            signal[i] += n * (mean**2 - (variance / n if corrected else 0))
            noise[i] += n * variance
            p, q = (g[i] > 0).sum(0), (g[i] < 0).sum(0)
            chance = (p * (p - 1) + q * (q - 1)) / np.maximum((p + q) * (p + q - 1), 1)
            share = chance if corrected else np.maximum(p, q) / np.maximum(p + q, 1)
            shares.append(share[p + q > 1])
        agree.append((n, np.concatenate(shares)))

    def ratios(indices):
        both = [(signal[i].ravel(), noise[i].ravel()) for i in indices if i in measured]
        s, v = (np.concatenate(x) for x in zip(*both)) if both else (np.zeros(1), np.zeros(1))
        return s[v > 0] / v[v > 0] if both else np.array([np.nan])

    s, v = (sum(np.sum(x[i]) for i in measured) for x in (signal, noise))
    return {
        "gsnr": ratios(range(3)).mean(),
        "gsnr_median": np.median(ratios(range(3))),
        "same_sign": sum(n * x.sum() for n, x in agree) / sum(n * len(x) for n, x in agree),
        "noise_scale": v / s,
        "osgr": s / (s + v / EXAMPLES),
        "gap_growth": gap,
        "gsnr/one": ratios([0, 1]).mean(),
        "gsnr/two": ratios([2]).mean(),
    }


def assert_close(found, wanted, **tolerance):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **{"rtol": 2e-5} | tolerance)


@pytest.fixture(scope="module")
def steps():
    rng = np.random.default_rng(0)
    return [gradients(rng, n) for n in (32, 32, 32, 7)]


@pytest.mark.parametrize("pool", ["epoch", "batch"])
@pytest.mark.parametrize("corrected", [True, False])
def test_against_numpy(steps, pool, corrected):
    meter, update = meter_of(pool=pool, bias_corrected=corrected)
    assert np.isnan(list(results(meter).values())).all()
    for moments in moments_of(steps):
        update(moments)
    wanted = expected(steps if pool == "epoch" else steps[-1:], corrected)
    wanted["gap_growth"] = expected(steps)["gap_growth"]
    assert_close(results(meter), wanted)
    assert meter.result_names == list(wanted) and not meter.reasons()
    meter.reset_state()
    after = results(meter)
    assert after.pop("gap_growth") == pytest.approx(wanted["gap_growth"], rel=1e-5)
    assert np.isnan(list(after.values())).all() and "no step was measured" in meter.reasons()[0]


def test_one_step_is_the_moments(steps):
    """The same definitions in fit and in `summarize`."""
    meter, update = meter_of()
    (moments,) = moments_of(steps[:1])
    update(moments)
    found = results(meter)
    layers = [keras.layers.Dense(3, name="one"), keras.layers.Dense(5, name="two", use_bias=False)]
    model = keras.Sequential([keras.Input([4]), *layers])
    record = tf_gsnr.summarize(moments.numpy(), model)
    names = {"gsnr": "gsnr/mean", "gsnr_median": "gsnr/median", "same_sign": "same_sign/mean"}
    names |= {"noise_scale": "noise_scale"}
    for name, of_record in names.items():
        assert found[name] == pytest.approx(record[of_record], rel=1e-5), name
    assert found["osgr"] == pytest.approx(tf_gsnr.osgr(moments.numpy(), EXAMPLES), rel=1e-5)


def test_steps_that_point_apart_do_not_count_as_noise():
    """Moments of both together would show a mean of zero; each step's own signal is large."""
    rng = np.random.default_rng(1)
    steps = [[sign * v for v in gradients(rng, 64)] for sign in (1, -1)]
    meter, update = meter_of()
    one, two = moments_of(steps)
    update(one)
    update(two)
    assert results(meter)["gsnr"] == pytest.approx(0.25, rel=0.3)
    assert (
        np.nanmean(np.concatenate([r.ravel() for r in tf_gsnr.gsnr(one.merge(two).numpy())])) < 0.1
    )


@pytest.mark.parametrize("pool", ["epoch", "batch"])
def test_gradients_whose_squares_underflow(pool):
    """In float32; here they are kept in float64."""
    rng = np.random.default_rng(2)
    steps = [gradients(rng, 32, size) for size in (1e-19, 3e-19, 1e-21, 1e-3, 1e-20)]
    for order in (slice(None), slice(None, None, -1), slice(0, 3)):
        meter, update = meter_of(pool=pool)
        for moments in moments_of(steps[order], "float64"):
            update(moments)
        chosen = steps[order] if pool == "epoch" else steps[order][-1:]
        wanted = expected(chosen) | {"gap_growth": expected(steps[order])["gap_growth"]}
        found = results(meter)
        for name in ("gap_growth", "gsnr_median"):  # the one underflows, the other may be NaN
            assert found.pop(name) == pytest.approx(wanted.pop(name), rel=1e-4, abs=1e-30), name
        assert_close(found, wanted, rtol=1e-4)


def test_what_was_not_measured_is_left_out(steps):
    meter, update = meter_of()
    for moments in moments_of(steps):
        nothing = tf.fill([3, 5], np.float32(np.nan))
        moments = moments._replace(mean=[*moments.mean[:2], nothing], m2=[*moments.m2[:2], nothing])
        zeros = tf.zeros([3, 5], tf.int64)
        moments = moments._replace(positives=[*moments.positives[:2], zeros])
        moments = moments._replace(negatives=[*moments.negatives[:2], zeros])
        update(moments)
    found, wanted = results(meter), expected(steps, measured=(0, 1))
    assert np.isnan(found["gsnr/two"])
    assert_close(found, wanted)
    (reason,) = meter.reasons()
    assert reason.startswith("gsnr/two: no gradient was measured that differs")


def test_batches_of_one_example(steps):
    """They have no variance: no numbers rather than zeros, and a line that says why."""
    meter, update = meter_of()
    lone = [[v[:1] for v in g] for g in steps]
    for moments in moments_of(lone):
        update(moments)
    assert np.isnan(list(results(meter).values())).all()
    (reason,) = meter.reasons()
    assert reason.startswith(", ".join(SHOWN)) and "a step of one example has no variance" in reason
    for moments in moments_of([*steps, lone[0]]):
        update(moments)
    wanted = expected(steps)
    last = expected(steps[-1:])["gap_growth"]  # for the last step stands the one before it
    assert_close(results(meter), wanted | {"gap_growth": wanted["gap_growth"] + last})


def test_without_signal_it_says_so():
    rng = np.random.default_rng(3)
    steps = [[rng.normal(size=[32, *shape]) for shape in SHAPES.values()] for _ in range(4)]
    meter, update = meter_of()
    for moments in moments_of(steps):
        update(moments)
    found = results(meter)
    hidden = ["gsnr", "gsnr_median", "noise_scale", "osgr", "gsnr/one", "gsnr/two"]
    assert [k for k, v in found.items() if np.isnan(v)] == hidden
    assert found["same_sign"] == pytest.approx(0.5, abs=0.01)
    (reason,) = meter.reasons()
    assert reason.startswith(", ".join(hidden) + ": the signal cannot be told from zero")
    assert "with 32 examples a step and 4 steps" in reason


def test_only_what_is_shown_is_kept():
    meter, update = meter_of(shown=("osgr", "gap_growth"), per_layer=False)
    assert not meter.sign_counts and meter._signal is None
    (moments,) = moments_of([gradients(np.random.default_rng(4), 32)])
    update(moments._replace(positives=[], negatives=[]))
    assert list(results(meter)) == ["osgr", "gap_growth"]


def test_over_an_epoch_of_adam_as_at_fixed_weights(tfds_dir):
    """Within noise, what thousands of images show at some of the weights along the way.

    |G|^2 goes up and down severalfold within an epoch: the weights at its end would not do.
    """
    x, y = data.load("mnist", tfds_dir).draw(4000, np.random.default_rng(0))
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(4, 5, strides=2, activation="relu"),
        keras.layers.MaxPooling2D(2),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
    network = keras.Sequential([keras.Input(x.shape[1:]), *layers])
    model = tf_gsnr.GSNRModel(network, per_layer=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=False)
    there, fixed = [], []

    def measure(batch, logs):
        if batch % 8 == 4:
            options = dict(loss=loss, sign_counts=True)
            there.append(tf_gsnr.gradient_moments(network, x[:2000], y[:2000], **options))

    def epoch_ends(epoch, logs):
        variance = [sum(v) for v in zip(*(m.variance(1) for m in there))]
        square = [sum(g**2 for g in means) for means in zip(*(m.mean for m in there))]
        signal = [s - v / 2000 for s, v in zip(square, variance)]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = [np.where(v > 0, s / v, np.nan) for s, v in zip(signal, variance)]
        s, v = (sum(x.sum(dtype=float) for x in values) for values in (signal, variance))
        signs = [a.ravel() for m in there for a in tf_gsnr.same_sign(m)]
        fixed.append(
            {
                "gsnr": np.nanmean(np.concatenate([r.ravel() for r in ratios])),
                "same_sign": np.nanmean(np.concatenate(signs)),
                "noise_scale": v / s,
                "osgr": s / (s + v / 4000),
            }
        )
        there.clear()

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=measure, on_epoch_end=epoch_ends)
    history = model.fit(x, y, batch_size=64, epochs=4, verbose=0, callbacks=[watch]).history
    # At fixed weights an epoch's standard deviation is 0.0006 of gsnr, 0.0009 of 1 / noise_scale.
    tolerances = {"gsnr": 0.0015, "same_sign": 0.003, "noise_scale": 0.002, "osgr": 0.03}
    for name, tolerance in tolerances.items():
        shown, held = np.array(history[name]), np.array([record[name] for record in fixed])
        if name == "noise_scale":
            shown, held = 1 / shown, 1 / held
        np.testing.assert_allclose(shown, held, rtol=0.05, atol=tolerance, err_msg=name)
    for values in history.values():
        assert not np.isinf(values).any()
    assert (np.array(history["osgr"]) <= 1).all() and (np.array(history["osgr"]) > 0).all()


def test_fit_with_batches_of_one_example_shows_no_numbers():
    keras.utils.set_random_seed(0)
    model = tf_gsnr.GSNRModel(keras.Sequential([keras.Input([3]), keras.layers.Dense(2)]))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=[6, 3]).astype("float32")
    history = model.fit(x, x[:, :2], batch_size=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.isnan(history[name]).all() for name in SHOWN)
