"""GSNRModel: what it shows, that it saves and loads, and what it refuses."""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import metrics
from tf_gsnr.training.meter import SHOWN

RNG = np.random.default_rng(0)
X = RNG.normal(size=[48, 5]).astype("float32")
Y = (X[:, :2] + 0.3 * RNG.normal(size=[48, 2])).astype("float32")


def mlp():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input([5]), *layers])


def fit(model, optimizer="sgd", loss="mse", **kwargs):
    model.compile(optimizer, loss)
    data = dict(x=X, y=Y, batch_size=16, epochs=1, verbose=0, shuffle=False) | kwargs
    return model.fit(**data).history


@pytest.mark.parametrize("pool", ["epoch", "batch"])
@pytest.mark.parametrize("bias_corrected", [True, False])
def test_numbers_are_those_of_the_moments(pool, bias_corrected):
    """Per step, at the weights of a plain training, and added up over the steps."""
    network = mlp()
    model = tf_gsnr.GSNRModel(network, pool=pool, bias_corrected=bias_corrected, per_layer=True)
    shown = fit(model, keras.optimizers.SGD(0.05))

    reference, parts, gap = mlp(), [], 0.0
    reference.compile(keras.optimizers.SGD(0.05), "mse")
    for i in range(0, 48, 16):
        x, y = X[i : i + 16], Y[i : i + 16]
        parts.append(tf_gsnr.gradient_moments(reference, x, y, sign_counts=True))
        gap += 0.05 * sum(v.sum() for v in parts[-1].variance(1)) / 48
        reference.train_on_batch(x, y)
    parts = parts if pool == "epoch" else parts[-1:]
    variance = [sum(v) for v in zip(*(m.variance(int(bias_corrected)) for m in parts))]
    signal = [sum(g**2 for g in means) for means in zip(*(m.mean for m in parts))]
    if bias_corrected:
        signal = [s - v / 16 for s, v in zip(signal, variance)]
    ratios = [s / v for s, v in zip(signal, variance)]
    signal, trace = (sum(v.sum() for v in values) for values in (signal, variance))
    signs = [metrics.same_sign(m, bias_corrected) for m in parts]
    expected = {
        "gsnr": np.concatenate([r.ravel() for r in ratios]).mean(),
        "gsnr_median": np.median(np.concatenate([r.ravel() for r in ratios])),
        "same_sign": np.concatenate([s.ravel() for step in signs for s in step]).mean(),
        "noise_scale": trace / signal,
        "osgr": signal / (signal + trace / 48),
        "gap_growth": gap,
    }
    assert list(expected) == list(SHOWN)
    for layer, pair in zip(network.layers, (ratios[:2], ratios[2:])):
        path = layer.kernel.path.rpartition("/")[0]
        expected[f"gsnr/{path}"] = np.concatenate([r.ravel() for r in pair]).mean()
    for name, value in expected.items():
        np.testing.assert_allclose(shown[name][-1], value, rtol=2e-4, err_msg=name)


def test_unmeasured_steps_stand_for_the_measured_one():
    every = fit(tf_gsnr.GSNRModel(mlp()), epochs=4)["gap_growth"][-1]
    some = fit(tf_gsnr.GSNRModel(mlp(), measure_every=3), epochs=4)["gap_growth"][-1]
    np.testing.assert_allclose(some, every, rtol=0.4)


def test_number_of_examples_is_learnt_from_the_data():
    arrays = fit(tf_gsnr.GSNRModel(mlp()), epochs=2)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    dataset = fit(tf_gsnr.GSNRModel(mlp()), x=data, y=None, batch_size=None, epochs=2)
    told = fit(tf_gsnr.GSNRModel(mlp(), examples=96), epochs=2)
    for name in ("gap_growth", "osgr"):
        np.testing.assert_allclose(arrays[name], dataset[name], rtol=1e-5)
    np.testing.assert_allclose(np.array(told["gap_growth"]) * 2, arrays["gap_growth"], rtol=1e-5)


def test_validation_and_predictions_are_the_inner_models(tmp_path):
    network = mlp()
    model = tf_gsnr.GSNRModel(network)
    history = fit(model, validation_data=(X, Y), epochs=2)
    assert not any(name.startswith("val_") and "gsnr" in name for name in history)
    assert set(model.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss"}
    np.testing.assert_array_equal(model.predict(X, verbose=0), network.predict(X, verbose=0))


@pytest.mark.parametrize("pool", ["epoch", "batch"])
def test_a_last_batch_of_one_example_changes_nothing(pool):
    model = tf_gsnr.GSNRModel(mlp(), pool=pool)
    history = fit(model, x=X[:33], y=Y[:33], epochs=2)
    assert all(np.isfinite(values).all() for values in history.values())
    assert np.isfinite(model.train_on_batch(X, Y)[0])


def test_callbacks_see_it(tmp_path):
    log = tmp_path / "log.csv"
    stop = keras.callbacks.EarlyStopping("gap_growth", mode="min", patience=1)
    fit(tf_gsnr.GSNRModel(mlp()), epochs=5, callbacks=[keras.callbacks.CSVLogger(log), stop])
    lines = log.read_text().splitlines()
    assert set(SHOWN) <= set(lines[0].split(","))
    assert len(lines) == 3  # gap_growth only grows


def test_a_compiled_model_is_taken_over():
    network = mlp()
    network.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    history = tf_gsnr.GSNRModel(network).fit(X, Y, verbose=0).history
    assert {"loss", "mae", "gsnr"} <= set(history)


def test_what_is_saved_is_the_plain_model(tmp_path):
    model = tf_gsnr.GSNRModel(mlp(), measure_every=2, per_layer=True)
    fit(model, "adam", epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is keras.Sequential
    assert set(fit(loaded, "adam")) == {"loss"}
    weights = loaded.get_weights()
    model.save_weights(tmp_path / "w.weights.h5")
    loaded.load_weights(tmp_path / "w.weights.h5")
    assert any(np.abs(a - b).max() > 0 for a, b in zip(weights, loaded.get_weights()))


def test_mixed_precision_shows_unscaled_numbers():
    whole = fit(tf_gsnr.GSNRModel(mlp()), "sgd")
    for policy in ("mixed_float16", "mixed_bfloat16"):
        keras.config.set_dtype_policy(policy)
        try:
            half = fit(tf_gsnr.GSNRModel(mlp()), "sgd")
        finally:
            keras.config.set_dtype_policy("float32")
        for name, value in whole.items():
            np.testing.assert_allclose(half[name], value, rtol=0.1, atol=0.02, err_msg=name)


def test_a_step_that_overflows_is_not_counted():
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e-6), initial_scale=2.0**127, dynamic_growth_steps=1000
    )
    network = mlp()
    before = network.get_weights()
    skipped = []

    def compare(epoch, logs):
        weights = zip(before, network.get_weights())
        skipped.append(all(np.array_equal(a, b) for a, b in weights))

    callback = keras.callbacks.LambdaCallback(on_epoch_end=compare)
    model = tf_gsnr.GSNRModel(network)
    history = fit(model, scaled, x=1000 * X, y=1000 * Y, epochs=12, callbacks=[callback])
    assert skipped[0] and not skipped[-1]  # until the scale had come down
    np.testing.assert_array_equal(np.isnan(history["same_sign"]), skipped)
    np.testing.assert_array_equal(np.isnan(history["gap_growth"]), skipped)


def test_mnist_script_with_one_line_more(tfds_dir, tmp_path):
    import tensorflow_datasets as tfds

    data = tfds.load(
        "mnist", data_dir=tfds_dir, download=False, split="train[:2000]", as_supervised=True
    )
    data = data.map(lambda x, y: (tf.cast(x, tf.float32) / 255, y)).cache().batch(50)
    model = keras.Sequential(
        [
            keras.Input([28, 28, 1]),
            keras.layers.Conv2D(6, 5, activation="relu"),
            keras.layers.MaxPooling2D(4),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model = tf_gsnr.GSNRModel(model, measure_every=4, per_layer=True)  # the one line
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    callbacks = []
    if importlib.util.find_spec("tensorboard"):
        callbacks = [keras.callbacks.TensorBoard(tmp_path)]
    history = model.fit(data, epochs=3, verbose=0, callbacks=callbacks).history
    assert history["accuracy"][-1] > 0.6
    assert 0 < history["gsnr"][-1] < 1 and 0 < history["osgr"][-1] < 1
    assert 0.5 < history["same_sign"][-1] < 1
    if callbacks:
        files = list((tmp_path / "train").glob("events*"))
        tags = {
            value.tag
            for file in files
            for event in tf.compat.v1.train.summary_iterator(str(file))
            for value in event.summary.value
        }
        assert {"epoch_gsnr", "epoch_osgr", "epoch_gap_growth"} <= tags


def test_gap_growth_is_not_shown_for_other_optimisers():
    history = fit(tf_gsnr.GSNRModel(mlp()), keras.optimizers.Lion(1e-3))
    assert "gsnr" in history and "gap_growth" not in history


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(measure_every=0), "measure_every=0"),
        (dict(measure_every=1.5), "measure_every=1.5"),
        (dict(engine="fast"), "unknown engine 'fast'"),
        (dict(pool="run"), "unknown pool 'run'"),
        (dict(shown=["snr"]), "unknown .snr.; expected a tuple of some of gsnr"),
        (dict(examples=0), "examples=0"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tf_gsnr.GSNRModel(mlp(), **arguments)


def test_refuses_models():
    with pytest.raises(ValueError, match="expected a keras.Model"):
        tf_gsnr.GSNRModel(keras.layers.Dense(1))

    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    with pytest.raises(ValueError, match="train_step of its own"):
        tf_gsnr.GSNRModel(Own([keras.layers.Dense(1)]))
    frozen = mlp()
    frozen.trainable = False
    with pytest.raises(ValueError, match="no trainable variables"):
        fit(tf_gsnr.GSNRModel(frozen))
    with pytest.raises(ValueError, match="engine='layerwise'"):
        layers = [keras.Input([5]), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
        fit(tf_gsnr.GSNRModel(keras.Sequential(layers), engine="vectorized"))
