"""Layers of one's own, routing, control flow, fine-tuning."""

import keras
import tensorflow as tf

from situations.parts import (
    BINARY,
    IMAGES,
    LOSSES,
    SERIES,
    Apply,
    L,
    O,
    X,
    Y,
    around,
    built,
    case,
    fit,
    how,
    mlp,
    seq,
)


def nested_models():
    inner = seq([5], L.Dense(4, "tanh"), L.BatchNormalization())
    inputs = keras.Input([5])
    features = keras.Model(inputs, inner(L.Dense(5)(inputs)))
    return keras.Sequential([features, L.Dense(2)])


class Experts(L.Layer):
    """Mixture of experts: the two best of three, weights by a softmax over these."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(shape[-1], 3))
        self.experts = self.add_weight(shape=(3, shape[-1], 4))

    def call(self, x):
        scores, chosen = tf.math.top_k(O.matmul(x, self.gate), 2)
        outputs = O.einsum("ni,eio->neo", x, self.experts)
        picked = tf.gather(outputs, chosen, batch_dims=1)
        return O.sum(O.softmax(scores)[..., None] * picked, axis=1)


class Routed(L.Layer):
    """Switch routing with a balancing loss over the batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = L.Dense(2), [L.Dense(4), L.Dense(4)]

    def build(self, shape):
        for layer in (self.gate, *self.experts):
            layer.build(shape)

    def call(self, x):
        p = O.softmax(self.gate(x))
        share = O.mean(O.one_hot(O.argmax(p, -1), 2), axis=0)
        self.add_loss(0.1 * O.sum(share * O.mean(p, axis=0)))
        return p[:, :1] * self.experts[0](x) + p[:, 1:] * self.experts[1](x)


class Branches(L.Layer):
    """A branch by tf.cond on a number of the batch, a loop by tf.while_loop."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], shape[-1]))

    def call(self, x):
        _, x = tf.while_loop(lambda i, _: i < 2, lambda i, v: (i + 1, O.tanh(v @ self.w)), (0, x))
        return tf.cond(tf.reduce_sum(x) > 0, lambda: 2 * x, lambda: x)


class Scan(L.Layer):
    """A linear recurrence by keras.ops.scan."""

    def build(self, shape):
        self.decay = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x):
        def step(h, v):
            h = 0.5 * self.decay * h + v
            return h, h

        final, _ = O.scan(step, O.zeros_like(x[:, 0]), O.transpose(x, (1, 0, 2)))
        return final


@tf.custom_gradient
def reverse_gradient(x):
    return tf.identity(x), lambda upstream: -0.5 * upstream


def domains():
    inputs = keras.Input([5])
    h = L.Dense(4, "tanh")(inputs)
    kind = L.Dense(1, name="domain")(Apply(reverse_gradient)(h))
    return keras.Model(inputs, [L.Dense(2, name="value")(h), kind])


class Target(keras.Model):
    """Stop-gradient: one branch learns to predict the other."""

    def __init__(self):
        super().__init__()
        self.online, self.other = L.Dense(2), L.Dense(2)

    def call(self, x):
        return self.online(x) - O.stop_gradient(self.other(x)) + 0.1 * self.other(x)


class ReZero(L.Layer):
    """A residual branch times a number that starts at zero: no gradient at first."""

    def __init__(self):
        super().__init__()
        self.inner = L.Dense(5, "tanh")

    def build(self, shape):
        self.inner.build(shape)
        self.alpha = self.add_weight(shape=(), initializer="zeros")

    def call(self, x):
        return x + self.alpha * self.inner(x)


def over_the_batch(x):
    """Attention of the examples to each other."""
    return x + O.matmul(O.softmax(O.matmul(x, O.transpose(x))), x)


def folded():
    """Time folded into the batch and back, two views interleaved on it."""
    x = keras.Input([6, 3])
    h = Apply(lambda t: O.reshape(t, (-1, 3)))(x)
    h = L.Dense(4, "tanh")(h)
    h = Apply(lambda t: O.reshape(t, (-1, 6, 4)))(h)
    return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling1D()(h)))


class Ghost(L.Layer):
    """Batch norm over halves of the batch."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x, training=False):
        if not training:
            return self.gamma * x
        halves = O.reshape(x, (2, -1, x.shape[-1]))
        mean, var = O.moments(halves, axes=1, keepdims=True)
        return O.reshape(self.gamma * (halves - mean) / O.sqrt(var + 1e-3), O.shape(x))


class Counted(L.Layer):
    """State that every training step moves, and a weight that follows it."""

    def build(self, shape):
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.w = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x, training=False):
        if training:
            self.steps.assign_add(1.0)
        return x * self.w / (1 + 0.1 * self.steps)


class KeptVariable(L.Layer):
    """Keeps a tf.Variable beside Keras's own weights."""

    def build(self, shape):
        self.w = self.add_weight(shape=shape[-1:], initializer="ones")
        self.calls = tf.Variable(0, trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x * self.w


def pixels():
    return seq(
        [8, 8, 2],
        L.Conv2D(4, 3, padding="same"),
        L.Lambda(lambda t: tf.nn.depth_to_space(t, 2), output_shape=(16, 16, 1)),
        L.AveragePooling2D(4),
        L.Flatten(),
        L.Dense(2),
    )


for name, kind, make, x, moments in (
    ("models in models", "a pretrained part, fine-tuned", nested_models, X, "same"),
    ("top-k experts", "mixture of experts", lambda: around(Experts()), X, "same"),
    (
        "experts, balanced over the batch",
        "mixture of experts",
        lambda: around(Routed()),
        X,
        "either",
    ),
    ("tf.cond and tf.while_loop", "control flow in call", lambda: around(Branches()), X, "either"),
    ("ops.scan", "state-space layer", lambda: seq([6, 3], Scan(), L.Dense(2)), SERIES, "same"),
    ("stop_gradient", "self-distillation", lambda: built(Target(), X[:1]), X, "same"),
    (
        "ReZero",
        "weights without gradient at first",
        lambda: seq([5], ReZero(), L.Dense(2)),
        X,
        "same",
    ),
    ("zero-initialised output", "no gradient below it", lambda: zero_output(), X, "same"),
    (
        "attention over the batch",
        "examples that see each other",
        lambda: around(Apply(over_the_batch)),
        X,
        "either",
    ),
    ("time folded into the batch", "reshape in the model", folded, SERIES, "same"),
    ("state that training moves", "layers with counters", lambda: around(Counted()), X, "same"),
    (
        "a tf.Variable kept in a layer",
        "layers with state",
        lambda: around(KeptVariable()),
        X,
        "either",
    ),
    ("pixel shuffle", "super-resolution, Lambda", pixels, IMAGES, "same"),
    ("layers frozen", "fine-tuning", lambda: frozen(), X, "same"),
    ("low-rank adapters", "fine-tuning by enable_lora", lambda: lora(), X, "same"),
    ("low-rank adapters on int8", "fine-tuning, quantised", lambda: lora("int8"), X, "same"),
    (
        "a layer without weights alone",
        "nothing to train in it",
        lambda: around(L.Flatten(), L.ReLU()),
        X,
        "same",
    ),
):
    case(name, f"structure: {kind}", make, how(), fit(x), moments=moments, evaluates=False)


def zero_output():
    return seq([5], L.Dense(6, "tanh"), L.Dense(2, kernel_initializer="zeros"))


def frozen():
    model = seq([5], L.Dense(6, "tanh"), L.BatchNormalization(), L.Dense(2))
    model.layers[0].trainable = model.layers[1].trainable = False
    return model


def lora(quantised=None):
    model = seq([5], L.Dense(6, "tanh"), L.Dense(2))
    if quantised:
        model.quantize(quantised)
    model.layers[0].enable_lora(2)
    return model


case(
    "gradient reversal",
    "structure: domain adaptation, custom_gradient without variables",
    domains,
    how(["mse", LOSSES.BinaryCrossentropy(from_logits=True)]),
    fit(y=[Y, BINARY]),
    moments="same",
)
case(
    "ghost batch norm",
    "structure: virtual batches",
    lambda: around(Ghost()),
    how(),
    fit(X[:16], Y[:16]),
    moments="same",
)
case(
    "nothing to train",
    "structure: a model all of whose layers are frozen",
    lambda: all_frozen(),
    how(),
    fit(),
    fit="either",
    moments="either",
)


def all_frozen():
    model = mlp()()
    model.trainable = False
    return model
