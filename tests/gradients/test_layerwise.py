"""The layer-wise engine against the float64 loop, the reference engine and the ordinary step."""

from pathlib import Path

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
import zoo

import tf_gsnr
from tf_gsnr.gradients import conservation, losses, network
from tf_gsnr.gradients.layerwise import convolution, dense_forms
from tf_gsnr.gradients.layerwise import engine as layerwise
from tf_gsnr.gradients.losses import per_example_loss
from tf_gsnr.gradients.vectorized import engine as vectorized

L = keras.layers
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
RECURRENT = {"lstm", "gru", "simple_rnn", "bidirectional", "masked_language"}


def measured(engine, model, x, y, **options):
    build = {"layerwise": layerwise.build, "vectorized": vectorized.build}[engine]
    measure = build(model, losses.of_batch(model, "mse"), sign_counts=True, **options)
    x, y = tf.nest.map_structure(tf.convert_to_tensor, (x, y))
    return tf.function(measure, autograph=False)(x, y)


def check(found, model, truth, dtype):
    for path, (mean, m2, signs) in reference.distances(model, found, truth).items():
        assert mean < TOLERANCE[dtype], path
        assert m2 < TOLERANCE[dtype], path
        assert signs == 0, path
    assert all((np.asarray(v) >= 0).all() for v in found.m2)


@pytest.fixture(scope="module")
def truths():
    """Each entry's true moments, computed once."""
    found = {}

    def of(name):
        if name not in found:
            model, x, y = zoo.make(name, "float64")
            loss_fn = per_example_loss("mse", model)
            found[name] = reference.moments(reference.per_example_gradients(model, loss_fn, x, y))
        return found[name]

    return of


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_layerwise_engine_is_right(name, dtype, truths):
    model, x, y = zoo.make(name, dtype)
    before = [np.array(v) for v in model.variables]
    found = measured("layerwise", model, x, y)
    check(found.moments, model, truths(name), dtype)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)
    for layer in network.layers(model):
        assert "call" not in vars(layer)


REFERENCE = [(name, "float64") for name in zoo.ZOO]
REFERENCE += [(name, "float32") for name in ("mlp", "conv2d", "transposed", "attention", "shared")]


@pytest.mark.parametrize("name, dtype", REFERENCE)
def test_reference_engine_is_right(name, dtype, truths):
    model, x, y = zoo.make(name, dtype)
    check(measured("vectorized", model, x, y).moments, model, truths(name), dtype)


def _recurrent(layer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3, 2)), layer, L.Dense(1)])
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(4, 3, 2)).astype("float32"), rng.normal(size=(4, 1))


@pytest.mark.parametrize(
    "make, training",
    [
        (lambda: L.SimpleRNN(2), False),
        (lambda: L.Bidirectional(L.LSTM(1)), False),
        (lambda: L.GRU(2, dropout=0.3), True),
    ],
)
def test_engines_agree_on_recurrent_layers(make, training):
    model, x, y = _recurrent(make())
    a, b = (measured(e, model, x, y, training=training) for e in ("layerwise", "vectorized"))
    for one, other in zip(tf.nest.flatten(a.moments), tf.nest.flatten(b.moments)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["Conv1D", "Conv2D", "Conv3D", "DepthwiseConv2D", "BatchNorm"])
def test_channels_first(layer):
    """The rule turns channels first into channels last: TensorFlow cannot run it on a CPU."""
    from tf_gsnr.gradients.layerwise import capture, rules

    rank = int(layer[-2]) if layer[-1] == "D" else 2
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, *(7, 6, 5)[:rank], 2)).astype("float32")

    def made(data_format):
        keras.utils.set_random_seed(0)
        if layer == "BatchNorm":
            return L.BatchNormalization(axis=1 if data_format == "channels_first" else -1)
        size = dict(kernel_size=3) if layer.startswith("Depth") else dict(filters=3, kernel_size=3)
        return getattr(L, layer)(**size, padding="same", data_format=data_format)

    def gradients(one, x, dz):
        unit = capture.Unit(one, tuple(one.trainable_variables))
        call = capture.Call(unit, (tf.constant(x),), {}, None, 4, [], dz=tf.constant(dz))
        return [form.materialise() for _, form in rules.rule_of(one).function(call)]

    last, first = made("channels_last"), made("channels_first")
    last.build(x.shape)
    dz = rng.normal(size=last.compute_output_shape(x.shape)).astype("float32")
    to_first = [0, rank + 1, *range(1, rank + 1)]
    first.build(x.transpose(to_first).shape)
    expected = gradients(last, x, dz)
    for a, b in zip(expected, gradients(first, x.transpose(to_first), dz.transpose(to_first))):
        np.testing.assert_allclose(a, b, atol=1e-4)


def dropout_model():
    keras.utils.set_random_seed(1)
    layers = [
        L.Dense(8, activation="relu"),
        L.Dropout(0.4),
        L.Conv1D(4, 2),
        L.BatchNormalization(),
        L.GaussianNoise(0.3),
        L.Flatten(),
        L.Dense(2),
    ]
    model = keras.Sequential([keras.Input((4, 3)), *layers])
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(6, 4, 3)).astype("float32"), rng.normal(size=(6, 2))


def ordinary_gradient(model, x, y, sample_weight=None):
    """What a training step differentiates, at the model's present seeds."""
    state = [(v, tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables]
    loss_fn = per_example_loss("mse", model)
    with tf.GradientTape() as tape, keras.StatelessScope(state_mapping=state):
        loss = tf.reduce_mean(loss_fn(y, model(x, training=True), sample_weight))
    return [
        np.asarray(g) for g in tape.gradient(loss, [v.value for v in model.trainable_variables])
    ]


@pytest.mark.parametrize("weights", [None, np.array([1, 0, 2, 0.5, 1, 3.0])])
def test_mean_is_the_gradient_of_training(weights):
    """With dropout, train-mode batch norm and sample weights; the moving statistics stay."""
    model, x, y = dropout_model()
    y = y.astype("float32")
    before = [np.array(v) for v in model.variables]
    expected = ordinary_gradient(model, x, y, weights)
    largest = max(np.abs(g).max() for g in expected)
    moments = tf_gsnr.gradient_moments(
        model, x, y, "mse", sample_weight=weights, training=True, batch_norm="batch"
    )
    for variable, mean, truth in zip(model.trainable_variables, moments.mean, expected):
        scale = max(np.abs(truth).max(), largest)  # a bias before batch norm has only rounding
        assert np.abs(mean - truth).max() < 1e-6 * scale, variable.path
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)


def test_engines_agree_with_dropout():
    model, x, y = dropout_model()
    options = dict(training=True, batch_norm="frozen")
    a = measured("layerwise", model, x, y, **options)
    b = measured("vectorized", model, x, y, **options)
    for one, other in zip(tf.nest.flatten(a.moments), tf.nest.flatten(b.moments)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_batch_statistics_are_not_padded():
    """The ragged end is a batch of its own size."""
    model, x, y = dropout_model()
    moments = tf_gsnr.gradient_moments(
        model, x, y, "mse", training=True, batch_norm="batch", batch_size=4, seed=0
    )
    assert moments.count == 6 and all(np.isfinite(v).all() for v in moments.m2)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_padding_and_micro_batches_do_not_count(batch_size):
    model, x, y = zoo.make("simple_rnn" if batch_size == 3 else "conv2d_wide")
    whole = tf_gsnr.gradient_moments(model, x, y, "mse", sign_counts=True)
    parts = tf_gsnr.gradient_moments(
        model, x, y, "mse", sign_counts=True, batch_size=batch_size, engine="layerwise"
    )
    for a, b in zip(tf.nest.flatten(whole), tf.nest.flatten(parts)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_nearly_equal_examples(spread):
    """GSNR up to 1e10: the difference of large sums would have no digit left."""
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((4,)), L.Dense(5, activation="tanh"), L.Dense(2)])
    x = (1 + spread * rng.normal(size=(64, 4))).astype("float32")
    y = np.full((64, 2), 3.0, "float32")
    found = measured("layerwise", model, x, y).moments
    truth = measured("vectorized", model, x, y).moments
    for a, b in zip(found.m2, truth.m2):
        assert (np.asarray(a) >= 0).all()
        np.testing.assert_allclose(a, b, atol=1e-2 * np.max(b) + 1e-11)


def test_identical_examples_have_no_spread():
    model = keras.Sequential([keras.Input((4,)), L.Dense(5, activation="tanh"), L.Dense(2)])
    found = measured("layerwise", model, np.ones((7, 4), "float32"), np.ones((7, 2), "float32"))
    for mean, m2 in zip(found.moments.mean, found.moments.m2):
        assert np.max(m2) <= 1e-12 * np.max(np.square(mean)) + 1e-30


class Tied(keras.Model):
    """The embedding is the output matrix, too, by a plain product outside its own call."""

    def __init__(self):
        super().__init__()
        self.table = L.Embedding(9, 4)
        self.hidden = L.Dense(4, activation="tanh")

    def call(self, ids):
        return self.hidden(self.table(ids)) @ keras.ops.transpose(self.table.embeddings)


class Positions(L.Layer):
    """Its output has no axis of examples."""

    def build(self, shape):
        self.table = self.add_weight(name="table", shape=shape[1:])

    def call(self, x):
        return 1.0 * self.table


def with_positions():
    x = keras.Input((3, 4))
    h = L.Dense(4)(x)
    h = L.Flatten()(L.Activation("tanh")(h + Positions(name="positions")(h)))
    return keras.Model(x, L.Dense(2)(h))


def time_first():
    """Rows in another order than the examples."""
    x = keras.Input((3, 4))
    turn = L.Lambda(lambda v: keras.ops.reshape(keras.ops.transpose(v, (1, 0, 2)), (-1, 4)))
    back = L.Lambda(lambda v: keras.ops.transpose(keras.ops.reshape(v, (3, -1, 4)), (1, 0, 2)))
    h = back(L.Dense(4, name="mixed")(turn(x)))
    return keras.Model(x, L.Dense(2)(L.Flatten()(L.Activation("tanh")(h))))


@pytest.mark.parametrize(
    "make,name",
    [(Tied, "embeddings"), (with_positions, "positions"), (time_first, "mixed")],
)
def test_what_is_not_conserved_is_refused_or_goes_to_the_reference(make, name):
    keras.utils.set_random_seed(0)
    model, rng = make(), np.random.default_rng(0)
    if make is Tied:
        x = rng.integers(0, 9, size=(6, 5))
        model(x)
        y = rng.normal(size=(6, 5, 9))
    else:
        x, y = rng.normal(size=(6, 3, 4)).astype("float32"), rng.normal(size=(6, 2))
    with pytest.raises(conservation.NotConserved, match=name):
        tf_gsnr.gradient_moments(model, x, y, "mse", engine="layerwise")
    auto = tf_gsnr.gradient_moments(model, x, y, "mse")
    truth = reference.moments(
        reference.per_example_gradients(model, per_example_loss("mse", model), x, y)
    )
    for mean, m2, _ in reference.distances(model, auto, truth).values():
        assert max(mean, m2) < 1e-4


def test_nothing_is_left_behind_by_a_failure():
    class Broken(L.Dense):
        def call(self, inputs, training=None):
            if keras.backend.is_keras_tensor(inputs):
                return super().call(inputs)
            raise RuntimeError("broken on purpose")

    model = keras.Sequential([keras.Input((3,)), L.Dense(2, activation="tanh"), Broken(2)])
    activation = model.layers[0].activation
    with pytest.raises(RuntimeError, match="on purpose"):
        tf_gsnr.gradient_moments(model, np.ones((4, 3)), np.ones((4, 2)), "mse")
    assert model.layers[0].activation is activation
    assert not any("call" in vars(layer) for layer in model.layers)


# One of each form and route; all others but the recurrent layers compile as well.
XLA = ["mlp", "conv2d_wide", "conv2d_grouped", "transposed", "separable", "embedding"]
XLA += ["attention", "layer_norm", "batch_norm", "folded", "custom"]


@pytest.mark.parametrize("name", XLA)
def test_xla(name, truths):
    model, x, y = zoo.make(name)
    measure = layerwise.build(model, losses.of_batch(model, "mse"), sign_counts=True)
    x, y = tf.nest.map_structure(tf.convert_to_tensor, (x, y))
    found = tf.function(measure, autograph=False, jit_compile=True)(x, y)
    check(found.moments, model, truths(name), "float32")


def test_saved_model_loads_without_the_package(tmp_path):
    model, x, y = zoo.make("mlp")
    measured("layerwise", model, x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


def test_recalibrate():
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((3,)), L.Dense(4), L.BatchNormalization(), L.Dense(3, activation="tanh")]
    )
    model.add(L.BatchNormalization())
    x, y = rng.normal(1, 3, size=(50, 3)).astype("float32"), rng.normal(size=(50, 3))
    before = [np.array(v) for v in model.variables]
    found = tf_gsnr.gradient_moments(model, x, y, "mse", recalibrate=True, batch_size=16)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)
    h = x
    for layer in model.layers:  # by hand
        if isinstance(layer, L.BatchNormalization):
            layer.moving_mean.assign(np.mean(h, 0))
            layer.moving_variance.assign(np.var(h, 0))
        h = layer(h, training=False) if isinstance(layer, L.BatchNormalization) else layer(h)
    expected = tf_gsnr.gradient_moments(model, x, y, "mse")
    for a, b in zip(found.m2, expected.m2):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    with pytest.raises(ValueError, match="recalibrate=True"):
        tf_gsnr.gradient_moments(
            model, x, y, "mse", recalibrate=True, training=True, batch_norm="batch"
        )


def test_explain_and_check_engine():
    model, x, y = zoo.make("custom")
    routes = {row["class"]: row["route"] for row in tf_gsnr.explain(model)}
    assert routes == {"Mixer": "fallback", "Dense": "dense"}
    table = tf_gsnr.check_engine(model, x, y, "mse")
    assert [row["variable"] for row in table] == [v.path for v in model.trainable_variables]
    assert max(row["variance"] for row in table) < 1e-5
    assert "fallback" in str(table)


@pytest.mark.parametrize("name", ["conv2d_wide", "dense_sequence", "mlp", "shared_convolution"])
def test_blocks(name, truths, monkeypatch):
    """What does not fit into one block is taken apart; the result is the same."""
    monkeypatch.setattr(dense_forms, "BLOCK_BYTES", 200)
    model, x, y = zoo.make(name)
    check(measured("layerwise", model, x, y).moments, model, truths(name), "float32")


def test_norms_of_every_form():
    """Each example's squared norm, from the same form."""
    from tf_gsnr.gradients.layerwise import forms

    rng = np.random.default_rng(0)
    made = [
        forms.Rows(rng.normal(size=(4, 3, 2)), (3, 2), "float64"),
        forms.Outer(
            tf.constant(rng.normal(size=(4, 3))),
            tf.constant(rng.normal(size=(4, 2))),
            (3, 2),
            "float64",
        ),
        forms.Outer(
            tf.constant(rng.normal(size=(4, 5, 3))),
            tf.constant(rng.normal(size=(4, 5, 2))),
            (3, 2),
            "float64",
        ),
        forms.Sparse(
            rng.integers(0, 3, size=(4, 5)),
            tf.constant(rng.normal(size=(4, 5, 2))),
            (3, 2),
            "float64",
        ),
    ]
    made.append(forms.add(made[:2]))
    made.append(forms.add(made[1:3]))
    for form in made:
        g = np.asarray(form.materialise())
        np.testing.assert_allclose(form.square_norms(), np.square(g).sum((1, 2)))
        np.testing.assert_allclose(form.total(), g.sum(0))


def test_adding_a_rule_as_documented():
    """Runs the code of docs/adding_a_rule.md."""
    from tf_gsnr.gradients.layerwise import rules

    text = (Path(__file__).parents[2] / "docs" / "adding_a_rule.md").read_text()
    space = {}
    exec(text.split("```python")[1].split("```")[0], space)
    try:
        model = keras.Sequential([keras.Input((5, 3)), space["Scale"](), L.Flatten(), L.Dense(2)])
        assert {row["route"] for row in tf_gsnr.explain(model)} == {"scale", "dense"}
        rng = np.random.default_rng(0)
        table = tf_gsnr.check_engine(
            model, rng.normal(size=(6, 5, 3)).astype("float32"), rng.normal(size=(6, 2)), "mse"
        )
        assert max(row["variance"] for row in table) < 1e-5
    finally:
        rules._RULES.pop(space["Scale"])


def test_a_wrong_rule_is_refused():
    from tf_gsnr.gradients.layerwise import forms, rules

    class Own(L.Dense):
        def call(self, x, training=None):
            return super().call(x) * 2

    @rules.register_rule(Own)
    def wrong(call):
        return [(call.layer.kernel, forms.outer(call, call.x, call.dz, call.layer.kernel))]

    try:
        model = keras.Sequential([keras.Input((3,)), Own(2)])
        with pytest.raises(conservation.NotConserved, match="accounts for .*bias"):
            tf_gsnr.gradient_moments(
                model, np.ones((4, 3)), np.ones((4, 2)), "mse", engine="layerwise"
            )
    finally:
        rules._RULES.pop(Own)


class OtherwiseAlone(keras.Model):
    """Gives a single example another output than it has in a batch."""

    def __init__(self):
        super().__init__()
        self.out = L.Dense(2)

    def call(self, x):
        return self.out(x) * (2.0 if x.shape[0] == 1 else 1.0)


class Noisy(L.Dropout):
    def call(self, x):
        return super().call(x, training=True)


def test_a_wrong_reference_is_refused(monkeypatch):
    """The reference engine, too, is compared with the ordinary gradient, unless that is random."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[12, k]).astype("float32") for k in (5, 2))
    otherwise = OtherwiseAlone()
    otherwise(x)
    with pytest.raises(conservation.NotConserved, match="otherwise than a batch"):
        tf_gsnr.gradient_moments(otherwise, x, y, "mse", engine="vectorized")
    noisy = keras.Sequential([keras.Input([5]), Noisy(0.5), L.Dense(2)])
    assert tf_gsnr.gradient_moments(noisy, x, y, "mse", engine="vectorized").count == 12
    images = rng.normal(size=[12, 6, 6, 3]).astype("float32")
    conv = keras.Sequential([keras.Input([6, 6, 3]), L.Conv2D(4, 3), L.Flatten(), L.Dense(2)])
    right = convolution._stacked_planes  # of both engines
    monkeypatch.setattr(convolution, "_stacked_planes", lambda *v: 1.01 * right(*v))
    with pytest.raises(conservation.NotConserved, match="conv2d.*kernel, to the ordinary"):
        tf_gsnr.gradient_moments(conv, images, y, "mse")


def test_register_rule_wants_a_layer_class():
    with pytest.raises(TypeError, match="keras.layers.Layer"):
        tf_gsnr.register_rule(3)


@pytest.mark.parametrize("engine", [layerwise, vectorized], ids=["layerwise", "vectorized"])
def test_xla_takes_no_data_for_constant(engine):
    """Else it compiles anew at every call: data and weights are parameters of the program."""
    model = keras.Sequential([keras.Input([5]), keras.layers.Dense(3, "relu")])
    loss = losses.of_batch(model, keras.losses.MeanSquaredError())
    measure = engine.build(model, loss)

    @tf.function(autograph=False, jit_compile=True)
    def moments(x, y):
        found = measure(x, y).moments
        return found.mean, found.m2

    program = moments.experimental_get_compiler_ir(tf.ones([4, 5]), tf.ones([4, 3]))(stage="hlo")
    entry = program[program.index("ENTRY") :]
    assert sum(" parameter(" in line for line in entry.splitlines()) == 4  # x, y, kernel, bias


class TwoOutputs(L.Layer):
    """The second output is computed from the first."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        logits = keras.ops.matmul(x, self.kernel)
        return logits, keras.ops.softmax(logits)


def both(outputs):
    return L.Concatenate()([L.Flatten()(z) for z in outputs])


OF_TWO = {
    "scores": lambda x: both(L.Attention(use_scale=True)([x, x], return_attention_scores=True)),
    "unrolled": lambda x: both(L.LSTM(3, unroll=True, return_state=True)(x)),
    "own": lambda x: both(TwoOutputs()(x)),
    "same": lambda x: both([z for z in [L.Dense(3)(x)] for _ in range(2)]),
    "inner axis": lambda x: L.RMSNormalization(axis=1)(x),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_outputs_that_come_from_each_other(name):
    """A gradient that is in both is counted once."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4, 4])
    model = keras.Model(inputs, L.Dense(1)(L.Flatten()(OF_TWO[name](L.Dense(4)(inputs)))))
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * np.random.default_rng(1).normal(size=variable.shape))
    x, y = np.random.default_rng(0).normal(size=[2, 7, 4, 4]).astype("float32")
    table = tf_gsnr.check_engine(model, x, y[:, 0, :1], "mse")
    assert max(max(row["mean"], row["variance"]) for row in table) < 1e-4
    tf_gsnr.gradient_moments(model, x, y[:, 0, :1], "mse", engine="layerwise")


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_few_examples_in_two_orders(n):
    keras.utils.set_random_seed(0)
    inputs, dense = keras.Input([4]), L.Dense(3, "tanh")
    turned = keras.ops.flip(dense(keras.ops.flip(2 * inputs, axis=0)), axis=0)
    model = keras.Model(inputs, dense(inputs) * turned)
    x, y = np.random.default_rng(0).normal(size=[2, n, 4]).astype("float32")
    found = tf_gsnr.gradient_moments(model, x, y[:, :3], "mse")
    truth = tf_gsnr.gradient_moments(model, x, y[:, :3], "mse", engine="vectorized")
    for a, b in zip(found.m2, truth.m2):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lora", [None, 2])
def test_float64_measured_in_float32(lora):
    keras.config.set_dtype_policy("float64")
    try:
        model = keras.Sequential([keras.Input([4]), L.Dense(3, lora_rank=lora)])
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = np.random.default_rng(0).normal(size=[2, 20, 4])
    assert tf_gsnr.gradient_moments(model, x, y[:, :3], "mse", dtype="float32").count == 20
    assert tf_gsnr.gradient_moments(model, x, y[:, :3], "mse").count == 20
