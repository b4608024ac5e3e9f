"""gradient_moments: streaming, losses, bad input, and the model left as it was.

That the numbers are right for every kind of layer is tested engine by engine, against reference.py.
"""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_gsnr
from tf_gsnr.gradients import engines


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=[50, 4]).astype("float32"), rng.integers(0, 3, 50)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(tf.nest.flatten(a), tf.nest.flatten(b)):
        scale = np.abs(y).max() or 1.0
        np.testing.assert_allclose(x / scale, y / scale, atol=rtol)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_micro_batches_change_nothing(model, data, batch_size):
    whole = tf_gsnr.gradient_moments(model, *data, batch_size=1000, sign_counts=True)
    parts = tf_gsnr.gradient_moments(model, *data, batch_size=batch_size, sign_counts=True)
    assert parts.count == 50
    assert_close(parts, whole)


def test_the_ragged_end_is_not_retraced(model, data):
    traces = []

    def loss(y_true, y_pred):
        traces.append(1)
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred)

    counts = []
    for n in (50, 33, 41):
        tf_gsnr.gradient_moments(
            model, data[0][:n], data[1][:n], loss, batch_size=16, engine="vectorized"
        )
        counts.append(len(traces))
    assert len(set(counts)) == 1


def test_a_dataset_is_its_arrays(model, data):
    weights = np.linspace(0, 2, 50).astype("float32")
    arrays = tf_gsnr.gradient_moments(model, *data, sample_weight=weights, batch_size=16)
    for batch in (5, 16, 50):
        dataset = tf.data.Dataset.from_tensor_slices((*data, weights)).batch(batch)
        assert_close(tf_gsnr.gradient_moments(model, dataset, batch_size=16), arrays)


def test_the_mean_is_the_ordinary_gradient_with_sample_weights(model, data):
    weights = np.linspace(0, 2, 50).astype("float32")
    moments = tf_gsnr.gradient_moments(model, *data, sample_weight=weights)
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy()(data[1], model(data[0]), weights)
    assert_close(moments.mean, tape.gradient(loss, model.trainable_variables), 1e-6)
    assert moments.loss == pytest.approx(float(loss), rel=1e-6)


def test_float64_moments_of_a_float32_model(model, data):
    wide = tf_gsnr.gradient_moments(model, *data, batch_size=7, dtype="float64")
    assert {v.dtype for v in wide.mean + wide.m2} == {np.dtype("float64")}
    assert_close(wide, tf_gsnr.gradient_moments(model, *data))


@pytest.mark.parametrize("engine", sorted(engines.ENGINES))
def test_dropout_has_a_mask_per_example_and_a_seed(model, engine):
    same = np.ones([64, 4], "float32"), np.zeros(64, int)
    masked = dict(training=True, engine=engine)
    first = tf_gsnr.gradient_moments(model, *same, seed=1, **masked)
    assert all((v > 0).any() for v in first.m2)  # equal examples, different masks
    assert_close(tf_gsnr.gradient_moments(model, *same, seed=1, **masked), first, 0)
    other = tf_gsnr.gradient_moments(model, *same, seed=2, **masked)
    assert np.abs(other.mean[0] - first.mean[0]).max() > 0
    unmasked = tf_gsnr.gradient_moments(model, *same, engine=engine)
    assert max(v.max() for v in unmasked.m2) < 1e-10


@pytest.mark.parametrize("engine", sorted(engines.ENGINES))
def test_dropout_masks_are_those_of_the_ordinary_step(model, data, engine):
    found = tf_gsnr.gradient_moments(model, *data, training=True, engine=engine)
    seeds = [v.numpy() for v in model.non_trainable_variables]
    with tf.GradientTape() as tape:
        losses = keras.losses.sparse_categorical_crossentropy(
            data[1], model(data[0], training=True)
        )
        loss = tf.reduce_mean(losses)
    for variable, seed in zip(model.non_trainable_variables, seeds):
        variable.assign(seed)
    assert_close(found.mean, tape.gradient(loss, model.trainable_variables), 1e-6)


@pytest.mark.parametrize("engine", sorted(engines.ENGINES))
def test_the_model_is_left_as_it_was(data, engine):
    model = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(5),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )
    before = [v.numpy() for v in model.variables]
    attributes = [set(vars(layer)) for layer in model.layers]
    for options in ({}, {"training": True, "batch_norm": "frozen"}):
        loss = "sparse_categorical_crossentropy"
        tf_gsnr.gradient_moments(model, *data, loss, engine=engine, **options)
    for a, b in zip(before, model.variables):
        np.testing.assert_array_equal(a, b.numpy())
    assert attributes == [set(vars(layer)) for layer in model.layers]


CONVOLUTIONS = {
    "Conv1D": (layers.Conv1D(3, 3, strides=2), [9, 2]),
    "Conv2D": (layers.Conv2D(3, 3, padding="same", dilation_rate=2), [8, 7, 2]),
    "Conv2D groups": (layers.Conv2D(4, 3, groups=2), [6, 6, 2]),
    "Conv3D": (layers.Conv3D(3, 2), [4, 4, 4, 2]),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(3), [9, 2]),
    "DepthwiseConv2D": (layers.DepthwiseConv2D(3, depth_multiplier=2), [7, 7, 2]),
    "SeparableConv1D": (layers.SeparableConv1D(3, 3), [9, 2]),
    "SeparableConv2D": (layers.SeparableConv2D(3, 3), [7, 7, 2]),
    "Conv1DTranspose": (layers.Conv1DTranspose(3, 3, strides=2), [4, 2]),
    "Conv2DTranspose": (layers.Conv2DTranspose(3, 3, strides=2), [4, 4, 2]),
    "Conv3DTranspose": (layers.Conv3DTranspose(3, 2), [3, 3, 3, 2]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_no_loop_over_examples_is_left_for_convolutions(name):
    layer, shape = CONVOLUTIONS[name]
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(1)])
    measure = engines.build(model, "mse", engine="vectorized")
    traced = tf.function(measure, autograph=False).get_concrete_function(
        tf.TensorSpec([4, *shape]), tf.TensorSpec([4, 1])
    )
    graph = traced.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    assert not [n.name for n in nodes if "While" in n.op]


def test_an_op_without_vectorised_form_is_said_once_by_name(caplog):
    @keras.saving.register_keras_serializable("test")
    class Loops(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=[3])

        def call(self, x):
            return x * tf.raw_ops.Cumprod(x=1 + self.w[None] * x, axis=1)

    x = np.random.default_rng(0).uniform(size=[6, 3]).astype("float32")
    model = keras.Sequential([keras.Input([3]), Loops(), layers.Dense(1)])
    with caplog.at_level("WARNING"):
        for _ in range(2):
            tf_gsnr.gradient_moments(model, x, x[:, :1], "mse", engine="vectorized")
    said = [r.getMessage() for r in caplog.records if "no vectorised form" in r.getMessage()]
    assert len(said) <= 1 and all("runs in a loop over the examples" in s for s in said)


def test_batch_norm_in_training_mode(data):
    """Frozen unless told otherwise; a batch's statistics are refused where there is no batch."""
    model = keras.Sequential(
        [keras.Input([4]), layers.BatchNormalization(name="norm"), layers.Dense(3)]
    )
    y = np.zeros([50, 3], "float32")
    with pytest.raises(ValueError, match="norm.*layerwise.*frozen"):
        tf_gsnr.gradient_moments(
            model, data[0], y, "mse", training=True, batch_norm="batch", engine="vectorized"
        )
    inference = tf_gsnr.gradient_moments(model, data[0], y, "mse")
    for engine in engines.ENGINES:
        frozen = tf_gsnr.gradient_moments(model, data[0], y, "mse", training=True, engine=engine)
        assert_close(frozen, inference)


def test_randomness_that_all_examples_would_share_is_refused():
    class Noise(layers.Layer):
        def call(self, x):
            return x + keras.random.normal(tf.shape(x), seed=3)

    model = keras.Sequential([keras.Input([2]), Noise(), layers.Dense(1)])
    with pytest.raises(ValueError, match="SeedGenerator"):
        tf_gsnr.gradient_moments(
            model, np.ones([4, 2]), np.ones([4, 1]), "mse", engine="vectorized"
        )


def test_several_inputs_and_outputs_with_loss_weights(data):
    a, b = keras.Input([4], name="a"), keras.Input([2], name="b")
    hidden = layers.Dense(5, activation="tanh")(layers.Concatenate()([a, b]))
    model = keras.Model(
        {"a": a, "b": b},
        {"class": layers.Dense(3)(hidden), "value": layers.Dense(1)(hidden)},
    )
    losses = {
        "class": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "value": "mse",
    }
    model.compile("sgd", losses, loss_weights={"class": 2.0, "value": 0.5})
    x = {"a": data[0], "b": data[0][:, :2]}
    y = {"class": data[1], "value": data[0][:, :1]}
    moments = tf_gsnr.gradient_moments(model, x, y, batch_size=16)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x))
    assert_close(moments.mean, tape.gradient(loss, model.trainable_variables), 1e-6)


def test_masked_positions_count_as_keras_counts_them():
    tokens = np.array([[1, 2, 0, 0], [3, 1, 2, 4], [2, 0, 0, 0]])
    model = keras.Sequential(
        [keras.Input([4]), layers.Embedding(5, 3, mask_zero=True), layers.Dense(2)]
    )
    y = np.random.default_rng(0).normal(size=[3, 4, 2]).astype("float32")
    moments = tf_gsnr.gradient_moments(model, tokens, y, keras.losses.MeanSquaredError())
    per_example = []
    for n in range(3):
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(y[n : n + 1], model(tokens[n : n + 1]))
        per_example.append(
            [
                tf.convert_to_tensor(g).numpy()
                for g in tape.gradient(loss, model.trainable_variables)
            ]
        )
    assert_close(moments.mean, [np.mean(g, 0) for g in zip(*per_example)], 1e-6)
    assert_close(moments.variance(), [np.var(g, 0) for g in zip(*per_example)])


def test_the_cache_keeps_no_model_alive(data):
    model = keras.Sequential([keras.Input([4]), layers.Dense(3)])
    tf_gsnr.gradient_moments(model, data[0], data[0][:, :3], "mse")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def bad_inputs():
    x, y = np.ones([6, 4], "float32"), np.zeros(6, int)
    nan = np.where(np.arange(6)[:, None] == 4, np.nan, x).astype("float32")

    def dense():
        return keras.Sequential([keras.Input([4]), layers.Dense(3, activation="softmax")])

    compiled, frozen = dense(), dense()
    compiled.compile("sgd", "sparse_categorical_crossentropy")
    frozen.trainable = False
    infinite = tf.data.Dataset.from_tensors((x, y)).repeat()
    return {
        "engine": (compiled, x, y, dict(engine="fast"), "unknown engine 'fast'; available: auto"),
        "batch size": (compiled, x, y, dict(batch_size=0), "batch_size=0: expected a positive"),
        "xla": (compiled, x, y, dict(jit_compile="yes"), "jit_compile='yes': expected True"),
        "lengths": (compiled, x[:5], y, {}, r"differ in their number of examples: \[5, 6\]"),
        "no targets": (compiled, x, None, {}, "y=None: expected the targets"),
        "no examples": (compiled, x[:0], y[:0], {}, "no examples"),
        "infinite": (compiled, infinite, None, {}, "infinite.*take"),
        "y twice": (compiled, infinite.take(1), y, {}, "y and sample_weight come with it"),
        "label": (compiled, x, np.where(y == 0, 3, y), {}, "label of example 0 is 3.*0 to 2"),
        "nan": (compiled, nan, y, dict(batch_size=3), "loss of example 4 is not finite"),
        "not a loss": (compiled, x, y, dict(loss=3.0), "loss=3.0: expected a Keras loss"),
        "no loss": (dense(), x, y, {}, "not compiled with one"),
        "no variables": (frozen, x, y, dict(loss="mse"), "no trainable variables"),
        "unbuilt": (keras.Sequential([layers.Dense(3)]), x, y, dict(loss="mse"), "not built"),
        "not a model": (len, x, y, dict(loss="mse"), "expected a keras.Model"),
        "batch norm": (compiled, x, y, dict(batch_norm="no"), "unknown batch_norm 'no'; avail"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_named(case):
    model, x, y, options, message = bad_inputs()[case]
    options.setdefault("engine", "vectorized")
    with pytest.raises(ValueError, match=message):
        tf_gsnr.gradient_moments(model, x, y, **options)


def test_a_gradient_without_value_names_its_variable():
    model = keras.Sequential([keras.Input([1]), layers.Dense(1, name="root", use_bias=False)])
    with pytest.raises(ValueError, match="gradient of .*root/kernel is not finite"):
        tf_gsnr.gradient_moments(
            model, np.zeros([4, 1]), np.zeros([4, 1]), lambda a, b: tf.sqrt(tf.abs(b[:, 0]))
        )
