"""A traced step is used again as long as it means the same, and no longer."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr.gradients import forms, rules, stream

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=[12, 4]).astype("float32"), RNG.normal(size=[12, 2]).astype("float32")


def moments(model, loss="mse", x=X, y=Y, **options):
    return tf_gsnr.gradient_moments(model, x, y, loss, **options)


def mean(model, loss="mse"):
    """The ordinary gradient of the first variable, by plain Keras."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    with tf.GradientTape() as tape:
        each = loss(Y, model(X))
        each = tf.reduce_mean(each)
    return tape.gradient(each, model.trainable_variables[0].value).numpy()


def counted(monkeypatch):
    """A list that grows by one for each step that is made."""
    made, step = [], stream.Stream._step

    def counting(self, *args, **kwargs):
        before = len(self.entry.step)
        found = step(self, *args, **kwargs)
        made.extend([1] * (len(self.entry.step) - before))
        return found

    monkeypatch.setattr(stream.Stream, "_step", counting)
    return made


class Times(L.Layer):
    """A layer with a Python number, which is part of what is traced."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0
        self.options = {"shift": [0.0]}

    def call(self, x):
        return x * self.factor + self.options["shift"][0]


class Counts(L.Dense):
    """A layer that counts its calls."""

    calls_made = 0

    def call(self, x):
        self.calls_made += 1
        return super().call(x)


def test_attributes_that_change():
    times = Times()
    model = keras.Sequential([keras.Input([4]), L.Dense(3, "tanh"), times, L.Dense(2)])
    changes = [
        lambda: None,
        lambda: setattr(times, "factor", 3.0),
        lambda: setattr(model.layers[0], "activation", keras.activations.relu),
        lambda: times.options["shift"].__setitem__(0, 2.0),
    ]
    for change in changes:
        change()
        np.testing.assert_allclose(moments(model).mean[0], mean(model), rtol=1e-4, atol=1e-6)


class Power(keras.losses.Loss):
    """A loss with a Python number."""

    power = 2

    def call(self, y, p):
        return keras.ops.mean(keras.ops.abs(y - p) ** self.power, -1)


def test_loss_that_changes():
    model = keras.Sequential([keras.Input([4]), L.Dense(2)])
    loss = Power()
    for power in (2, 4):
        loss.power = power
        np.testing.assert_allclose(moments(model, loss).mean[0], mean(model, loss), rtol=1e-4)


def test_dropout_rate():
    model = keras.Sequential([keras.Input([4]), L.Dense(64), L.Dropout(0.1), L.Dense(2)])
    options = dict(training=True, seed=1)
    one = moments(model, **options)
    model.layers[1].rate = 0.9
    other = moments(model, **options)
    assert other.m2[0].sum() > 2 * one.m2[0].sum()


def test_rule_registered_later():
    class Scale(L.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=[shape[-1]], initializer="ones")

        def call(self, x):
            return x * self.scale

    model = keras.Sequential([keras.Input([4]), Scale(), L.Dense(2)])
    first, used = moments(model), []

    @rules.register_rule(Scale)
    def scale(call):
        used.append(call)
        g = forms.per_example(call, call.x * call.dz)
        return [(call.layer.scale, forms.elementwise(g, call.layer.scale))]

    np.testing.assert_allclose(moments(model).m2[0], first.m2[0], rtol=1e-4)
    assert used


def test_nothing_is_traced_twice(monkeypatch):
    made = counted(monkeypatch)
    model = keras.Sequential([keras.Input([4]), Counts(3, "relu"), L.Dropout(0.5), L.Dense(2)])
    for _ in range(2):
        moments(model)
    before = len(made)
    for _ in range(4):
        moments(model)
    assert len(made) == before


def test_losses_without_end():
    model = keras.Sequential([keras.Input([4]), L.Dense(2)])
    for k in range(2 * stream.MOST_ENTRIES):
        moments(model, lambda y, p, k=k: keras.ops.mean((y - p) ** 2, -1) * k)
    assert len(stream._KNOWN[model].entries) == stream.MOST_ENTRIES


def test_sizes_without_end():
    model = keras.Sequential([keras.Input([4]), L.Dense(2)])
    x, y = RNG.normal(size=[60, 4]), RNG.normal(size=[60, 2])
    for n in range(2, 2 + 2 * stream.MOST_TRACES):
        assert moments(model, x=x[:n], y=y[:n]).count == n
    (entry,) = stream._KNOWN[model].entries.values()
    assert len(entry.traces) <= stream.MOST_TRACES


def test_forgotten_with_the_model():
    model = keras.Sequential([keras.Input([4]), L.Dense(2)])
    moments(model)
    before = len(stream._KNOWN)
    del model
    gc.collect()
    assert len(stream._KNOWN) < before


def test_forget():
    model = keras.Sequential([keras.Input([4]), L.Dense(2)])
    moments(model)
    tf_gsnr.forget(model)
    assert model not in stream._KNOWN


def test_a_call_that_fails_leaves_no_mark():
    model = keras.Sequential([keras.Input([4]), L.Dense(2), L.LayerNormalization()])
    weights = model.get_weights()
    model.layers[0].kernel.assign(np.full([4, 2], np.nan))
    with pytest.raises(ValueError, match="finite"):
        moments(model)
    model.set_weights(weights)
    moments(model)
    assert not any(entry.unfit for entry in stream._KNOWN[model].entries.values())


def test_what_fit_and_evaluate_leave_on_a_model_traces_nothing(monkeypatch):
    """`fit` gives the model a new `history` each time, `evaluate` makes its loop."""
    model = keras.Sequential([keras.Input([4]), L.Dense(2)])
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    made = counted(monkeypatch)
    moments(model, loss=None)
    first = len(made)
    model.fit(X, Y, verbose=0)
    model.evaluate(X, Y, verbose=0)
    moments(model, loss=None)
    assert first and len(made) == first
