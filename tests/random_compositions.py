"""Random models, losses, masks, weights and optimizers, each a function of its seed.

What is drawn is ordinary unless `Composition.unusual` names a part of it: an ordinary composition
trains the same and is measured the same; an unusual one may be refused by name instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

L = keras.layers
O = keras.ops  # noqa: E741
N, TIME = 18, 4


@dataclasses.dataclass
class Composition:
    """As a `situations.Situation`, and what in it may be refused, and a line that describes it."""

    make: Callable
    how: Callable
    data: Callable
    tolerance: float
    unusual: list
    unusual_moments: list
    parts: list
    gsnr: dict = dataclasses.field(default_factory=dict)
    use: Callable | None = None
    policy: str = "float32"
    evaluates: bool = True


class Wrapped(keras.Model):
    """A subclass around a functional model, which trains like it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs, training=None):
        return self.inner(inputs, training=training)


class MinusBatchMean(L.Layer):
    """Mixes the examples of a batch."""

    def call(self, x):
        return x - 0.5 * O.mean(x, axis=0, keepdims=True)


class Fold(L.Layer):
    """A layer applied to all timesteps at once, on the batch axis."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, shape):
        self.layer.build((None, shape[-1]))

    def call(self, x):
        folded = self.layer(O.reshape(x, (-1, x.shape[-1])))
        return O.reshape(folded, (-1, x.shape[1], folded.shape[-1]))


class Draw:
    """Draws a composition from a seed, and remembers what it drew."""

    def __init__(self, seed):
        self.rng = np.random.RandomState(seed)
        self.parts, self.unusual, self.unusual_moments = [], [], []
        self.masked = False
        self.shared = {}

    def chance(self, p):
        return self.rng.uniform() < p

    def pick(self, *options):
        return options[self.rng.randint(len(options))]

    def say(self, part):
        self.parts.append(part)
        return part

    # ------------------------------------------------------------------------------------ layers
    def dense(self, units=None):
        options = {}
        if self.chance(0.2):
            options["kernel_regularizer"] = self.pick("l1", "l2")
        if self.chance(0.1):
            options["activity_regularizer"] = keras.regularizers.L2(0.05)
        if self.chance(0.1):
            options["kernel_constraint"] = "max_norm"
        activation = self.pick("tanh", "gelu", "softplus", None)
        layer = L.Dense(units or self.rng.randint(2, 6), activation, self.chance(0.8), **options)
        layer.trainable = not self.chance(0.1)
        return layer

    def norm(self):
        return self.pick(
            lambda: L.BatchNormalization(momentum=0.9),
            lambda: L.LayerNormalization(),
            lambda: getattr(L, "RMSNormalization", L.LayerNormalization)(),
            lambda: L.GroupNormalization(1),
        )()

    def noise(self):
        return self.pick(L.Dropout, L.GaussianDropout, L.GaussianNoise)(0.2)

    def on_vector(self, h):
        kind = self.say(self.pick("dense", "norm", "noise", "residual", "shared", "gate", "mix"))
        if kind == "mix":
            if not self.chance(0.3):
                return L.Activation("tanh")(h)
            self.unusual_moments.append(self.say("batch mean"))
            return MinusBatchMean()(h)
        if kind == "residual":
            return L.Add()([h, self.dense(h.shape[-1])(h)])
        if kind == "shared":
            return self.twice(h)
        if kind == "gate":
            return L.Multiply()([h, L.Dense(h.shape[-1], "sigmoid")(h)])
        return {"dense": self.dense, "norm": self.norm, "noise": self.noise}[kind]()(h)

    def twice(self, h):
        """One layer, used wherever the width allows it, twice at once."""
        key = (len(h.shape), h.shape[-1])
        if key not in self.shared:
            self.shared[key] = L.Dense(h.shape[-1], "tanh")
        layer = self.shared[key]
        return L.Average()([layer(layer(h)), h])

    def on_series(self, h):
        kinds = ["dense", "norm", "noise", "attention", "recurrent", "shared", "fold"]
        kind = self.say(self.pick(*kinds, *([] if self.masked else ["convolution", "separable"])))
        if kind == "attention":
            layer = L.MultiHeadAttention(self.rng.randint(1, 3), 2, dropout=self.pick(0.0, 0.2))
            return L.Add()([h, layer(h, h, use_causal_mask=self.chance(0.4))])
        if kind == "recurrent":
            layer = self.pick(L.LSTM, L.GRU, L.SimpleRNN)(3, return_sequences=True)
            return (L.Bidirectional(layer) if self.chance(0.3) else layer)(h)
        if kind == "shared":
            return self.twice(h)
        if kind == "fold":
            if self.masked:
                return L.TimeDistributed(self.dense())(h)
            return Fold(self.dense())(h)
        if kind == "convolution":
            return L.Conv1D(4, 3, padding=self.pick("same", "causal"), activation="tanh")(h)
        if kind == "separable":
            return L.SeparableConv1D(3, 2, padding="same")(h)
        return {"dense": self.dense, "norm": self.norm, "noise": self.noise}[kind]()(h)

    # ------------------------------------------------------------------------- inputs and outputs
    def input(self):
        kind = self.say(self.pick("vector", "series", "tokens", "image", "masked series"))
        if kind == "vector":
            return keras.Input([5]), self.rng.normal(size=[N, 5]).astype("float32")
        if kind == "image":
            return keras.Input([6, 6, 2]), self.rng.normal(size=[N, 6, 6, 2]).astype("float32")
        lengths = self.rng.randint(1, TIME + 1, [N, 1])
        valid = np.arange(TIME) < lengths
        if kind == "tokens":
            ids = self.rng.randint(1, 7, [N, TIME]) * valid
            return keras.Input([TIME], dtype="int32"), ids.astype("int32")
        x = self.rng.normal(size=[N, TIME, 3]).astype("float32")
        return keras.Input([TIME, 3]), x * valid[..., None] if kind == "masked series" else x

    def branch(self, h, kind):
        """From an input to a vector, or to a series."""
        if kind == "image":
            h = L.Conv2D(3, 3, activation=self.pick("tanh", "gelu"), strides=self.pick(1, 2))(h)
            h = self.norm()(h) if self.chance(0.4) else h
            h = self.pick(L.MaxPooling2D, L.AveragePooling2D)(2)(h)
            return self.pick(L.Flatten, L.GlobalAveragePooling2D)()(h)
        if kind == "tokens":
            self.masked = self.chance(0.5)
            h = L.Embedding(7, 4, mask_zero=self.masked)(h)
        elif kind == "masked series":
            self.masked = True
            h = L.Masking()(h)
        elif kind == "vector":
            for _ in range(self.rng.randint(1, 4)):
                h = self.on_vector(h)
            return h
        for _ in range(self.rng.randint(1, 4)):
            h = self.on_series(h)
        return h

    def pooled(self, h):
        if len(h.shape) == 2:
            return h
        if self.masked:
            return self.pick(L.GlobalAveragePooling1D, lambda: L.LSTM(3))()(h)
        return self.pick(L.GlobalAveragePooling1D, L.GlobalMaxPooling1D, L.Flatten)()(h)

    def output(self, h, name):
        """A head, its targets, its loss."""
        time = [TIME] if len(h.shape) == 3 else []
        shape = [N, *time]
        kind = self.say(self.pick("values", "classes", "one hot", "binary", "own loss"))
        if kind == "classes":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            return L.Dense(3, name=name)(h), self.rng.randint(0, 3, shape), loss
        if kind == "one hot":
            targets = np.eye(3, dtype="float32")[self.rng.randint(0, 3, shape)]
            smooth = self.pick(0.0, 0.1)
            loss = keras.losses.CategoricalCrossentropy(label_smoothing=smooth)
            return L.Dense(3, "softmax", name=name)(h), targets, loss
        if kind == "binary":
            targets = self.rng.randint(0, 2, [*shape, 1])
            loss = self.pick("binary_crossentropy", "binary_focal_crossentropy")
            return L.Dense(1, "sigmoid", name=name)(h), targets, loss
        targets = self.rng.normal(size=[*shape, 2]).astype("float32")
        losses = ["mse", "mae", "huber", "log_cosh", "cosine_similarity"]
        loss = self.pick(*losses) if kind == "values" else own_loss
        return L.Dense(2, name=name)(h), targets, loss


def own_loss(y_true, y_pred):
    return O.mean(O.sqrt(1 + (y_true - y_pred) ** 2), axis=-1)


def draw(seed: int) -> Composition:
    """The composition of a seed."""
    plan = _drawn(seed)[0]

    def make():
        return _drawn(seed)[1]

    return dataclasses.replace(plan, make=make)


def _drawn(seed):
    """`(composition, model)`: all is drawn anew, so that each call has a model of its own."""
    d = Draw(seed)
    inputs, arrays, features = [], [], []
    for _ in range(d.pick(1, 1, 2)):
        tensor, array = d.input()
        kind = d.parts[-1]
        masked_before = d.masked
        h = d.branch(tensor, kind)
        d.masked = d.masked or masked_before
        inputs.append(tensor)
        arrays.append(array)
        features.append(h)
    if len(features) == 2 or d.chance(0.5):
        features = [d.pooled(h) for h in features]
        d.masked = False
    h = L.Concatenate()(features) if len(features) == 2 else features[0]
    if len(h.shape) == 2:
        for _ in range(d.rng.randint(0, 3)):
            h = d.on_vector(h)
    names = ["a", "b"][: d.pick(1, 1, 2)]
    outputs, targets, losses = zip(*[d.output(h, name) for name in names])

    single = len(names) == 1
    as_dict = not single and d.chance(0.5)
    structure = (lambda v: dict(zip(names, v))) if as_dict else (lambda v: list(v))
    x = arrays[0] if len(arrays) == 1 else arrays
    y = targets[0] if single else structure(targets)
    model = keras.Model(
        inputs[0] if len(inputs) == 1 else inputs, outputs[0] if single else structure(outputs)
    )
    if d.chance(0.2):
        d.say("subclass")
        model = Wrapped(model)

    data = dict(x=x, y=y, batch_size=d.pick(6, 8, 17))
    weights = d.rng.uniform(0.2, 2, N).astype("float32")
    if d.chance(0.3):
        d.say("sample weights")
        one = weights[:, None] if len(h.shape) == 3 else weights
        data["sample_weight"] = one if single else structure([one, one[::-1].copy()])
        if not single or one.ndim == 2:
            d.unusual_moments.append("weights that are not [n]")
    elif single and targets[0].ndim == 1 and d.chance(0.5):
        d.say("class weights")
        data["class_weight"] = {0: 0.5, 1: 2.0, 2: 1.0}
    optimizer, tolerance = d.pick(("sgd", 1e-4), ("momentum", 1e-4), ("adam", 1e-2), ("clip", 1e-3))
    d.say(optimizer)
    loss_weights = [1.0, 0.3] if not single and d.chance(0.4) else None

    def how():
        options = {
            "sgd": lambda: keras.optimizers.SGD(0.05),
            "momentum": lambda: keras.optimizers.SGD(0.05, 0.9, nesterov=True),
            "adam": lambda: keras.optimizers.Adam(0.01),
            "clip": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.1),
        }
        loss = losses[0] if single else structure(losses)
        more = {} if loss_weights is None else dict(loss_weights=structure(loss_weights))
        return dict(optimizer=options[optimizer](), loss=loss, **more)

    found = Composition(
        make=None,
        how=how,
        data=lambda: dict(data),
        tolerance=tolerance,
        unusual=d.unusual,
        unusual_moments=d.unusual_moments,
        parts=d.parts,
        evaluates=d.chance(0.2),
    )
    return found, model
