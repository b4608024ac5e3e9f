"""Softmax and sigmoid at the end: Keras's crossentropies go by the logits that it attaches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[48, 5]).astype("float32")
LABELS = RNG.integers(0, 3, 48)
ONE_HOT = np.eye(3, dtype="float32")[LABELS]
SPARSE = keras.losses.SparseCategoricalCrossentropy
BINARY = keras.losses.BinaryCrossentropy
CASES = {  # (what makes the outputs, loss, targets)
    "softmax": (L.Softmax(), SPARSE(), LABELS),
    "softmax, one-hot": (keras.activations.softmax, "categorical_crossentropy", ONE_HOT),
    "softmax taken for logits": (L.Softmax(), SPARSE(from_logits=True), LABELS),
    "sigmoid": (keras.ops.sigmoid, BINARY(), ONE_HOT),
    "sigmoid, focal": (keras.activations.sigmoid, "binary_focal_crossentropy", ONE_HOT),
    "TensorFlow's softmax": (L.Lambda(tf.nn.softmax), SPARSE(), LABELS),
    "softmax that is changed": (L.Lambda(lambda z: 0.9 * tf.nn.softmax(z)), SPARSE(), LABELS),
}


def confident(squash, loss):
    """Some probabilities are 0 in float32, so that what Keras clips them at is seen."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([5])
    model = keras.Model(inputs, squash(L.Dense(3)(inputs)))
    model.layers[1].kernel.assign(20 * RNG.normal(size=[5, 3]))
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("case", CASES)
def test_moments(case):
    squash, loss, y = CASES[case]
    model, each = confident(squash, loss), []
    for n in range(len(X)):
        with tf.GradientTape() as tape:
            x = X[n : n + 1]
            value = model.compute_loss(x, tf.constant(y[n : n + 1]), model(x))
        gradients = tape.gradient(value, model.trainable_variables)
        each.append([float(value), *(g.numpy() for g in gradients)])
    values, *gradients = zip(*each)
    engines = ["layerwise", "vectorized"]
    if case.startswith("TensorFlow"):
        engines.pop()  # in a graph Keras sees that operation, one by one it does not
    for engine in engines:
        found = tf_gsnr.gradient_moments(model, X, y, batch_size=16, engine=engine)
        np.testing.assert_allclose(found.loss, np.mean(values), rtol=1e-5)
        for mean, variance, g in zip(found.mean, found.variance(), gradients):
            np.testing.assert_allclose(mean, np.mean(g, axis=0), atol=1e-5)
            np.testing.assert_allclose(variance, np.var(g, axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_training(case, whole):
    """As Keras's, whether or not the size of a batch is known when its step is traced."""
    squash, loss, y = CASES[case]
    data = tf.data.Dataset.from_tensor_slices((X, y)).batch(16, drop_remainder=whole)
    weights = []
    for wrap in (lambda model: model, tf_gsnr.GSNRModel):
        global RNG
        RNG = np.random.default_rng(1)
        model = wrap(confident(squash, loss))
        history = model.fit(data, epochs=3, verbose=0).history
        weights.append([*model.get_weights(), history["loss"], history["accuracy"]])
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
