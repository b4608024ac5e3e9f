"""Models that share weights, and subclasses with methods of their own."""

import keras
import numpy as np
import tensorflow as tf

from situations.parts import (
    BINARY,
    SGD,
    SITUATIONS,
    TOKENS,
    Apply,
    L,
    O,
    X,
    Y,
    built,
    case,
    fit,
    how,
    logits,
    seq,
)


def siamese():
    a, b = keras.Input([5]), keras.Input([5])
    encoder = seq([5], L.Dense(4, "tanh"), L.Dense(3))
    return keras.Model(
        [a, b],
        Apply(lambda t: O.norm(t[0] - t[1], axis=-1, keepdims=True))([encoder(a), encoder(b)]),
    )


def contrastive(y_true, distance):
    return O.mean(y_true * distance**2 + (1 - y_true) * O.relu(1 - distance) ** 2, axis=-1)


case(
    "siamese distance",
    "structure: one encoder called twice",
    siamese,
    how(contrastive),
    fit([X, X[::-1].copy()], BINARY),
    moments="same",
    engines=("vectorized",),
)


class TiedDecoder(L.Layer):
    """Decodes by the transposed kernel of another layer, a bias of its own."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def build(self, shape):
        self.bias = self.add_weight(shape=(self.kernel.shape[-1],), initializer="zeros")

    @property
    def kernel(self):
        return O.transpose(self.other.kernel)

    def call(self, x):
        return O.matmul(x, self.kernel) + self.bias


def tied_autoencoder():
    encoder = L.Dense(3, "tanh")
    return seq([5], encoder, TiedDecoder(encoder))


case(
    "autoencoder with tied kernels",
    "structure: the decoder is the encoder, transposed",
    tied_autoencoder,
    how(),
    fit(y=X),
    moments="same",
)


def reversible():
    ids = keras.Input([6], dtype="int32")
    table = L.ReversibleEmbedding(9, 4)
    return keras.Model(ids, table(L.Dense(4, "tanh")(table(ids)), reverse=True))


case(
    "reversible embedding",
    "structure: language model with one table",
    reversible,
    how(logits()),
    fit(TOKENS, np.roll(TOKENS, -1, 1)),
    moments="same",
    engines=("layerwise", "vectorized"),
)


class PatchesInPlaces(L.Layer):
    """Patches, a class token, and positions that are looked up once for the whole batch."""

    def build(self, shape):
        self.patches = L.Conv1D(4, 2, strides=2)
        self.patches.build(shape)
        self.places = L.Embedding(shape[1] // 2 + 1, 4)
        self.places.build([1, shape[1] // 2 + 1])
        self.token = self.add_weight(shape=(1, 1, 4), initializer="uniform")

    def call(self, x):
        token = O.broadcast_to(self.token, [O.shape(x)[0], 1, 4])
        x = O.concatenate([token, self.patches(x)], 1)
        return x + self.places(O.arange(x.shape[1])[None])


case(
    "vision transformer's patches",
    "layers: a position embedding of one row for all examples, a class token",
    lambda: seq(
        [6], L.Reshape([6, 1]), PatchesInPlaces(), L.Dense(3, "tanh"), L.Flatten(), L.Dense(2)
    ),
    how(),
    fit(np.repeat(X, 2, 1)[:, :6]),
    moments="same",
    engines=("layerwise", "vectorized"),
)


class InContainers(keras.Model):
    """Layers in a list and a dict, a weight of the model's own, one layer that is never called."""

    def __init__(self):
        super().__init__()
        self.blocks = [L.Dense(5, "tanh") for _ in range(2)]
        self.heads = {"mean": L.Dense(2), "scale": L.Dense(2)}
        self.temperature = self.add_weight(shape=(), initializer="ones")
        self.unused = L.Dense(3)

    def build(self, shape):
        self.unused.build((None, 3))
        super().build(shape)

    def call(self, x, training=None):
        for block in self.blocks:
            x = x + block(x)
        return self.temperature * self.heads["mean"](x) + O.tanh(self.heads["scale"](x))


class DictInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.text, self.number = L.Embedding(9, 3), L.Dense(3)
        self.out = L.Dense(2)

    def call(self, inputs):
        return self.out(O.mean(self.text(inputs["ids"]), axis=1) + self.number(inputs["x"]))


class TwoViews(keras.Model):
    """Self-supervised: two noisy views on the batch axis, their agreement by compute_loss."""

    def __init__(self):
        super().__init__()
        self.noise, self.net = L.GaussianNoise(0.1), L.Dense(3)

    def call(self, x, training=False):
        return self.net(self.noise(O.concatenate([x, x]), training=training))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        z = O.normalize(y_pred, axis=-1)
        n = O.shape(z)[0]
        scores = O.matmul(z, O.transpose(z)) / 0.5 - 1e9 * O.eye(n)
        partner = O.mod(O.arange(n) + n // 2, n)
        return O.mean(O.sparse_categorical_crossentropy(partner, scores, from_logits=True))


class Consistent(keras.Model):
    """Calls itself a second time in compute_loss, on other inputs, and asks for agreement."""

    def __init__(self):
        super().__init__()
        self.net, self.out = L.Dense(4, "tanh"), L.Dense(2)

    def call(self, x):
        return self.out(self.net(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + 0.3 * O.mean((self(0.9 * x) - y_pred) ** 2)


class WeighedByInput(keras.Model):
    """compute_loss that reads x, of an older signature."""

    def __init__(self):
        super().__init__()
        self.net = L.Dense(2)

    def call(self, x):
        return self.net(x)

    def compute_loss(self, x, y, y_pred, sample_weight):
        return O.mean(O.abs(x[:, 0]) * O.mean((y - y_pred) ** 2, axis=-1))


class OwnStep(keras.Model):
    """The train_step of the guides: a tape, apply_gradients, a metric of its own."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = L.Dense(2), keras.metrics.Mean(name="seen")

    def call(self, x):
        return self.net(x)

    @property
    def metrics(self):
        return [*super().metrics, self.seen]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = O.mean((y - self(x, training=True)) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self.seen.update_state(loss)
        return {"seen": self.seen.result()}


class Adversarial(keras.Model):
    """Two optimizers in one train_step."""

    def __init__(self):
        super().__init__()
        self.critic, self.maker = L.Dense(1), L.Dense(5)

    def build(self, shape):
        self.critic.build((None, 5))
        self.maker.build((None, 5))
        self.built = True

    def call(self, x):
        return self.critic(self.maker(x))

    def compile(self, optimizer, second, **kwargs):
        super().compile(optimizer=optimizer, **kwargs)
        self.second = second

    def train_step(self, data):
        x = data[0]
        with tf.GradientTape() as tape:
            loss = O.mean(O.softplus(self.critic(self.maker(x))) + O.softplus(-self.critic(x)))
        self.second.apply(
            tape.gradient(loss, self.critic.trainable_variables), self.critic.trainable_variables
        )
        with tf.GradientTape() as tape:
            fooled = O.mean(O.softplus(-self.critic(self.maker(x))))
        self.optimizer.apply(
            tape.gradient(fooled, self.maker.trainable_variables), self.maker.trainable_variables
        )
        return {"critic": loss, "maker": fooled}


class Logged(keras.Model):
    """A train_step that calls Keras's own and adds a number."""

    def __init__(self):
        super().__init__()
        self.net = L.Dense(2)

    def call(self, x):
        return self.net(x)

    def train_step(self, data):
        return super().train_step(data) | {"norm": O.norm(self.net.kernel)}


class Graphed(keras.Model):
    """Calls its layers within a tf.function of its own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = L.Dense(4, "tanh"), L.Dense(2)

    @tf.function
    def encode(self, x):
        return self.hidden(x)

    def call(self, x):
        return self.out(self.encode(x))


def untrained(name, kind, cls, loss="mse", x=X, y=Y, **more):
    """A subclass that is built by its first batch; and one that was built before."""
    case(name, kind, cls, how(loss), fit(x, y), **more)


untrained("layers in containers, not built", "structure: subclass", InContainers, moments="same")
case(
    "layers in containers, one unused",
    "structure: lists and dicts of layers, a weight of the model's own",
    lambda: built(InContainers(), X[:1]),
    how(),
    fit(),
    moments="same",
)
untrained(
    "subclass with a dict of inputs",
    "structure: subclass",
    DictInputs,
    x={"ids": TOKENS, "x": X},
    moments="same",
)
untrained("two views on the batch axis", "structure: contrastive", TwoViews, None, moments="either")
untrained("called twice, in compute_loss", "structure: consistency", Consistent, moments="same")
untrained(
    "compute_loss that reads x", "structure: own compute_loss", WeighedByInput, moments="same"
)
untrained(
    "train_step of the guides", "structure: own train_step", OwnStep, fit="either", evaluates=False
)
case(
    "adversarial training",
    "structure: own train_step with two optimizers",
    Adversarial,
    how(None, second=SGD(0.05)),
    fit(),
    fit="either",
    evaluates=False,
)
SITUATIONS["adversarial training"].how = lambda: dict(optimizer=SGD(0.1), second=SGD(0.05))
untrained("train_step around Keras's own", "structure: own train_step", Logged, fit="either")
untrained("layers called in a tf.function", "structure: tf.function", Graphed, moments="either")
