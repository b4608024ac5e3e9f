"""The situations that were given with the task, from number 14 on."""

import keras
import numpy as np
import tensorflow as tf

from situations.parts import (
    BINARY,
    LABELS,
    LENGTHS,
    RNG,
    SERIES,
    SPARSE,
    TOKENS,
    L,
    N,
    O,
    X,
    Y,
    case,
    fit,
    heads,
    how,
    logits,
    seq,
)


class MaybeTwo(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mix = L.Dense(2, use_bias=False)

    def build(self, *args, **kwargs):
        self.mix.build((None, 5))

    def call(self, main, extra=None):
        return self.mix(main if extra is None else main + extra)

    def compute_output_shape(self, main_shape, extra_shape=None):
        return (main_shape[0], 2)


def optional_input():
    a, b = keras.Input([5], name="a"), keras.Input([5], name="b", optional=True)
    return keras.Model({"a": a, "b": b}, MaybeTwo()(a, b))


for name, second in (("absent", None), ("given", X[:, ::-1])):
    case(
        f"optional input {name}",
        "an input that may be None",
        optional_input,
        how(),
        fit({"a": X, "b": second}),
        given=14,
        moments="same",
    )


case(
    "nested outputs",
    "a dict of outputs within a dict",
    lambda: heads(lambda h, o: {"a": o["a"], "b": {"c": o["c"], "d": o["d"]}}),
    how({"a": "mse", "b": {"c": "mae", "d": "mse"}}),
    fit(y={"a": X[:, :1], "b": {"c": X[:, 1:2], "d": X[:, 2:3]}}),
    given=15,
    moments="same",
)
case(
    "a loss for one of two outputs",
    "features returned beside the score",
    lambda: heads(lambda h, o: {"features": h, "a": o["a"]}),
    how({"a": "mse"}),
    fit(y={"features": np.zeros([N, 5], "float32"), "a": BINARY}),
    given=15,
    moments="same",
)
case(
    "loss=[None, 'mse']",
    "features returned beside the score",
    lambda: heads(lambda h, o: [h, o["a"]]),
    how([None, "mse"]),
    fit(y=[np.zeros([N, 5], "float32"), BINARY]),
    given=15,
    moments="same",
)


class OwnMetric(keras.Sequential):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        result = super().compute_metrics(x, y, y_pred, sample_weight)
        return result | {"worst": O.max(O.abs(y - y_pred)), "range": O.max(x)}


class OwnPrediction(keras.Sequential):
    def predict_step(self, data):
        return 10 * super().predict_step(data)


class OwnTest(keras.Sequential):
    def test_step(self, data):
        return super().test_step(data) | {"one": O.ones([])}


for cls in (OwnMetric, OwnPrediction, OwnTest):
    case(
        f"{cls.__name__} of the model's own",
        "subclass with compute_metrics, test_step or predict_step",
        lambda cls=cls: cls([keras.Input([5]), L.Dense(2)]),
        how(),
        fit(validation_data=(X, Y)),
        given=16,
    )


def scoped():
    with keras.RematScope(mode="full"):
        conv = L.Conv1D(4, 3, activation="tanh")
    return seq([6, 3], conv, L.Flatten(), L.Dense(2))


class Recompute(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = L.Conv1D(4, 3, activation="tanh")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return tf.recompute_grad(lambda v: self.inner(v))(x)

    def compute_output_shape(self, shape):
        return self.inner.compute_output_shape(shape)


class Handwritten(L.Layer):
    """A product with its gradient by tf.custom_gradient, the weight as a captured variable."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        @tf.custom_gradient
        def product(v):
            w = tf.convert_to_tensor(self.w)

            def grad(upstream, variables=None):
                own = [tf.tensordot(v, upstream, [[0, 1], [0, 1]])] if variables else []
                back = tf.tensordot(upstream, w, [[2], [1]])
                return (back, own) if variables else back

            return tf.tensordot(v, w, 1), grad

        return product(x)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


for name, make in (
    ("RematScope", scoped),
    ("recompute_grad in call", lambda: seq([6, 3], Recompute(), L.Flatten(), L.Dense(2))),
    ("custom_gradient of a variable", lambda: seq([6, 3], Handwritten(), L.Flatten(), L.Dense(2))),
):
    case(
        name,
        "gradient checkpointing, gradients written by hand",
        make,
        how(),
        fit(SERIES),
        given=22,
        moments="same",
        engines=("layerwise", "vectorized"),
    )


def with_segments():
    tokens, segments = keras.Input([6], dtype="int32"), keras.Input([6], dtype="int32")
    h = L.Add()([L.Embedding(9, 4)(tokens), L.Embedding(1, 4)(segments)])
    return keras.Model([tokens, segments], L.Dense(2)(L.GlobalAveragePooling1D()(h)))


def with_lengths():
    values, length = keras.Input([6, 3]), keras.Input([1], dtype="int32")
    h = L.Dense(4, "tanh")(values)
    mean = L.Lambda(lambda t: O.sum(t[0], 1) / O.cast(t[1], "float32"), output_shape=(4,))
    return keras.Model([values, length], L.Dense(2)(mean([h, length])))


HALF = RNG.normal(size=[N, 3, 5])
for name, make, x in (
    ("token types of one kind", with_segments, [TOKENS, np.zeros_like(TOKENS)]),
    ("division by a length", with_lengths, [SERIES, LENGTHS[:, None]]),
    (
        "Cholesky factor of the input",
        lambda: seq([3, 3], L.Lambda(O.cholesky, output_shape=(3, 3)), L.Flatten(), L.Dense(2)),
        (HALF @ HALF.swapaxes(1, 2)).astype("float32"),
    ),
):
    case(
        name,
        "inputs of which not every number makes sense",
        make,
        how(),
        fit(x),
        given=24,
        moments="same",
    )


def waves():
    for n in range(N):
        length = 800 + 100 * (n // 8) + 20 * n
        yield np.sin(np.arange(length)[:, None] / (n + 2)).astype("float32"), n % 3


def audio():
    signature = (tf.TensorSpec([None, 1], tf.float32), tf.TensorSpec([], tf.int32))
    data = tf.data.Dataset.from_generator(waves, output_signature=signature)
    return dict(x=data.padded_batch(8))


def listener():
    wide = L.Conv1D(4, 80, strides=20, activation="relu")
    return seq([None, 1], wide, L.Conv1D(4, 5), L.GlobalMaxPooling1D(), L.Dense(3))


def pictures():
    def images():
        for n in range(4):
            size = 32 * (1 + n % 2)
            one = RNG.normal(size=[2, size, size, 1]).astype("float32")
            yield one, np.tanh(one)

    whole = list(images())
    signature = (tf.TensorSpec([None, None, None, 1], tf.float32),) * 2
    return dict(x=tf.data.Dataset.from_generator(lambda: iter(whole), output_signature=signature))


PICTURES = pictures()


def unet(levels=5):
    x = inputs = keras.Input([None, None, 1])
    skips = []
    for _ in range(levels):
        x = L.Conv2D(2, 3, padding="same", activation="tanh")(x)
        skips.append(x)
        x = L.MaxPooling2D(2)(x)
    for skip in reversed(skips):
        x = L.Concatenate()([L.UpSampling2D(2)(x), skip])
        x = L.Conv2D(2, 3, padding="same", activation="tanh")(x)
    return keras.Model(inputs, L.Conv2D(1, 1)(x))


case(
    "audio of unknown length",
    "raw audio under a wide strided convolution",
    listener,
    how(logits()),
    audio,
    given=25,
)
case(
    "U-Net for images of any size",
    "segmentation of images of several sizes",
    unet,
    how(),
    lambda: dict(x=PICTURES["x"]),
    given=25,
)


def large_table():
    return seq([5], L.Embedding(3000, 4), L.Flatten(), L.Dense(1, "sigmoid"), dtype="int32")


MANY = RNG.integers(0, 3000, [N, 5])
for name, optimizer in (("SGD", None), ("Adam", keras.optimizers.Adam)):
    case(
        f"large embedding table, {name}",
        "recommender of which a batch touches a few rows",
        large_table,
        how("binary_crossentropy", optimizer),
        fit(MANY, BINARY),
        given=28,
        moments="same" if name == "SGD" else None,
        tolerance=1e-5 if name == "SGD" else 1e-3,
    )


class CallableLoss:
    __name__ = "callable_loss"

    def __call__(self, y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


for name, loss in {
    "a class": SPARSE,
    "'crossentropy'": "crossentropy",
    "'ce'": "ce",
    "a class name": "SparseCategoricalCrossentropy",
    "an object with __call__": CallableLoss(),
    "a list of one": ["sparse_categorical_crossentropy"],
}.items():
    case(
        f"loss as {name}",
        "what Keras takes for a loss",
        lambda: seq([5], L.Dense(3, "softmax")),
        how(loss),
        fit(y=LABELS),
        given=29,
        moments="same",
    )
