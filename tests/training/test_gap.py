"""gap_growth, from training data alone, against the real gap between test and training loss."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr

INPUTS, N, BATCH, DRAWS = 10, 96, 16, 25


def draw(rng, n):
    x = rng.normal(size=[n, INPUTS]).astype("float32")
    y = x @ np.linspace(-0.5, 0.5, INPUTS) + rng.normal(size=n)
    return x, y.astype("float32")[:, np.newaxis]


@pytest.mark.parametrize(
    "optimizer, epochs, measure_every",
    [
        (keras.optimizers.SGD(0.001), 2, 1),
        (keras.optimizers.SGD(0.0003, 0.9), 3, 4),
        (keras.optimizers.Adam(0.0003), 3, 1),
    ],
    ids=["SGD", "momentum, every 4th step", "Adam"],
)
def test_predicts_the_real_gap(optimizer, epochs, measure_every):
    """Both averaged over training sets, each trained on from the same weights."""
    rng = np.random.default_rng(0)
    test = draw(rng, 4000)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
    network = keras.Sequential([keras.Input([INPUTS]), *layers])
    model = tf_gsnr.GSNRModel(network, measure_every=measure_every, shown=("gap_growth",))
    model.compile(optimizer, "mse", steps_per_execution=N // BATCH)
    model.optimizer.build(model.trainable_variables)
    start = [v.numpy() for v in [*network.variables, *optimizer.variables]]
    loss = tf.function(lambda x, y: tf.reduce_mean(tf.square(network(x) - y)))
    predicted, measured, before = [], [], 0.0
    for _ in range(DRAWS):
        for variable, value in zip([*network.variables, *optimizer.variables], start):
            variable.assign(value)
        train = draw(rng, N)
        gap = loss(*test) - loss(*train)
        history = model.fit(*train, batch_size=BATCH, epochs=epochs, verbose=0).history
        measured.append(float(loss(*test) - loss(*train) - gap))
        predicted.append(history["gap_growth"][-1] - before)
        before = history["gap_growth"][-1]
    error = np.std(measured) / np.sqrt(DRAWS)
    assert abs(np.mean(predicted) - np.mean(measured)) < 2 * error + 0.15 * np.mean(predicted)
    assert error < 0.3 * np.mean(measured)


class Renamed(keras.optimizers.Adam):
    """As Keras's."""


class OwnStep(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(tf.sign(gradient), variable, learning_rate)


class OwnApply(keras.optimizers.Adam):
    def apply(self, grads, trainable_variables=None):
        super().apply([2 * g for g in grads], trainable_variables)


class OwnApplyGradients(keras.optimizers.SGD):
    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(2 * g, v) for g, v in grads_and_vars])


@pytest.mark.parametrize(
    "optimizer, known",
    [(Renamed, True), (OwnStep, False), (OwnApply, False), (OwnApplyGradients, False)],
)
def test_an_optimizer_that_makes_its_step_otherwise_is_unknown(optimizer, known):
    x, y = draw(np.random.default_rng(0), N)
    model = tf_gsnr.GSNRModel(keras.Sequential([keras.Input([INPUTS]), keras.layers.Dense(1)]))
    model.compile(optimizer(0.001), "mse")
    history = model.fit(x, y, batch_size=BATCH, verbose=0).history
    assert ("gap_growth" in history) == known
