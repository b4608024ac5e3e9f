"""Layers: norms, noise, preprocessing, constraints, convolutions, recurrent ones."""

import keras
import tensorflow as tf

from situations.parts import (
    IMAGES,
    LABELS,
    RNG,
    SENTENCES,
    SERIES,
    TAGS,
    TOKENS,
    L,
    N,
    O,
    X,
    Y,
    around,
    case,
    fit,
    how,
    logits,
    seq,
)

NORMS = (
    ("LayerNormalization", lambda: L.LayerNormalization()),
    ("GroupNormalization", lambda: L.GroupNormalization(2)),
    ("UnitNormalization", lambda: L.UnitNormalization()),
    ("BatchNormalization", lambda: L.BatchNormalization(momentum=0.8)),
    ("BatchNormalization, momentum 0", lambda: L.BatchNormalization(momentum=0.0)),
    ("BatchNormalization, frozen", lambda: L.BatchNormalization(trainable=False)),
    ("BatchNormalization, synchronized", lambda: L.BatchNormalization(synchronized=True)),
    ("BatchNormalization, subclassed", lambda: OwnNorm()),
)


class OwnNorm(L.BatchNormalization):
    def call(self, x, training=None, mask=None):
        return 0.5 * super().call(x, training=training, mask=mask) + x


for name, layer in NORMS:
    case(
        name,
        "normalisation: batch statistics and others",
        lambda layer=layer: around(layer()),
        how(),
        fit(),
        moments="same",
    )
case(
    "batch norm of masked tokens",
    "normalisation: statistics without the padding",
    lambda: seq([6], L.Embedding(9, 4, mask_zero=True), L.BatchNormalization(), L.Dense(3)),
    how(logits()),
    fit(TOKENS, TAGS),
    moments="same",
)
for name, layer in (
    ("Dropout", lambda: L.Dropout(0.4)),
    ("GaussianNoise", lambda: L.GaussianNoise(0.3)),
    ("GaussianDropout", lambda: L.GaussianDropout(0.3)),
    ("AlphaDropout", lambda: L.AlphaDropout(0.3)),
    ("two dropouts of one seed generator", lambda: SharedSeed()),
):
    make = lambda layer=layer: around(layer())  # noqa: E731
    case(name, "noise", make, how(), fit(), moments="same", evaluates=False)


class SharedSeed(L.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        if not training:
            return x
        x = keras.random.dropout(x, 0.3, seed=self.seeds)
        return keras.random.dropout(x, 0.3, seed=self.seeds)


case(
    "spatial dropout and convolutions",
    "noise: whole channels",
    lambda: seq(
        [6, 3], L.Conv1D(4, 3), L.SpatialDropout1D(0.3), L.GlobalMaxPooling1D(), L.Dense(2)
    ),
    how(),
    fit(SERIES),
    moments="same",
)
case(
    "images of bytes, augmented",
    "preprocessing in the model: rescaling, flips, contrast",
    lambda: seq(
        [8, 8, 2],
        L.Rescaling(1 / 255),
        L.RandomFlip(seed=1),
        L.RandomTranslation(0.1, 0.1, seed=2),
        L.Conv2D(3, 3),
        L.Flatten(),
        L.Dense(3),
    ),
    how(logits()),
    fit(RNG.integers(0, 256, [N, 8, 8, 2]).astype("uint8"), LABELS),
    moments="same",
)


def adapted():
    normal = L.Normalization()
    normal.adapt(X)
    return seq([5], normal, L.Dense(6, "relu"), L.Dense(2))


case("Normalization, adapted", "preprocessing: tabular data", adapted, how(), fit(), moments="same")


def tabular():
    age, city = keras.Input([1], name="age"), keras.Input([1], dtype="string", name="city")
    colour = keras.Input([1], dtype="int32", name="colour")
    parts = [
        L.CategoryEncoding(4, "one_hot")(L.Discretization([-1.0, 0.0, 1.0])(age)),
        L.Flatten()(L.Embedding(5, 2)(L.Hashing(5)(city))),
        L.CategoryEncoding(4, "one_hot")(L.IntegerLookup(vocabulary=[1, 2, 3])(colour)),
    ]
    inputs = {"age": age, "city": city, "colour": colour}
    return keras.Model(inputs, L.Dense(3)(L.Concatenate()(parts)))


case(
    "bins, hashes and categories",
    "preprocessing: structured data by name, strings among them",
    tabular,
    how(logits()),
    lambda: fit(
        {"age": X[:, :1], "city": tf.constant([[s] for s in SENTENCES]), "colour": LABELS[:, None]},
        LABELS,
    )(),
    moments="same",
)
case(
    "constraints",
    "layers: max norm, non-negative weights",
    lambda: seq(
        [5],
        L.Dense(6, "relu", kernel_constraint="max_norm"),
        L.Dense(2, kernel_constraint="non_neg"),
    ),
    how(rate=0.5),
    fit(),
    moments="same",
)


@keras.saving.register_keras_serializable("situations")
class Pruned(keras.constraints.Constraint):
    def __call__(self, w):
        return w * O.cast(O.abs(w) > 0.3, w.dtype)


case(
    "pruning by a constraint",
    "layers: sparse weights, set to zero after each step",
    lambda: seq([5], L.Dense(6, "tanh", kernel_constraint=Pruned()), L.Dense(2)),
    how(),
    fit(),
    moments="same",
)
case(
    "convolutions of every kind",
    "layers: depthwise, separable, transposed, dilated, grouped",
    lambda: seq(
        [8, 8, 2],
        L.DepthwiseConv2D(3),
        L.SeparableConv2D(4, 3, activation="tanh"),
        L.Conv2DTranspose(4, 3, strides=2),
        L.Conv2D(4, 3, groups=2, dilation_rate=2),
        L.GlobalAveragePooling2D(),
        L.Dense(3),
    ),
    how(logits()),
    fit(IMAGES, LABELS),
    moments="same",
)
case(
    "frames of a video",
    "layers: ConvLSTM and TimeDistributed",
    lambda: seq(
        [3, 8, 8, 2],
        L.TimeDistributed(L.Conv2D(2, 3)),
        L.ConvLSTM2D(2, 3),
        L.GlobalAveragePooling2D(),
        L.Dense(2),
    ),
    how(),
    fit(RNG.normal(size=[N, 3, 8, 8, 2]).astype("float32")),
    moments="same",
)
case(
    "einsum, PReLU, bilinear product",
    "layers: less usual ones with weights",
    lambda: bilinear(),
    how(rate=0.01),
    fit(SERIES),
    moments="same",
)


def bilinear():
    x = keras.Input([6, 3])
    a = L.PReLU()(L.EinsumDense("abc,cd->abd", (6, 4), bias_axes="d")(x))
    return keras.Model(x, L.Dense(2)(L.Flatten()(L.Dot(1)([a, L.Dense(2)(x)]))))


class MinimalCell(L.Layer):
    state_size = 4

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4))
        self.u = self.add_weight(shape=(4, 4), initializer="orthogonal")

    def call(self, x, states, training=None):
        h = O.tanh(O.matmul(x, self.w) + O.matmul(states[0], self.u))
        return h, [h]


for name, make in (
    ("stateful LSTM", lambda: stateful()),
    ("GRU, reset before", lambda: seq([6, 3], L.GRU(3, reset_after=False), L.Dense(2))),
    ("own recurrent cell", lambda: seq([6, 3], L.RNN(MinimalCell()), L.Dense(2))),
    ("stacked cells", lambda: seq([6, 3], L.RNN([L.LSTMCell(3), L.GRUCell(3)]), L.Dense(2))),
    ("encoder and decoder by states", lambda: translator()),
    ("recurrent dropout", lambda: seq([6, 3], L.LSTM(3, recurrent_dropout=0.3), L.Dense(2))),
):
    x = [SERIES, SERIES[:, ::-1].copy()] if "decoder" in name else SERIES
    whole = dict(x=SERIES[:16], y=Y[:16]) if name == "stateful LSTM" else dict(x=x)
    case(
        name,
        "recurrent: states, cells, dropout",
        make,
        how(),
        fit(**whole),
        moments=None if name == "stateful LSTM" else "same",
        evaluates=False,
    )


def stateful():
    return keras.Sequential(
        [keras.Input(batch_shape=[8, 6, 3]), L.LSTM(3, stateful=True), L.Dense(2)]
    )


def translator():
    source, target = keras.Input([6, 3]), keras.Input([6, 3])
    _, h, c = L.LSTM(3, return_state=True)(source)
    decoded = L.LSTM(3, return_sequences=True)(target, initial_state=[h, c])
    return keras.Model([source, target], L.Dense(2)(L.GlobalMaxPooling1D()(decoded)))
