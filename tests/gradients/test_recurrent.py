"""Recurrent layers, of any length and with dropout, against the loop over single examples."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from tf_gsnr.gradients import losses, network
from tf_gsnr.gradients.layerwise import cell_rules
from tf_gsnr.gradients.layerwise import engine as layerwise
from tf_gsnr.gradients.losses import per_example_loss
from tf_gsnr.gradients.vectorized import engine as vectorized

L = keras.layers
TOLERANCE = {"float64": 1e-8, "float32": 1e-5}
DROPOUT = dict(dropout=0.4, recurrent_dropout=0.3)


def built(
    make, *, steps=5, features=(2,), n=3, batch=None, dtype="float64", policy=None, masked=False
):
    """`(model, x, y)`: what `make()` returns, called on a sequence, and a dense head."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(policy or dtype)
    try:
        keras.utils.set_random_seed(0)
        rng = np.random.default_rng(0)
        inputs = keras.Input((steps, *features), batch_size=batch)
        h = make()(L.Masking()(inputs) if masked else inputs)
        size = h.shape[1:]
        h = L.GlobalAveragePooling1D()(h) if None in size else L.Reshape((-1,))(h)
        model = keras.Model(inputs, L.Dense(2)(h))
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])
    for variable in model.trainable_variables:
        variable.assign(rng.uniform(-0.8, 0.8, size=variable.shape))
    x = rng.normal(size=(n, steps or 5, *features)).astype(dtype)
    if masked:
        x[0, 3:], x[1, 1], x[2, 0] = 0, 0, 0
    return model, tf.constant(x), tf.constant(rng.normal(size=(n, 2)).astype(dtype))


def measured(model, x, y, *, build=layerwise.build, training=False, unknown=0):
    """What an engine makes of the batch, in a graph; `unknown` leading sizes are not known."""
    measure = build(model, losses.of_batch(model, "mse"), training=training)
    specs = [
        tf.TensorSpec([None] * min(unknown, k) + v.shape[min(unknown, k) :], v.dtype)
        for v, k in ((x, 2), (y, 1))
    ]
    return tf.function(measure, autograph=False, input_signature=specs)(x, y)


def check(model, x, y, *, training=False, together=None, **kwargs):
    """The engine against the loop, and the model as it was before."""
    before = [np.asarray(v) for v in model.variables]
    found = measured(model, x, y, training=training, **kwargs)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)
    for layer in network.layers(model):
        assert not {"call", "inner_loop", "get_dropout_mask"} & set(vars(layer))
    compare(model, found, x, y, training if together is None else together)
    return found


def compare(model, found, x, y, training):
    loss = per_example_loss("mse", model)
    truth = reference.per_example_gradients(model, loss, x, y, training=training)
    distances = reference.distances(model, found.moments, reference.moments(truth))
    for path, (mean, m2, _) in distances.items():
        assert max(mean, m2) < TOLERANCE[x.dtype.name], (path, mean, m2)


def _rnn(*cells, **kwargs):
    return L.RNN(L.StackedRNNCells(cells) if len(cells) > 1 else cells[0], **kwargs)


LAYERS = {
    "lstm": lambda: L.LSTM(3, return_sequences=True, go_backwards=True),
    "lstm_bare": lambda: L.LSTM(3, use_bias=False, implementation=1, recurrent_activation="relu"),
    "lstm_unrolled": lambda: L.LSTM(3, unroll=True, activation="relu"),
    "gru": lambda: L.GRU(3, return_sequences=True, use_cudnn=False),
    "gru_before": lambda: L.GRU(3, reset_after=False, go_backwards=True),
    "gru_bare": lambda: L.GRU(3, use_bias=False, implementation=1),
    "simple": lambda: L.SimpleRNN(3, activation=None, return_sequences=True),
    "stack": lambda: _rnn(L.LSTMCell(3), L.GRUCell(2), L.SimpleRNNCell(2), return_sequences=True),
}
DROPPING = {
    "lstm": lambda: L.LSTM(3, return_sequences=True, **DROPOUT),
    "lstm_inputs": lambda: L.LSTM(3, dropout=0.4),
    "lstm_inputs_gates": lambda: L.LSTM(3, dropout=0.4, implementation=1, use_cudnn=False),
    "gru": lambda: L.GRU(3, **DROPOUT),
    "gru_before": lambda: L.GRU(3, reset_after=False, return_sequences=True, **DROPOUT),
    "simple": lambda: L.SimpleRNN(3, **DROPOUT),
    "stack": lambda: _rnn(L.LSTMCell(3, **DROPOUT), L.GRUCell(2, dropout=0.4)),
    "bidirectional": lambda: L.Bidirectional(L.GRU(2, return_sequences=True, dropout=0.4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check(*built(LAYERS[name]))


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_draws_what_the_batch_draws(name):
    check(*built(DROPPING[name], masked=name == "stack"), training=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.LSTM(3, return_sequences=True),
        lambda: L.GRU(3, go_backwards=True),
        lambda: L.SimpleRNN(2, zero_output_for_mask=True),
        lambda: L.Bidirectional(L.LSTM(2, return_sequences=True)),
        lambda: L.LSTM(
            2, return_sequences=True, zero_output_for_mask=True, unroll=True, go_backwards=True
        ),
    ],
)
def test_masks(make):
    check(*built(make, masked=True))


@pytest.mark.parametrize("steps", [3, 20, 200, None])
def test_any_length(steps):
    model, x, y = built(lambda: L.LSTM(2, **DROPOUT), steps=steps, n=2, dtype="float32")
    check(model, x, y, training=True, unknown=2 if steps is None else 1)


def test_unknown_length_with_masks_and_sequences():
    check(
        *built(lambda: L.GRU(2, return_sequences=True, go_backwards=True), steps=None, masked=True),
        unknown=2,
    )


def test_the_graph_does_not_grow_with_the_length():
    def operations(steps):
        model, x, y = built(lambda: L.LSTM(2, **DROPOUT), steps=steps)
        measure = layerwise.build(model, losses.of_batch(model, "mse"), training=True)
        graph = tf.function(measure, autograph=False).get_concrete_function(x, y).graph
        library = graph.as_graph_def().library.function
        return len(graph.get_operations()) + sum(len(f.node_def) for f in library)

    assert operations(20) == operations(7)


def test_states_in_and_out():
    def encoder_decoder(x):
        h, *states = L.LSTM(2, return_sequences=True, return_state=True)(x)
        state = L.Concatenate()(states)
        h = L.GRU(4, return_sequences=True)(h, initial_state=state)
        last, final = L.SimpleRNN(2, return_state=True)(h)
        return L.Concatenate()([last, final, *states])

    check(*built(lambda: encoder_decoder))


def test_states_that_are_kept():
    model, x, y = built(lambda: L.LSTM(2, stateful=True, return_sequences=True), batch=3)
    for variable in model.non_trainable_variables:
        if "state" in variable.path and variable.dtype == "float64":
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    check(model, x, y, together=True)
    model(x)
    found = measured(model, x, y, build=vectorized.build)
    compare(model, found, x, y, training=True)


def test_one_layer_used_twice():
    def twice():
        layer = L.LSTM(2, return_sequences=True, dropout=0.4)
        return lambda x: layer(layer(x))

    check(*built(twice), training=True)


class AlwaysDropping(L.Wrapper):
    def call(self, x):
        return self.layer(x, training=True)


def test_dropout_in_inference_mode():
    """Monte-Carlo dropout: `training=True` inside of the model."""

    check(*built(lambda: AlwaysDropping(L.LSTM(2, **DROPOUT))), together=True)


@pytest.mark.parametrize("name", ["time_distributed", "folded"])
def test_several_rows_of_an_example(name):
    def folded(x):
        layer = L.GRU(2, dropout=0.4)
        rows = L.Lambda(lambda v: keras.ops.reshape(v, (-1, 4, 2)), output_shape=(4, 2))(x)
        h = layer(rows)
        return L.Lambda(lambda v: keras.ops.reshape(v, (-1, 5, 2)), output_shape=(5, 2))(h)

    def make():
        return folded if name == "folded" else L.TimeDistributed(L.GRU(2, dropout=0.4))

    check(*built(make, features=(4, 2)), training=True)


def test_eagerly():
    model, x, y = built(lambda: L.LSTM(2, **DROPOUT), masked=True)
    found = layerwise.build(model, losses.of_batch(model, "mse"), training=True)(x, y)
    compare(model, found, x, y, training=True)


def test_weights_that_a_scope_around_gives():
    model, x, y = built(lambda: L.GRU(2))
    measure = layerwise.build(model, losses.of_batch(model, "mse"))
    weights = [tf.convert_to_tensor(2 * v.value) for v in model.trainable_variables]
    with keras.StatelessScope(state_mapping=list(zip(model.trainable_variables, weights))):
        given = measure(x, y)
    for variable, value in zip(model.trainable_variables, weights):
        variable.assign(value)
    for one, other in zip(tf.nest.flatten(given.moments), tf.nest.flatten(measure(x, y).moments)):
        np.testing.assert_allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    def make():
        layer = L.LSTM(3, return_sequences=True, **DROPOUT)
        return lambda x: L.GRU(2)(layer(x))

    model, x, y = built(make, dtype="float32", policy=policy)
    found = measured(model, x, y, training=True)
    state = [(v, tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables]
    with tf.GradientTape() as tape, keras.StatelessScope(state_mapping=state):
        loss = tf.reduce_mean(tf.square(tf.cast(model(x, training=True), y.dtype) - y))
    theirs = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for a, b in zip(found.moments.mean, theirs):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("by_rule", [True, False])
def test_convolutional(by_rule, monkeypatch):
    """By the rule, and as any other cell."""
    if not by_rule:
        monkeypatch.setattr(cell_rules, "_RULES", {})

    def make():
        return L.ConvLSTM2D(2, 2, return_sequences=True, strides=2, padding="same", **DROPOUT)

    check(*built(make, steps=3, features=(5, 4, 2)), training=True)


def test_convolutional_in_one_dimension():
    check(*built(lambda: L.ConvLSTM1D(6, 2, dilation_rate=2), steps=3, features=(5, 5)))


def test_convolutional_of_unknown_length():
    check(*built(lambda: L.ConvLSTM1D(2, 2), steps=None, features=(4, 2)), unknown=2)


class NormalizedCell(L.Layer):
    """A cell of one's own, with a layer inside."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.state_size = units
        self.dense, self.norm = L.Dense(units), L.LayerNormalization()

    def build(self, shape):
        self.gain = self.add_weight(shape=(), initializer="ones")
        self.dense.build((None, shape[-1] + self.state_size))
        self.norm.build((None, self.state_size))

    def call(self, x, states):
        h = self.dense(keras.ops.concatenate([x, states[0]], -1))
        h = keras.ops.tanh(self.norm(h) * self.gain)
        return h, h  # one state, as it is


class ResidualCell(L.LSTMCell):
    """Keras's cell with another `call`: its rule must not be applied."""

    def call(self, inputs, states, training=False):
        h, states = super().call(keras.ops.square(inputs), states, training=training)
        return h + inputs, states


@pytest.mark.parametrize("cell", [NormalizedCell, lambda u: ResidualCell(u, **DROPOUT)])
def test_cells_of_the_user(cell):
    check(*built(lambda: _rnn(cell(2), return_sequences=True), masked=True), training=True)


class NoisyCell(NormalizedCell):
    """A cell that draws at every step."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, x, states):
        return super().call(keras.random.dropout(x, 0.4, seed=self.seed_generator), states)


def test_a_cell_that_draws_at_every_step_is_refused():
    model, x, y = built(lambda: _rnn(NoisyCell(2), name="noisy"))
    with pytest.raises(NotImplementedError, match="'noisy'.*at every step.*Put a Dropout layer"):
        measured(model, x, y, training=True)
    for layer in network.layers(model):
        assert not {"call", "inner_loop"} & set(vars(layer))


class OwnLoop(L.LSTM):
    """A layer with a loop of its own: the fallback runs all of it for each example."""

    def inner_loop(self, sequences, initial_state, mask, training=False):
        return super().inner_loop(2 * sequences, initial_state, mask, training=training)


@pytest.mark.parametrize("kwargs", [{}, DROPOUT])
def test_loops_of_the_user(kwargs):
    """With dropout the whole batch runs for each example, so that the masks are the batch's."""
    check(*built(lambda: OwnLoop(2, **kwargs)), training=True)


class Scaled(L.LSTM):
    """A layer that does something before its loop and after it."""

    def call(self, sequences, initial_state=None, mask=None, training=False):
        h = super().call(2 * sequences, initial_state, mask, training=training)
        return keras.ops.square(h)


def test_calls_of_the_user():
    check(*built(lambda: Scaled(2, **DROPOUT)), training=True)


@pytest.mark.parametrize("training", [False, True])
def test_reference_engine(training):
    model, x, y = built(lambda: L.Bidirectional(L.LSTM(2, dropout=0.4)), steps=20)
    assert network.has_loops(model)
    found = measured(model, x, y, build=vectorized.build, training=training)
    compare(model, found, x, y, training)


def test_what_has_no_loops():
    assert not network.has_loops(keras.Sequential([keras.Input((3,)), L.Dense(2)]))
