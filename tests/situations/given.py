"""The situations that were given with the task, up to number 11."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from situations.parts import (
    BINARY,
    LABELS,
    LENGTHS,
    RNG,
    SENTENCES,
    SERIES,
    TAGS,
    TOKENS,
    Apply,
    L,
    N,
    O,
    X,
    around,
    built,
    case,
    fit,
    how,
    logits,
    mlp,
    seq,
)

void = np.where(RNG.uniform(size=TAGS.shape) < 0.6, -1, TAGS)
case(
    "ignore_class",
    "segmentation or tagging with void labels",
    lambda: seq([6, 3], L.Dense(3)),
    lambda: how(logits(ignore_class=-1), rate=0.5)(),
    fit(SERIES, void),
    given=1,
    moments="same",
    engines=("vectorized",),
)


def own_focal(y_true, y_pred):
    p = tf.clip_by_value(y_pred, 1e-6, 1 - 1e-6)
    hit = y_true * p + (1 - y_true) * (1 - p)
    return tf.reduce_mean(-((1 - hit) ** 2) * tf.math.log(hit), axis=-1)


class OwnFocal(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return own_focal(y_true, y_pred)


for name, loss, targets in (
    ("own loss function, int64 labels", own_focal, BINARY.astype("int64")),
    ("own Loss class, bool labels", OwnFocal(), BINARY.astype(bool)),
):
    case(
        name,
        "custom loss that does arithmetic with integer labels",
        mlp(1, "sigmoid"),
        how(loss, rate=0.5),
        fit(y=targets),
        given=2,
        moments="same",
    )

USERS, ITEMS = RNG.integers(0, 12, N), RNG.integers(0, 9, N)
RATINGS = RNG.normal(size=[N, 1]).astype("float32")


def own_huber(y_true, y_pred):
    d = tf.abs(y_true - y_pred)
    return tf.reduce_mean(tf.where(d < 1, 0.5 * d**2, d - 0.5), axis=-1)


def factorisation():
    user, item = keras.Input([], dtype="int32"), keras.Input([], dtype="int32")
    u, v = L.Embedding(12, 4, "normal")(user), L.Embedding(9, 4, "normal")(item)
    return keras.Model([user, item], Apply(lambda pair: O.sum(pair[0] * pair[1], -1))([u, v]))


case(
    "rank one output, column target",
    "recommender by matrix factorisation",
    factorisation,
    how(own_huber, rate=1.0),
    fit([USERS, ITEMS], RATINGS),
    given=3,
    moments="same",
)


class OwnBatchNorm(L.Layer):
    def build(self, shape):
        self.gamma = self.add_weight(shape=shape[-1:], initializer="ones")
        self.mean = self.add_weight(shape=shape[-1:], initializer="zeros", trainable=False)
        self.var = self.add_weight(shape=shape[-1:], initializer="ones", trainable=False)

    def call(self, x, training=False):
        mean, var = self.mean, self.var
        if training:
            mean, var = tf.nn.moments(x, [0])
            self.mean.assign(0.9 * self.mean + 0.1 * mean)
            self.var.assign(0.9 * self.var + 0.1 * var)
        return self.gamma * (x - mean) / tf.sqrt(var + 1e-3)


def minibatch_std(x):
    return tf.concat([x, tf.math.reduce_std(x, 0, keepdims=True) * tf.ones_like(x)], -1)


class Tied(keras.Model):
    """The output is the embedding's own table; between them a layer with a running mean."""

    def __init__(self):
        super().__init__()
        self.table, self.centre = L.Embedding(9, 4), Centre()

    def call(self, ids, training=False):
        h = self.centre(self.table(ids), training=training)
        return tf.matmul(h, self.table.embeddings, transpose_b=True)


class Centre(L.Layer):
    def build(self, shape):
        self.mean = self.add_weight(shape=shape[-1:], trainable=False, initializer="zeros")

    def call(self, x, training=False):
        centred = x - self.mean
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(x, [0, 1]))
        return centred


case(
    "own batch norm",
    "batch norm written from scratch",
    lambda: around(OwnBatchNorm()),
    how(),
    fit(),
    given=5,
    moments="same",
)
case(
    "minibatch std",
    "discriminator that sees the spread of its batch",
    lambda: around(Apply(minibatch_std)),
    how(),
    fit(),
    given=5,
    moments="either",
)
case(
    "tied embedding and a running mean",
    "language model whose output is its embedding, beside a layer with state",
    lambda: built(Tied(), TOKENS[:1]),
    how(logits(), rate=0.5),
    fit(TOKENS, np.roll(TOKENS, -1, 1)),
    given=5,
    moments="same",
)
case(
    "SpectralNormalization",
    "discriminator whose kernel is assigned in call",
    lambda: seq([5], L.SpectralNormalization(L.Dense(5, "tanh")), L.Dense(1)),
    how(keras.losses.BinaryCrossentropy(from_logits=True)),
    fit(y=BINARY),
    given=7,
    moments="same",
)
case(
    "SpectralNormalization, one step in two",
    "discriminator whose kernel is assigned in call",
    lambda: seq([5], L.SpectralNormalization(L.Dense(5, "tanh")), L.Dense(1)),
    how(keras.losses.BinaryCrossentropy(from_logits=True)),
    fit(y=BINARY),
    given=7,
    gsnr=dict(measure_every=2),
)


class Sampling(L.Layer):
    """Noise of a VAE; its KL divergence by add_loss."""

    def __init__(self, always=True, **kwargs):
        super().__init__(**kwargs)
        self.always, self.seed_generator = always, keras.random.SeedGenerator(1)

    def call(self, inputs, training=False):
        mean, log_var = inputs
        self.add_loss(O.mean(-0.5 * O.sum(1 + log_var - mean**2 - O.exp(log_var), axis=1)))
        if not (self.always or training):
            return mean
        noise = keras.random.normal(O.shape(mean), seed=self.seed_generator)
        return mean + O.exp(0.5 * log_var) * noise


def vae(always=True):
    inputs = keras.Input([5])
    h = L.Dense(5, "tanh")(inputs)
    code = Sampling(always)([L.Dense(2)(h), L.Dense(2)(h)])
    return keras.Model(inputs, L.Dense(5)(code))


case(
    "VAE, KL by add_loss",
    "variational autoencoder, the KL term by add_loss",
    vae,
    how(),
    fit(y=X),
    given=8,
    evaluates=False,  # draws noise in evaluation too
)
case(
    "VAE, noise in training alone",
    "variational autoencoder, the KL term by add_loss",
    lambda: vae(False),
    how(),
    fit(y=X),
    given=8,
    moments="same",
)
case(
    "compile(loss=None), add_loss alone",
    "autoencoder without targets, all of its loss by add_loss",
    lambda: vae(False),
    how(None),
    fit(y=None),
    given=8,
    moments="either",
)

DENSE = (RNG.uniform(size=[N, 12]) * (RNG.uniform(size=[N, 12]) < 0.3)).astype("float32")


def sparse_model():
    inputs = keras.Input([12], sparse=True)
    return keras.Model(inputs, L.Dense(3)(L.Dense(6, "relu")(inputs)))


def scipy_rows():
    return pytest.importorskip("scipy.sparse").csr_matrix(DENSE)


def sparse_batches():
    return tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(DENSE), LABELS)).batch(8)


for name, data in (
    ("scipy csr", lambda: fit(scipy_rows(), LABELS)()),
    ("tf.SparseTensor", lambda: fit(tf.sparse.from_dense(DENSE), LABELS)()),
    ("tf.data of SparseTensors", lambda: dict(x=sparse_batches())),
):
    case(
        name,
        "text as counts of words, sparse",
        sparse_model,
        how(logits()),
        data,
        given=9,
        moments="either",
    )


class ToDense(L.Layer):
    def call(self, x):
        return x.to_tensor() if isinstance(x, tf.RaggedTensor) else x

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def ragged_model():
    inputs = keras.Input([None], dtype="int32", ragged=True)
    h = L.Embedding(9, 4)(ToDense(dtype="int32")(inputs))
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling1D()(h)))


def ragged_rows():
    return tf.ragged.constant([list(range(1, 2 + n % 6)) for n in range(N)], dtype=tf.int32)


case(
    "RaggedTensor",
    "sentences of several lengths as a ragged tensor",
    ragged_model,
    how(logits()),
    lambda: fit(ragged_rows(), LABELS)(),
    given=9,
    moments="either",
)


def text_model():
    words = L.TextVectorization(max_tokens=20, output_sequence_length=6)
    words.adapt(SENTENCES)
    pooled = L.GlobalAveragePooling1D()
    return seq([1], words, L.Embedding(20, 4), pooled, L.Dense(3), dtype="string")


def word_model():
    lookup = L.StringLookup(vocabulary=["good", "a", "bad", "so"])
    return seq([1], lookup, L.Embedding(5, 4), L.Flatten(), L.Dense(3), dtype="string")


case(
    "TextVectorization",
    "strings in, the vocabulary in the model",
    text_model,
    how(logits()),
    lambda: fit(tf.constant([[s] for s in SENTENCES]), LABELS)(),
    given=10,
    moments="same",
)
case(
    "StringLookup",
    "strings in, the vocabulary in the model",
    word_model,
    how(logits()),
    lambda: fit(tf.constant([[s.split()[0]] for s in SENTENCES]), LABELS)(),
    given=10,
    moments="same",
)


def sentences():
    for n, length in enumerate(LENGTHS + 3 * (np.arange(N) // 8)):
        yield (np.arange(length) % 9 + 1).astype("int32"), np.int32(n % 3)


def padded():
    signature = (tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32))
    data = tf.data.Dataset.from_generator(sentences, output_signature=signature)
    return dict(x=data.padded_batch(8))


def masked_mean():
    ids = keras.Input([None], dtype="int32")
    h = L.Dense(5, "tanh")(L.Embedding(11, 4, mask_zero=True)(ids))
    return keras.Model(ids, L.Dense(3)(L.GlobalAveragePooling1D()(h)))


case(
    "padded batches of several lengths",
    "padded_batch: each batch has its own length",
    masked_mean,
    how(logits()),
    padded,
    given=11,
    moments="same",
)
