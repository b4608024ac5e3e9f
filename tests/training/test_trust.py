"""What is promised: Keras's own training; a name for what is not measured; nothing left behind."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[48, 6]).astype("float32")
Y = RNG.normal(size=[48, 1]).astype("float32")


class NowAndThen(keras.Model):
    """Uses a kernel outside its layer where a feature is not zero."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = L.Dense(6), L.Dense(1)

    def call(self, x):
        hidden = self.hidden(x)
        outside = x[:, 5:] * (x @ keras.ops.transpose(self.hidden.kernel))
        return self.out(hidden + outside)


def trained(make, wrap, loss="mse", x=X, y=Y, **kwargs):
    keras.utils.set_random_seed(0)
    model = make()
    model(x[:1])
    model = tf_gsnr.GSNRModel(model) if wrap else model
    model.compile(keras.optimizers.SGD(0.02), loss)
    model.fit(x, y, **dict(batch_size=8, epochs=6, shuffle=False, verbose=0) | kwargs)
    return model


def test_a_variable_that_is_used_outside_its_layer_on_later_batches_only(caplog):
    """Training does not depend on what was found on the first batch, and it is found out."""
    x = X.copy()
    x[:32, 5] = 0
    with caplog.at_level("WARNING"):
        plain, ours = (trained(NowAndThen, wrap, x=x) for wrap in (False, True))
    for a, b in zip(plain.get_weights(), ours.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)
    said = [r.getMessage() for r in caplog.records if "not measured" in r.getMessage()]
    assert len(said) == 1 and "kernel" in said[0] and "outside" in said[0]


def dense():
    return keras.Sequential([keras.Input([6]), L.Dense(4, "tanh", name="hidden"), L.Dense(2)])


def ranked(y_true, y_pred):
    """Each pair of examples in the order of their targets."""
    wanted = tf.sign(y_true - tf.transpose(y_true))
    given = y_pred[:, :1] - tf.transpose(y_pred[:, :1])
    return tf.reduce_mean(tf.nn.softplus(-wanted * given), axis=-1)


class Spread(L.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


def centred():
    return keras.Sequential([keras.Input([6]), L.Dense(4), Spread(name="spread"), L.Dense(2)])


@pytest.mark.parametrize(
    "make, loss, name", [(dense, ranked, "ranked"), (centred, "mse", "spread")]
)
def test_examples_that_act_on_each_other(make, loss, name, caplog):
    """`fit` trains and says so, once; moments are refused, unless contributions are asked for."""
    with caplog.at_level("WARNING"):
        plain, ours = (trained(make, wrap, loss, epochs=2) for wrap in (False, True))
    for a, b in zip(plain.get_weights(), ours.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)
    said = [r.getMessage() for r in caplog.records if "act on each other" in r.getMessage()]
    assert len(said) == 1 and name in said[0]
    with pytest.raises(ValueError, match=f"'{name}'.*act on each other.*contributions=True"):
        tf_gsnr.gradient_moments(plain, X, Y)
    found = tf_gsnr.gradient_moments(plain, X, Y, contributions=True)
    with tf.GradientTape() as tape:
        value = plain.compute_loss(X, Y, plain(X))
    for mean, truth in zip(found.mean, tape.gradient(value, plain.trainable_variables)):
        np.testing.assert_allclose(mean, truth, atol=1e-5)
    with pytest.raises(ValueError, match="act on each other"):
        plain.fit(X, Y, verbose=0, callbacks=[tf_gsnr.GSNRCallback(X, Y)])


def root_mean_square(y_true, y_pred):
    return keras.ops.sqrt(keras.ops.mean((y_true - y_pred) ** 2))


def hinge_of_pairs(y_true, y_pred):
    """Linear piece by piece: its second derivative is zero."""
    wanted = tf.sign(y_true - tf.transpose(y_true))
    given = y_pred[:, :1] - tf.transpose(y_pred[:, :1])
    return tf.reduce_mean(tf.nn.relu(1 - wanted * given), axis=-1)


def weighted_mean(y_true, y_pred):
    """Each example is divided by the weights of all."""
    weights = keras.ops.abs(y_true)
    return keras.ops.sum(weights * (y_true - y_pred) ** 2) / keras.ops.sum(weights)


class Balanced(L.Layer):
    """Adds a loss: how evenly a batch uses the units, as a switch between experts has it."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, h):
        p = keras.ops.softmax(h)
        if self.kind == "mean":
            self.add_loss(keras.ops.sum(keras.ops.mean(p, axis=0) ** 2))
        elif self.kind == "share":  # of which the derivative is zero
            share = keras.ops.mean(keras.ops.one_hot(keras.ops.argmax(p, -1), 4), axis=0)
            self.add_loss(keras.ops.sum(share * keras.ops.mean(p, axis=0)))
        elif self.kind == "alone":
            self.add_loss(keras.ops.mean(keras.ops.sum(p**2, axis=-1)))
        return h


def balanced(kind):
    return lambda: keras.Sequential([keras.Input([6]), L.Dense(4), Balanced(kind), L.Dense(1)])


def said_of_others(caplog):
    return [r.getMessage() for r in caplog.records if "act on each other" in r.getMessage()]


@pytest.mark.parametrize("loss", [root_mean_square, hinge_of_pairs])
def test_a_loss_that_acts_in_ways_hard_to_see(loss, caplog):
    """By one factor for all examples; by a function whose second derivative is zero."""
    with caplog.at_level("WARNING"):
        model = trained(dense, True, loss, epochs=1)
    assert len(said_of_others(caplog)) == 1
    with pytest.raises(ValueError, match=f"{loss.__name__}.*act on each other.*contributions"):
        tf_gsnr.gradient_moments(model, X, Y)


def of_sixteen(y_true, y_pred):
    """A contrastive loss that counts on its number of examples."""
    likeness = tf.gather(tf.matmul(y_pred, y_pred, transpose_b=True), tf.range(16))
    return keras.losses.sparse_categorical_crossentropy(tf.range(16), likeness, True)


def log_determinant(y_true, y_pred):
    """Which fails where two outputs are the same."""
    products = tf.matmul(y_pred, y_pred, transpose_b=True) + 1e-6 * tf.eye(tf.shape(y_pred)[0])
    return -tf.reduce_sum(tf.math.log(tf.linalg.diag_part(tf.linalg.cholesky(products))))


@pytest.mark.parametrize("loss, size", [(of_sixteen, 16), (log_determinant, 2)])
def test_a_loss_that_takes_no_other_outputs_trains(loss, size):
    plain, ours = (trained(dense, wrap, loss, batch_size=size, epochs=1) for wrap in (False, True))
    for a, b in zip(plain.get_weights(), ours.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "share", "alone"])
def test_what_a_model_adds_may_act_between_examples(kind, caplog):
    """`fit` cannot see it where it has no derivative."""
    with caplog.at_level("WARNING"):
        model = trained(balanced(kind), True, epochs=1)
    assert len(said_of_others(caplog)) == (kind == "mean")
    if kind == "alone":
        assert tf_gsnr.gradient_moments(model, X, Y).count == 48
    else:
        with pytest.raises(ValueError, match="add_loss.*act on each other.*contributions=True"):
            tf_gsnr.gradient_moments(model, X, Y)
    found = tf_gsnr.gradient_moments(model, X, Y, contributions=True)
    with tf.GradientTape() as tape:
        value = model.compute_loss(X, Y, model(X))
    for mean, truth in zip(found.mean, tape.gradient(value, model.trainable_variables)):
        np.testing.assert_allclose(mean, truth, atol=1e-5)


def test_a_loss_that_divides_by_the_weights_of_all(caplog):
    """An example alone is not its part in the batch: measured, and said."""
    model = dense()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            tf_gsnr.gradient_moments(model, X, Y, weighted_mean)
        tf_gsnr.gradient_moments(model, X, Y, weighted_mean, contributions=True)
        tf_gsnr.gradient_moments(model, X, Y, "mse")
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "weighted_mean" in said[0] and "contributions=True" in said[0]


class Flipped(L.Layer):
    def call(self, x):
        return keras.ops.flip(x, axis=0)


def flipped(back):
    def make():
        layers = [Flipped(), L.Dense(4, "tanh"), *([Flipped()] if back else [])]
        return keras.Sequential([keras.Input([6]), L.Dense(5), *layers, L.Dense(1)])

    return make


@pytest.mark.parametrize("back", [True, False])
def test_rows_in_another_order(back, caplog):
    """For a while is no acting on each other; for good, an example has another one's target."""
    with caplog.at_level("WARNING"):
        model = trained(flipped(back), True, epochs=1)
    assert len(said_of_others(caplog)) == (not back)
    if back:
        assert tf_gsnr.gradient_moments(model, X, Y).count == 48
    else:
        with pytest.raises(ValueError, match="act on each other"):
            tf_gsnr.gradient_moments(model, X, Y)


def test_a_layer_whose_gradients_are_rounding_alone(caplog):
    """One number divided by its size is 1 or -1: what is left is no gradient, and no mistake."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([6])
    h = L.UnitNormalization()(L.Dense(1, "softplus", name="idle")(inputs))
    model = keras.Model(inputs, L.Dense(1)(L.Concatenate()([h, L.Dense(4, "tanh")(inputs)])))
    model.compile("sgd", "mse")
    with caplog.at_level("WARNING"):
        found = tf_gsnr.gradient_moments(model, X, Y)
        tf_gsnr.GSNRModel(model).fit(X, Y, 16, verbose=0)
    assert np.abs(found.mean[0]).max() < 1e-6
    said = [r.getMessage() for r in caplog.records]
    assert not any("measured" in line or "engine" in line for line in said), said


class WithRowsOfItsOwn(keras.Model):
    """Calls its layers once more while the loss is computed."""

    def __init__(self, rows):
        super().__init__()
        self.hidden, self.out, self.rows = L.Dense(4, "tanh"), L.Dense(1), rows

    def call(self, x):
        return self.out(self.hidden(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        rows = self.rows(x)
        return keras.ops.mean((y_pred - y) ** 2) + keras.ops.mean((self(rows) - 1) ** 2)


class WithHead(WithRowsOfItsOwn):
    """A head that only the loss asks for: its rows are the examples'."""

    def __init__(self):
        super().__init__(None)
        self.head = L.Dense(2)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        other = keras.ops.mean(self.head(y_pred) ** 2)
        return keras.ops.mean((y_pred - y) ** 2) + other + keras.ops.mean(self(x + 1) ** 2)


class Positions(L.Layer):
    """As many positions as a batch has examples: their rows are no example's."""

    def __init__(self):
        super().__init__()
        self.table = L.Embedding(16, 3)

    def call(self, x):
        return x[..., None] * self.table(keras.ops.arange(16))


def with_positions():
    return keras.Sequential([keras.Input([16]), Positions(), L.Flatten(), L.Dense(1, name="out")])


def not_measured(caplog):
    lines = [r.getMessage() for r in caplog.records]
    return {line.split(": ")[1].split()[0] for line in lines if "not measured" in line}


@pytest.mark.parametrize("rows", [lambda x: X[:16] + 1, lambda x: keras.ops.sort(x, axis=0)])
def test_layers_that_the_loss_calls_on_rows_of_its_own(rows, caplog):
    """As many as a batch has examples: points of an equation, or the examples in another order."""
    with caplog.at_level("WARNING"):
        trained(lambda: WithRowsOfItsOwn(rows), True, x=X, batch_size=16, epochs=1)
    assert len(not_measured(caplog)) == 4


def test_moments_where_the_loss_calls_layers():
    model = WithRowsOfItsOwn(lambda x: X[:16] + 1)
    model(X[:1])
    model.compile("sgd")
    found = tf_gsnr.gradient_moments(model, X[:16], Y[:16], batch_size=16)
    each = []
    for n in range(16):
        with tf.GradientTape() as tape:
            x, y = X[n : n + 1], Y[n : n + 1]
            value = model.compute_loss(x, y, model(x))
        each.append(tape.gradient(value, model.trainable_variables))
    for variance, gradients in zip(found.variance(), zip(*each)):
        np.testing.assert_allclose(variance, np.var(gradients, axis=0), rtol=1e-3, atol=1e-7)


def test_layers_that_the_loss_calls_on_the_examples(caplog):
    with caplog.at_level("WARNING"):
        trained(WithHead, True, batch_size=16, epochs=1)
    assert not not_measured(caplog) and not said_of_others(caplog)


def test_rows_that_all_examples_share(caplog):
    x = RNG.normal(size=[48, 16]).astype("float32")
    with caplog.at_level("WARNING"):
        trained(with_positions, True, x=x, batch_size=16, epochs=1)
    assert [path.split("/")[-1] for path in not_measured(caplog)] == ["embeddings"]
    assert not said_of_others(caplog)


class DividedByLargest(L.Layer):
    def call(self, x):
        return x / keras.ops.max(keras.ops.abs(x))


def scaled(where):
    layers = [DividedByLargest(name="scaled"), L.Dense(4, name="hidden")][:: 1 if where else -1]
    return keras.Sequential([keras.Input([6]), *layers, L.Dense(2)])


@pytest.mark.parametrize("largest", [0, 1, 30, 31])
def test_one_example_that_acts_on_all_others(largest, caplog):
    """Whichever it is; none of the others acts on it, or on any."""
    x = np.clip(X[:32], -1, 1)
    x[largest] = 5
    for first in (True, False):  # on the data, or on what a layer makes of them
        with pytest.raises(ValueError, match="act on each other"):
            tf_gsnr.gradient_moments(scaled(first), x, Y[:32], "mse")
        caplog.clear()
        with caplog.at_level("WARNING"):
            model = tf_gsnr.GSNRModel(scaled(first))
            model.compile("sgd", "mse")
            model.fit(x, Y[:32], 32, shuffle=False, verbose=0)
        assert any("'scaled'" in r.getMessage() for r in caplog.records)


class Doubled(keras.Model):
    """Has each example twice in its layers, one batch after the other."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = L.Dense(4, "tanh"), L.Dense(1)

    def call(self, x):
        both = self.out(self.hidden(keras.ops.tile(x, (2, 1))))
        return keras.ops.mean(keras.ops.reshape(both, (2, -1, 1)), axis=0)


def test_nothing_is_shown_of_rows_that_were_taken_for_others(caplog):
    """Nor in the first epoch, of whose first step that was found out."""
    with caplog.at_level("WARNING"):
        model = trained(Doubled, True, epochs=1)
    said = [r.getMessage() for r in caplog.records]
    assert sum("rows of layer" in line and "not measured" in line for line in said) == 4
    shown = {k: v[-1] for k, v in model.history.history.items() if k != "loss"}
    assert shown and all(np.isnan(v) for v in shown.values()), shown


def test_a_callback_that_is_refused_has_not_trained():
    model = centred()
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match="spread"):
        model.fit(X, Y, verbose=0, callbacks=[tf_gsnr.GSNRCallback(X, Y)])
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_a_metric_with_one_of_our_names_is_refused():
    model = tf_gsnr.GSNRModel(dense())
    model.compile("sgd", "mse", metrics=[keras.metrics.MeanAbsoluteError(name="gsnr")])
    with pytest.raises(ValueError, match="'gsnr'.*rename"):
        model.fit(X, Y[:, [0, 0]], verbose=0)


def test_a_fit_of_the_users_own():
    class Own(keras.Sequential):
        def fit(me, *data, **kwargs):
            return super().fit(*data, **kwargs)

    model = tf_gsnr.GSNRModel(Own([keras.Input([6]), L.Dense(1)]))
    model.compile("adam", "mse")
    assert "gsnr" in model.fit(X, Y, epochs=1, verbose=0).history


def test_a_train_step_of_the_object_is_refused():
    model = dense()
    model.train_step = lambda data: {}
    with pytest.raises(ValueError, match="train_step of its own"):
        tf_gsnr.GSNRModel(model)


def test_what_a_loss_keeps_is_left_as_it_was():
    class Counting(keras.losses.Loss):
        def __init__(self):
            super().__init__()
            self.calls = tf.Variable(1.0, trainable=False)

        def call(self, y_true, y_pred):
            self.calls.assign_add(1.0)
            return tf.reduce_mean(tf.square(y_true - y_pred), -1)

    plain, ours = (trained(dense, wrap, Counting(), epochs=1) for wrap in (False, True))
    assert float(plain.loss.calls) == float(ours.loss.calls)
    before = float(plain.loss.calls)
    tf_gsnr.gradient_moments(plain, X, Y)
    assert float(plain.loss.calls) == before


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "adagrad"])
def test_other_precisions(policy, optimizer):
    keras.config.set_dtype_policy(policy)
    try:
        model = tf_gsnr.GSNRModel(dense())
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(optimizer, "mse")
    assert np.isfinite(model.fit(X, Y, verbose=0).history["gap_growth"]).all()
    assert tf_gsnr.gradient_moments(model, X, Y).count == 48


def test_gradients_whose_squares_underflow():
    """1e-19 and less, as in a deep network before training: the ratio is what it is."""
    keras.utils.set_random_seed(0)
    small = keras.Sequential([keras.Input([6]), L.Dense(4, "tanh"), L.Dense(1, use_bias=False)])
    ratios = []
    for scale in (1.0, 1e-12):
        kernel = small.layers[1].kernel
        kernel.assign(np.linspace(0.5, 1, 4)[:, None] * scale)
        loss = lambda y, p: tf.reduce_mean(p * 1e-9 * (1 + y), -1)  # noqa: E731
        found = tf_gsnr.gradient_moments(small, X, Y, loss)
        ratios.append(tf_gsnr.gsnr(found, bias_corrected=False)[0])
    np.testing.assert_allclose(*ratios, rtol=1e-3)


def test_the_reference_engine_is_not_for_training():
    with pytest.raises(ValueError, match="never trains"):
        tf_gsnr.GSNRModel(dense(), engine="vectorized")
