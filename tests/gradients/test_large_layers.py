"""A layer without a rule whose gradients of all examples would not fit: one example at a time."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_gsnr
from tf_gsnr.gradients.layerwise import dense_forms, fallback

L = keras.layers


class Table(L.Layer):
    """Looked up and multiplied with, by operations of its own."""

    def build(self, shape):
        self.table = self.add_weight(shape=(30, 4), name="table")
        self.scale = self.add_weight(shape=(4,), name="scale", initializer="ones")

    def call(self, ids):
        rows = keras.ops.take(self.table, ids, axis=0) * self.scale
        return keras.ops.matmul(keras.ops.tanh(rows), keras.ops.transpose(self.table))


def model():
    keras.utils.set_random_seed(0)
    layers = [keras.Input([3], dtype="int32"), Table(dtype="float64"), L.Flatten()]
    return keras.Sequential([*layers, L.Dense(2, dtype="float64")])


def data(n):
    rng = np.random.default_rng(0)
    return rng.integers(0, 30, [n, 3]), rng.normal(size=[n, 2])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fallback, "LARGE", 10)
    monkeypatch.setattr(dense_forms, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("batch_size", [4, 11])
def test_against_the_loop(small, batch_size):
    x, y = data(11)
    network = model()
    found = tf_gsnr.gradient_moments(
        network, x, y, "mse", batch_size=batch_size, sign_counts=True, engine="layerwise"
    )
    loss = lambda y, z, w: tf.reduce_mean(tf.square(y - z), -1)  # noqa: E731
    truth = reference.moments(reference.per_example_gradients(network, loss, x, y))
    for name, wanted in zip(("mean", "m2", "positives", "negatives"), truth, strict=True):
        for a, b in zip(getattr(found, name), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("sample", [None, 60])
def test_in_fit(small, monkeypatch, sample):
    x, y = data(64)

    def shown():
        network = tf_gsnr.GSNRModel(model(), sample=sample)
        network.compile("sgd", "mse")
        return network.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history

    one_by_one = shown()
    monkeypatch.undo()
    exact = shown()  # its sums are of all parameters, as their gradients are at hand
    for name in ("gap_growth", "noise_scale", "osgr") if sample else ():
        exact.pop(name)
    for name, values in exact.items():
        np.testing.assert_allclose(one_by_one[name], values, rtol=1e-5, err_msg=name)


def test_nothing_of_all_examples_is_held(small):
    x, y = data(16)
    network = tf_gsnr.GSNRModel(model(), sample=60)
    network.compile("sgd", "mse")
    graphs = []
    network.fit(x, y, batch_size=16, verbose=0, shuffle=False)

    @tf.function
    def traced(x, y):
        graphs.append(tf.compat.v1.get_default_graph())
        return network.train_step((x, y))

    traced.get_concrete_function(tf.TensorSpec([16, 3], tf.int32), tf.TensorSpec([16, 2]))
    sizes = [
        tensor.shape.num_elements() or 0
        for graph in graphs
        for op in graph.get_operations()
        for tensor in op.outputs
        if tensor.shape.rank is not None
    ]
    assert max(sizes) < 16 * 30 * 4
