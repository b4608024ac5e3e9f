"""GSNRModel trains as plain Keras does: the same weights, losses and metrics after two epochs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr.training.meter import SHOWN

RNG = np.random.default_rng(0)
N, BATCH = 44, 8  # the last batch is ragged
X = RNG.normal(size=[N, 6]).astype("float32")
LABELS = RNG.integers(0, 3, N)
TOKENS = RNG.integers(0, 5, [N, 7]) * (np.arange(7) < RNG.integers(2, 8, [N, 1]))
WEIGHTS = RNG.uniform(0.2, 2, N).astype("float32")
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy


def mlp(**last):
    return keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, **last),
        ]
    )


def penalised():
    return keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(10, activation="tanh", kernel_regularizer="l2"),
            keras.layers.Dense(3, activity_regularizer=keras.regularizers.L1(0.02)),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Reshape([6, 1]),
            keras.layers.Conv1D(4, 3, activation="relu"),
            keras.layers.SpatialDropout1D(0.2),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def normalised():
    return keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Reshape([6, 1]),
            keras.layers.Conv1D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.8),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )


def tagger():
    return keras.Sequential(
        [
            keras.Input([7]),
            keras.layers.Embedding(5, 4, mask_zero=True),
            keras.layers.Dense(6, activation="relu"),
            keras.layers.Dense(3),
        ]
    )


def two_outputs():
    inputs = keras.Input([6])
    hidden = keras.layers.Dense(8, activation="relu")(inputs)
    outputs = [
        keras.layers.Dense(3, name="kind")(hidden),
        keras.layers.Dense(1, name="size")(hidden),
    ]
    return keras.Model(inputs, outputs)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(8, activation="relu")
        self.drop = keras.layers.Dropout(0.3)
        self.out = keras.layers.Dense(3)
        self.unused = keras.layers.Dense(2)

    def build(self, shape):
        self.unused.build([None, 3])
        super().build(shape)

    def call(self, x, training=None):
        return self.out(self.drop(self.hidden(x), training=training))


def batches():
    order = range(0, N, BATCH)
    return [(X[i : i + BATCH], LABELS[i : i + BATCH], WEIGHTS[i : i + BATCH]) for i in order]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(batches())

    def __getitem__(self, index):
        return batches()[index]


def endless():
    while True:
        yield from batches()


def compiled(optimizer="adam", loss=None, **kwargs):
    return dict(optimizer=optimizer, loss=loss or CROSSENTROPY(from_logits=True), **kwargs)


ARRAYS = dict(x=X, y=LABELS, batch_size=BATCH)
TAGS = dict(x=TOKENS, y=TOKENS % 3, batch_size=BATCH)
SGD = keras.optimizers.SGD
CASES = {
    "dropout": (mlp, lambda: compiled(metrics=["accuracy"]), ARRAYS),
    "convolution": (convolutional, compiled, ARRAYS),
    "batch norm": (normalised, lambda: compiled(SGD(0.1)), ARRAYS),
    "sample weights": (
        mlp,
        lambda: compiled(weighted_metrics=["accuracy"]),
        dict(ARRAYS, sample_weight=WEIGHTS),
    ),
    "class weights": (mlp, compiled, dict(ARRAYS, class_weight={0: 1.0, 1: 0.3, 2: 2.0})),
    "clipnorm": (mlp, lambda: compiled(SGD(0.3, clipnorm=0.05)), ARRAYS),
    "global_clipnorm": (mlp, lambda: compiled(SGD(0.3, global_clipnorm=0.1)), ARRAYS),
    "clipvalue": (mlp, lambda: compiled(SGD(0.3, clipvalue=0.01)), ARRAYS),
    "accumulation": (mlp, lambda: compiled(SGD(0.3, gradient_accumulation_steps=3)), ARRAYS),
    "average": (
        mlp,
        lambda: compiled(SGD(0.3, 0.9, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=4)),
        ARRAYS,
    ),
    "loss scale": (
        mlp,
        lambda: compiled(keras.optimizers.LossScaleOptimizer(SGD(0.3), dynamic_growth_steps=4)),
        ARRAYS,
    ),
    "steps_per_execution": (mlp, lambda: compiled(steps_per_execution=3), ARRAYS),
    "XLA": (
        mlp,
        lambda: compiled(jit_compile=True),  # one shape, as each is compiled
        dict(x=X[:40], y=LABELS[:40], batch_size=BATCH, epochs=1),
    ),
    "eager": (mlp, lambda: compiled(run_eagerly=True), dict(ARRAYS, epochs=1)),
    "penalties": (penalised, compiled, ARRAYS),
    "sum": (mlp, lambda: compiled(loss=CROSSENTROPY(from_logits=True, reduction="sum")), ARRAYS),
    "weighted mean": (
        mlp,
        lambda: compiled(loss=CROSSENTROPY(from_logits=True, reduction="mean_with_sample_weight")),
        dict(ARRAYS, sample_weight=WEIGHTS),
    ),
    "masked": (tagger, lambda: compiled(SGD(0.3), weighted_metrics=["accuracy"]), TAGS),
    "embedding and Adam": (tagger, compiled, TAGS),
    "embedding and clipnorm": (tagger, lambda: compiled(SGD(0.3, clipnorm=0.05)), TAGS),
    "two outputs": (
        two_outputs,
        lambda: compiled(
            loss={"kind": CROSSENTROPY(from_logits=True), "size": "mse"},
            loss_weights={"kind": 1.0, "size": 0.2},
            metrics={"kind": ["accuracy"]},
        ),
        dict(x=X, y={"kind": LABELS, "size": X[:, :1]}, batch_size=BATCH),
    ),
    "subclassed, with an unused layer": (
        Subclassed,
        lambda: compiled(keras.optimizers.AdamW(weight_decay=0.1)),
        ARRAYS,
    ),
    "tf.data": (mlp, compiled, dict(x=tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(9))),
    "PyDataset": (mlp, compiled, dict(x=Batches)),
    "generator": (mlp, compiled, dict(x=endless, steps_per_epoch=len(batches()))),
    "float16": (mlp, compiled, ARRAYS),
    "bfloat16": (mlp, compiled, ARRAYS),
}
ALL_SHOWN = ("dropout", "two outputs")
IN_GRAPH = ("masked", "two outputs", "embedding and Adam", "loss scale", "batch norm", "float16")
EVERY_STEP = ("tf.data", "PyDataset", "generator", "class weights", "clipvalue", "sum", "XLA")


def trained(case, measure_every):
    make, compiled_with, data = CASES[case]
    keras.utils.set_random_seed(1)
    if case.endswith("float16"):
        keras.config.set_dtype_policy(f"mixed_{case}")
    try:
        network = make()
        model = network
        if measure_every:
            shown = SHOWN if case in ALL_SHOWN else ("gsnr",)  # less to trace
            model = tf_gsnr.GSNRModel(network, measure_every=measure_every, shown=shown)
        options = compiled_with()
        if case in IN_GRAPH:  # the choice between the two steps is made in the graph
            options["steps_per_execution"] = 2
        model.compile(**options)
        data = dict(epochs=2, verbose=0, **{"shuffle": False}) | data
        if callable(data["x"]):
            data["x"] = data["x"]()
        history = model.fit(**data).history
    finally:
        keras.config.set_dtype_policy("float32")
    return network.get_weights(), history


@pytest.mark.parametrize("case", CASES)
def test_same_training(case):
    weights, history = trained(case, None)
    both = (1, 2) if case in ALL_SHOWN else (2,)
    for measure_every in (1,) if case in EVERY_STEP else both:
        ours, shown = trained(case, measure_every)
        tolerance = 2e-3 if case.endswith("float16") else 1e-5
        for a, b in zip(weights, ours):
            np.testing.assert_allclose(a, b, atol=tolerance, err_msg=case)
        for name, values in history.items():
            np.testing.assert_allclose(values, shown[name], rtol=tolerance, atol=tolerance)
        assert not np.isinf(shown["gsnr"]).any()
