"""Losses: Keras's, one's own, those of a batch as a whole, add_loss, several outputs."""

import keras
import numpy as np
import tensorflow as tf

from situations.parts import (
    BINARY,
    LABELS,
    LOSSES,
    ONE_HOT,
    SERIES,
    TAGS,
    WEIGHTS,
    L,
    O,
    X,
    Y,
    around,
    case,
    fit,
    heads,
    how,
    logits,
    mlp,
    seq,
)


def scalar_mse(y_true, y_pred):
    return tf.reduce_mean((y_true - y_pred) ** 2)


def log_of_batch_mean(y_true, y_pred):
    return O.mean(O.log(O.mean(O.square(y_true - y_pred), axis=0) + 1e-3), axis=-1)


def gaussian_nll(y_true, y_pred):
    mean, log_var = y_pred[:, :2], y_pred[:, 2:]
    return O.mean(0.5 * (log_var + (y_true - mean) ** 2 * O.exp(-log_var)), axis=-1)


def quantiles(y_true, y_pred):
    q = O.convert_to_tensor([0.1, 0.9])
    return O.mean(O.maximum(q * (y_true - y_pred), (q - 1) * (y_true - y_pred)), axis=-1)


def per_timestep(y_true, y_pred):
    return O.square(y_true - y_pred)[..., 0]


def ranking(y_true, y_pred):
    """Every pair of the batch whose order is wrong."""
    gap = y_pred - O.transpose(y_pred)
    wanted = O.cast(y_true > O.transpose(y_true), gap.dtype)
    return O.mean(wanted * O.softplus(-gap))


def batch_hard(y_true, y_pred):
    z = O.normalize(y_pred, axis=-1)
    distance = 1 - O.matmul(z, O.transpose(z))
    same = O.equal(O.reshape(y_true, (-1, 1)), O.reshape(y_true, (1, -1)))
    far = O.max(O.where(same, distance, -1.0), axis=1)
    near = O.min(O.where(same, 3.0, distance), axis=1)
    return O.softplus(far - near)


def in_batch_softmax(y_true, y_pred):
    """Query i belongs to document i of the same batch (two towers)."""
    queries, documents = y_pred[:, :3], y_pred[:, 3:]
    scores = O.matmul(queries, O.transpose(documents))
    return O.sparse_categorical_crossentropy(O.arange(O.shape(scores)[0]), scores, True)


def ordinal(y_true, y_pred):
    """Ordinal regression: was each threshold passed?"""
    levels = O.cast(O.cast(O.reshape(y_true, (-1, 1)), "int32") > O.arange(2), "float32")
    return O.sum(O.softplus(y_pred) - levels * y_pred, axis=-1)


for name, kind, make, loss, y, moments in (
    ("Huber", "regression", mlp(), LOSSES.Huber(0.3), Y, "same"),
    ("log_cosh by name", "regression", mlp(), "log_cosh", Y, "same"),
    ("Poisson", "counts", mlp(2, "softplus"), "poisson", LABELS[:, None] + [0, 1], "same"),
    ("KL divergence", "distillation", mlp(3, "softmax"), "kl_divergence", ONE_HOT, "same"),
    ("cosine similarity", "embeddings", mlp(), LOSSES.CosineSimilarity(), Y, "same"),
    ("MAPE", "forecasts", mlp(), "mape", Y + 2, "same"),
    ("hinge, labels 0 and 1", "a linear SVM", mlp(1), "hinge", BINARY.astype("int32"), "same"),
    ("categorical hinge", "a linear SVM", mlp(3), "categorical_hinge", ONE_HOT, "same"),
    (
        "label smoothing",
        "image classifiers",
        mlp(3),
        LOSSES.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        ONE_HOT,
        "same",
    ),
    (
        "binary focal, balanced",
        "rare classes",
        mlp(1),
        LOSSES.BinaryFocalCrossentropy(apply_class_balancing=True, from_logits=True),
        BINARY.astype("int64"),
        "same",
    ),
    (
        "categorical focal",
        "rare classes",
        mlp(3, "softmax"),
        LOSSES.CategoricalFocalCrossentropy(),
        ONE_HOT,
        "same",
    ),
    ("Dice", "segmentation, over the whole batch", mlp(1, "sigmoid"), "dice", BINARY, "either"),
    ("Tversky", "segmentation, over the batch", mlp(1, "sigmoid"), "tversky", BINARY, "either"),
    (
        "Circle",
        "metric learning, pairs of the batch",
        lambda: seq([5], L.Dense(4), L.UnitNormalization()),
        LOSSES.Circle(),
        LABELS,
        "either",
    ),
    ("integer targets of a regression", "counts as int64", mlp(1), "mse", LABELS, "same"),
    ("scalar loss function", "a loss that averages over the batch", mlp(), scalar_mse, Y, "same"),
    ("log of a batch mean", "multi-task loss", mlp(), log_of_batch_mean, Y, "either"),
    ("Gaussian negative log-likelihood", "heteroscedastic", mlp(4), gaussian_nll, Y, "same"),
    ("quantile loss", "prediction intervals", mlp(), quantiles, X[:, :1], "same"),
    ("pairwise ranking", "learning to rank in the batch", mlp(1), ranking, X[:, :1], "either"),
    ("batch-hard triplets", "metric learning", mlp(3), batch_hard, LABELS, "either"),
    ("in-batch softmax", "two-tower retrieval", mlp(6), in_batch_softmax, LABELS, "either"),
    ("ordinal regression", "thresholds", mlp(2), ordinal, LABELS, "same"),
    ("reduction='sum'", "loss sums", mlp(), LOSSES.MeanSquaredError("sum"), Y, "same"),
    ("reduction=None", "loss not reduced", mlp(), LOSSES.MeanSquaredError(None), Y, "either"),
):
    how_to = how(loss, rate=0.05)
    case(name, f"loss: {kind}", make, how_to, fit(y=y), moments=moments, evaluates=False)

case(
    "loss returns a value per timestep",
    "loss: a sequence of values per example",
    lambda: seq([6, 3], L.Dense(4, "tanh"), L.Dense(1)),
    how(per_timestep),
    fit(SERIES, SERIES[..., :1]),
    moments="same",
)
case(
    "CTC",
    "loss: speech recognition, a loop in the loss",
    lambda: seq([6, 3], L.Dense(4)),
    how(LOSSES.CTC(), rate=0.02),
    fit(SERIES, np.maximum(TAGS[:, :2], 1)),
    moments="either",
    evaluates=False,
)
case(
    "mean_with_sample_weight",
    "loss: divided by the sum of the weights",
    mlp(),
    how(LOSSES.MeanSquaredError("mean_with_sample_weight")),
    fit(sample_weight=WEIGHTS),
    moments="either",
)


class Uncertainty(L.Layer):
    """Weighs the losses of two tasks by variances that are learnt."""

    def build(self, shapes):
        self.log_var = self.add_weight(shape=(2,), initializer="zeros")

    def call(self, inputs):
        a, b, y = inputs
        errors = O.stack([O.mean((a - y[:, :1]) ** 2), O.mean(O.abs(b - y[:, 1:]))])
        self.add_loss(O.sum(errors * O.exp(-self.log_var) + self.log_var))
        return a


def uncertain():
    x, y = keras.Input([5]), keras.Input([2])
    h = L.Dense(6, "tanh")(x)
    return keras.Model([x, y], Uncertainty()([L.Dense(1)(h), L.Dense(1)(h), y]))


case(
    "uncertainty weighting",
    "loss: weights of tasks that are learnt, targets as inputs",
    uncertain,
    how(None),
    fit([X, Y], None),
    moments="either",
)


class CenterLoss(L.Layer):
    """Distance from the class's centre; centres are trained with the rest."""

    def build(self, shapes):
        self.centres = self.add_weight(shape=(3, shapes[0][-1]), initializer="normal")

    def call(self, inputs):
        h, labels = inputs
        own = O.take(self.centres, O.cast(labels[:, 0], "int32"), axis=0)
        self.add_loss(0.1 * O.mean(O.sum((h - own) ** 2, axis=-1)))
        return h


def centred():
    x, labels = keras.Input([5]), keras.Input([1], dtype="int32")
    h = CenterLoss()([L.Dense(4, "tanh")(x), labels])
    return keras.Model([x, labels], L.Dense(3)(h))


case(
    "center loss",
    "loss: class centres, in an embedding of their own",
    centred,
    how(logits()),
    fit([X, LABELS[:, None]], LABELS),
    moments="same",
)


class Penalised(keras.Model):
    """add_loss in the model's own call."""

    def __init__(self):
        super().__init__()
        self.first, self.last = L.Dense(4, "tanh"), L.Dense(2)

    def call(self, x):
        h = self.first(x)
        self.add_loss(0.1 * O.mean(O.sum(h**2, axis=-1)))
        return self.last(h)


case(
    "add_loss in Model.call",
    "loss: sparsity in a subclass",
    Penalised,
    how(),
    fit(),
    moments="same",
)
case(
    "add_loss of a weight",
    "loss: a penalty on weights by add_loss in call",
    lambda: around(WeightPenalty()),
    how(),
    fit(),
    moments="either",
)


class WeightPenalty(L.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x):
        self.add_loss(0.1 * O.sum(self.scale**2))
        return x * self.scale


case(
    "regularisers of every kind",
    "loss: kernel, bias and activity regularisers, orthogonality",
    lambda: seq(
        [5],
        L.Dense(6, "tanh", kernel_regularizer="l2", bias_regularizer="l1"),
        L.Dense(4, kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.1)),
        L.Dense(2, activity_regularizer=keras.regularizers.L1(0.02)),
    ),
    how(),
    fit(),
    moments="same",
)
case(
    "losses and their weights as lists",
    "loss: a list of losses, weighted by a list",
    lambda: heads(lambda h, o: [o["a"], o["c"]]),
    how(["mse", "mae"], loss_weights=[1.0, 0.2]),
    fit(y=[X[:, :1], X[:, 1:2]]),
    moments="same",
)
case(
    "one loss, two weights of losses",
    "loss: Keras asks for as many losses as weights",
    lambda: heads(lambda h, o: [o["a"], o["c"]]),
    how("mse", loss_weights=[1.0, 0.2]),
    fit(y=[X[:, :1], X[:, 1:2]]),
    fit="raises",
)
case(
    "a loss each, weighted, metrics each",
    "loss: several outputs in a dict with metrics",
    lambda: heads(lambda h, o: {"a": o["a"], "c": o["c"]}),
    how(
        {"a": "mse", "c": LOSSES.BinaryCrossentropy(from_logits=True)},
        loss_weights={"a": 1.0, "c": 0.2},
        metrics={"a": ["mae"], "c": ["accuracy"]},
    ),
    fit(y={"a": X[:, :1], "c": BINARY}),
    moments="same",
)
case(
    "one output in a dict",
    "loss: targets by the output's name",
    lambda: heads(lambda h, o: {"a": o["a"]}),
    how({"a": "mse"}),
    fit(y={"a": X[:, :1]}),
    moments="same",
)
