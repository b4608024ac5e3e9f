"""What a user does with a model around training: saving, loading, copying, looking at it."""

import csv
import gc
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[24, 4]).astype("float32")
Y = np.tanh(X[:, :2])
FIT = dict(x=X, y=Y, batch_size=8, epochs=2, verbose=0, shuffle=False)


@keras.saving.register_keras_serializable("lifecycle")
class Mine(keras.Model):
    """A user's own class, with a method of its own."""

    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden, self.out = L.Dense(width, "tanh", name="hidden"), L.Dense(2, name="out")

    def build(self, shape):
        self.hidden.build(shape)
        self.out.build((None, self.width))
        self.built = True

    def call(self, x):
        return self.out(self.hidden(x))

    def get_config(self):
        return super().get_config() | {"width": self.width}

    def embed(self, x):
        return self.hidden(x)


def functional():
    inputs = keras.Input([4], name="x")
    h = L.Dense(5, "tanh", name="hidden")(inputs)
    return keras.Model(inputs, L.Dense(2, name="out")(h), name="small")


def sequential():
    layers = [L.Dense(5, "tanh", name="hidden"), L.Dropout(0.1, seed=1), L.Dense(2, name="out")]
    return keras.Sequential([keras.Input([4]), *layers])


def mine():
    model = Mine()
    model.build((None, 4))
    return model


MAKERS = [functional, sequential, mine]


def fitted(make, wrap=True, **options):
    keras.utils.set_random_seed(2)
    model = make()
    if wrap:
        model = tf_gsnr.GSNRModel(model, **options)
    model.compile(keras.optimizers.SGD(0.1, 0.9), "mse", metrics=["mae"])
    model.fit(**FIT)
    return model


def plain(make):
    return fitted(make, wrap=False)


def assert_same(a, b, **tolerance):
    assert len(a) == len(b)
    for v, w in zip(a, b):
        np.testing.assert_allclose(v, w, **dict(rtol=1e-5, atol=1e-6) | tolerance)


def test_is_the_users_own_model():
    model = mine()
    watched = tf_gsnr.GSNRModel(model)
    assert watched is model
    assert isinstance(watched, Mine)
    assert watched.embed(X).shape == (24, 5)


def test_watched_twice():
    model = functional()
    assert tf_gsnr.GSNRModel(tf_gsnr.GSNRModel(model)) is model
    theirs = plain(functional)
    ours = fitted(lambda: tf_gsnr.GSNRModel(functional()))
    assert_same(ours.get_weights(), theirs.get_weights())


@pytest.mark.parametrize("make", MAKERS)
def test_saved_and_loaded(make, tmp_path):
    model = fitted(make)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is type(plain(make))
    assert_same(again.get_weights(), model.get_weights())
    assert_same(again.optimizer.variables, plain(make).optimizer.variables)
    theirs = plain(make)
    again.fit(**FIT)
    theirs.fit(**FIT)
    if make is not sequential:  # whose dropout begins anew
        assert_same(again.get_weights(), theirs.get_weights())
    np.testing.assert_allclose(again.predict(X[:3], verbose=0), again(X[:3]), rtol=1e-5)


def test_loaded_without_the_package(tmp_path):
    """Nothing of tf_gsnr is named in the file."""
    import zipfile

    fitted(functional).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert b"gsnr" not in file.read("config.json").lower()


def test_loaded_and_watched_again(tmp_path):
    fitted(functional).save(tmp_path / "model.keras")
    ours = tf_gsnr.GSNRModel(keras.saving.load_model(tmp_path / "model.keras"))
    history = ours.fit(**FIT).history  # compiled as it was saved
    theirs = plain(functional)
    theirs.fit(**FIT)
    assert_same(ours.get_weights(), theirs.get_weights())
    assert "gsnr" in history


def test_a_compiled_model_stays_compiled():
    model = plain(functional)
    rate = model.optimizer
    watched = tf_gsnr.GSNRModel(model)
    assert watched.optimizer is rate
    theirs = plain(functional)
    theirs.fit(**FIT)
    watched.fit(**FIT)
    assert_same(watched.get_weights(), theirs.get_weights())


@pytest.mark.parametrize("make", MAKERS)
def test_weights_in_both_directions(make, tmp_path):
    ours, theirs = fitted(make), plain(make)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    fresh = make()
    fresh.load_weights(tmp_path / "ours.weights.h5")
    assert_same(fresh.get_weights(), ours.get_weights(), rtol=0, atol=0)
    watched = tf_gsnr.GSNRModel(make())
    watched.load_weights(tmp_path / "theirs.weights.h5")
    assert_same(watched.get_weights(), theirs.get_weights(), rtol=0, atol=0)
    assert_same(ours.get_weights(), theirs.get_weights())


def test_old_h5_format(tmp_path):
    model = fitted(functional)
    model.save(tmp_path / "model.h5")
    again = keras.saving.load_model(tmp_path / "model.h5", compile=False)
    assert_same(again.get_weights(), model.get_weights(), rtol=0, atol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_clone(make):
    model = fitted(make)
    copy = keras.models.clone_model(model)
    assert type(copy) is type(make())
    copy(X[:1])
    copy.set_weights(model.get_weights())
    np.testing.assert_allclose(copy(X), model(X), rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_config(make):
    model, other = tf_gsnr.GSNRModel(make()), make()
    assert type(model).from_config(model.get_config()).count_params is not None
    assert set(model.get_config()) == set(other.get_config())


@pytest.mark.parametrize("make", MAKERS)
def test_pickle(make):
    model = fitted(make)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(make())
    assert_same(again.get_weights(), model.get_weights(), rtol=0, atol=0)
    np.testing.assert_allclose(again.predict(X[:3], verbose=0), model(X[:3]), rtol=1e-5)
    again.fit(**FIT)


def test_deepcopy():
    import copy

    model = fitted(functional)
    again = copy.deepcopy(model)
    assert_same(again.get_weights(), model.get_weights(), rtol=0, atol=0)
    again.fit(**FIT)
    assert np.abs(again.get_weights()[0] - model.get_weights()[0]).max() > 0


def test_checkpoint_of_the_best(tmp_path):
    def best(wrap):
        keras.utils.set_random_seed(2)
        model = tf_gsnr.GSNRModel(functional()) if wrap else functional()
        model.compile("sgd", "mse")
        path = tmp_path / f"{wrap}.keras"
        saving = keras.callbacks.ModelCheckpoint(path, "val_loss", save_best_only=True)
        model.fit(**FIT, validation_data=(X, Y), callbacks=[saving])
        return keras.saving.load_model(path)

    ours, theirs = best(True), best(False)
    assert type(ours) is type(theirs)
    assert_same(ours.get_weights(), theirs.get_weights())


def test_checkpoint_by_a_number_that_is_shown(tmp_path):
    model = tf_gsnr.GSNRModel(functional())
    model.compile("sgd", "mse")
    path = tmp_path / "best.weights.h5"
    saving = keras.callbacks.ModelCheckpoint(
        path, "gsnr", mode="max", save_best_only=True, save_weights_only=True
    )
    model.fit(**FIT, callbacks=[saving])
    assert path.exists()


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_backup_and_restore(tmp_path):
    def go_on(wrap):
        backup = lambda: keras.callbacks.BackupAndRestore(tmp_path / str(wrap))  # noqa: E731
        data = FIT | dict(epochs=4)
        for again in (False, True):
            keras.utils.set_random_seed(2)
            model = tf_gsnr.GSNRModel(functional()) if wrap else functional()
            model.compile(keras.optimizers.SGD(0.1, 0.9), "mse")
            if again:
                model.fit(**data, callbacks=[backup()])
                return model.get_weights()
            with pytest.raises(KeyboardInterrupt):
                model.fit(**data, callbacks=[backup(), Interrupt()])

    assert_same(go_on(True), go_on(False))


@pytest.mark.parametrize("make", MAKERS)
def test_export(make, tmp_path):
    model = fitted(make)
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(X[:4]), model(X[:4]), rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_summary_and_layers(make):
    def looked_at(model):
        lines = []
        model.summary(print_fn=lambda line, **_: lines.append(line))
        names = [type(layer).__name__ for layer in model.layers]
        return lines[1:], names, model.count_params(), model.get_layer("hidden").units

    # The names that Keras numbers differ between two models of a process, as do optimizers' sizes.
    ours, theirs = looked_at(fitted(make)), looked_at(plain(make))
    assert ours[1:] == theirs[1:]
    assert len(ours[0]) == len(theirs[0])


def test_inputs_and_outputs():
    model = fitted(functional)
    assert model.name == "small"
    assert model.input_shape == (None, 4) and model.output_shape == (None, 2)
    features = keras.Model(model.input, model.get_layer("hidden").output)
    assert features.predict(X[:3], verbose=0).shape == (3, 5)


def test_trainable_and_variables():
    model = fitted(functional)
    theirs = plain(functional)
    for what in ("trainable_variables", "non_trainable_variables", "variables", "weights"):
        ours = [tuple(v.shape) for v in getattr(model, what)]
        assert ours == [tuple(v.shape) for v in getattr(theirs, what)], what
    assert len(model.optimizer.variables) == len(theirs.optimizer.variables)


def test_metrics_names():
    """What evaluate returns, and compiled metrics, are those of the plain model."""
    ours, theirs = fitted(functional), plain(functional)
    ours, theirs = (m.evaluate(X, Y, verbose=0, return_dict=True) for m in (ours, theirs))
    assert list(ours) == list(theirs)
    assert_same(list(ours.values()), list(theirs.values()))


def test_evaluate_as_a_list():
    ours, theirs = fitted(functional), plain(functional)
    assert_same(ours.evaluate(X, Y, verbose=0), theirs.evaluate(X, Y, verbose=0))


def test_built_by_fit():
    def model():
        return keras.Sequential([L.Dense(5, "tanh"), L.Dense(2)])

    assert_same(fitted(model).get_weights(), plain(model).get_weights())


def test_part_of_another_model():
    """A model that was watched becomes a layer of the next."""
    body = fitted(functional)
    head = keras.Sequential([body, L.Dense(1)])
    head.compile("sgd", "mse")
    assert "gsnr" not in head.fit(X, Y[:, :1], verbose=0).history
    watched = tf_gsnr.GSNRModel(keras.Sequential([body, L.Dense(1)]))
    watched.compile("sgd", "mse")
    assert "gsnr" in watched.fit(X, Y[:, :1], verbose=0).history


def test_predict_between_epochs():
    """A callback that evaluates and predicts within fit."""

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.predict(X[:5], verbose=0)
            self.model.evaluate(X, Y, verbose=0)

    def run(wrap):
        keras.utils.set_random_seed(2)
        model = tf_gsnr.GSNRModel(sequential()) if wrap else sequential()
        model.compile("sgd", "mse", metrics=["mae"])
        return model.fit(**FIT, callbacks=[Looks()]).history, model.get_weights()

    (ours, weights), (theirs, plain_weights) = run(True), run(False)
    assert_same(weights, plain_weights)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(every_epochs=2), dict(every_steps=2)])
def test_columns_of_history_and_csv(options, tmp_path):
    """Situation 19: a column has a value for each epoch, in History and in the CSV file."""
    model = functional()
    model.compile("sgd", "mse")
    file = tmp_path / "log.csv"
    callbacks = [tf_gsnr.GSNRCallback(X, Y, **options), keras.callbacks.CSVLogger(file)]
    history = model.fit(**FIT | dict(epochs=4), callbacks=callbacks).history
    assert {len(values) for values in history.values()} == {4}
    with open(file) as lines:
        assert set(history) <= set(next(csv.reader(lines)))


@pytest.mark.parametrize("every", [1, 3])
def test_a_model_that_goes_takes_its_graphs_along(every):
    def objects():
        gc.collect()  # the model
        gc.collect()  # what went with it
        return len(gc.get_objects())

    for _ in range(2):  # what TensorFlow makes once
        fitted(functional, measure_every=every)
    before = objects()
    for _ in range(3):
        fitted(functional, measure_every=every)
    assert (objects() - before) / 3 < 50  # a plain model leaves 800, a measured step 12,000


def test_weights_of_a_plain_model_into_a_fitted_one(tmp_path):
    file = tmp_path / "plain.weights.h5"
    plain(functional).save_weights(file)
    model = fitted(functional)
    model.load_weights(file)
    model.fit(**FIT)


class Watched(keras.Model):
    """Tracks a number of its own in every call."""

    def __init__(self):
        super().__init__()
        self.head, self.size = keras.layers.Dense(2), keras.metrics.Mean(name="size")

    def call(self, x):
        y = self.head(x)
        self.size.update_state(keras.ops.mean(keras.ops.abs(y)))
        return y


def test_metrics_within_a_model_are_as_before():
    x, y = X, np.ones([len(X), 2], "float32")

    def run(callbacks):
        keras.utils.set_random_seed(1)
        model = Watched()
        model.compile("sgd", "mse")
        history = model.fit(x, y, 8, 2, verbose=0, shuffle=False, callbacks=callbacks).history
        return model, history["size"]

    (model, with_it), (_, without) = run([tf_gsnr.GSNRCallback(x, y, every_steps=2)]), run([])
    np.testing.assert_allclose(with_it, without, rtol=1e-6)
    model.size.reset_state()
    tf_gsnr.gradient_moments(model, x, y)
    assert float(model.size.count) == 0


def test_states_of_a_recurrent_layer_are_as_before():
    x = np.random.default_rng(0).normal(size=[16, 6, 3]).astype("float32")
    y = np.ones([16, 2], "float32")
    recurrent = keras.layers.LSTM(4, stateful=True)
    inputs = keras.Input(batch_shape=[8, 6, 3])
    model = keras.Sequential([inputs, recurrent, keras.layers.Dense(2)])
    recurrent.states[0].assign(np.full([8, 4], 0.5))
    first, again = (tf_gsnr.gradient_moments(model, x, y, "mse", batch_size=8) for _ in range(2))
    np.testing.assert_array_equal(recurrent.states[0], np.full([8, 4], 0.5))
    for a, b in zip(first.mean, again.mean):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_float8():
    """Keras gives its scales a gradient, but no state of the optimiser."""

    def run(wrap):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(8), keras.layers.Dense(2)])
        model.quantize("float8")
        model = tf_gsnr.GSNRModel(model) if wrap else model
        model.compile("adam", "mse")
        model.fit(X, np.ones([len(X), 2]), 8, verbose=0, shuffle=False)
        return model

    ours = run(True)
    assert_same(ours.get_weights(), run(False).get_weights())
    with pytest.raises(ValueError, match="float8"):
        tf_gsnr.gradient_moments(ours, X, np.ones([len(X), 2]))


def test_words_are_measured_in_fit():
    """Of TextVectorization's output the number of rows is not known when a step is traced."""
    text = tf.constant(["a b", "b c d", "c", "d a a"] * 8)
    words = keras.layers.TextVectorization(output_sequence_length=4)
    words.adapt(text)
    model = keras.Sequential(
        [keras.Input([], dtype="string"), words, keras.layers.Embedding(8, 4)]
        + [keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    )
    model = tf_gsnr.GSNRModel(model)
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((text, np.eye(2)[[0, 1] * 16])).batch(8)
    history = model.fit(data, epochs=3, verbose=0).history
    assert np.isfinite(history["same_sign"]).all() and np.isfinite(history["gap_growth"]).all()
