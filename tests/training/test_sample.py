"""A sample of a large model's parameters in `fit`: against all of them, and against the loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr.gradients.places import Places
from tf_gsnr.training.sample import Sample

RNG = np.random.default_rng(0)
L = keras.layers


def perceptron():
    return [keras.Input([40]), L.Dense(200, "relu"), L.Dense(300, "tanh"), L.Dense(3)], 40


def convolutions():
    layers = [L.Reshape([8, 5, 1]), L.Conv2D(48, 3, padding="same", activation="relu")]
    layers += [L.DepthwiseConv2D(3), L.Conv2D(96, 3, strides=2, activation="relu")]
    return [keras.Input([40]), *layers, L.Flatten(), L.Dense(3)], 40


def table():
    layers = [L.Embedding(500, 48), L.Dense(96, "relu"), L.LayerNormalization()]
    return [keras.Input([6], dtype="int32"), *layers, L.Flatten(), L.Dense(3)], 6


def fitted(network, optimizer="adam", **options):
    keras.utils.set_random_seed(0)
    layers, width = network()
    model = tf_gsnr.GSNRModel(keras.Sequential(layers, name="model"), **options)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).permuted(np.tile(np.arange(512) % 7, [width, 1]), axis=1).T
    x = (x - 3.0 if width == 40 else x * 3.0).astype("float32")
    y = np.stack([x[:, 0], x[:, 1] ** 2 / x.max(), x[:, 2] - x[:, 3]], 1) / x.max()
    history = model.fit(x, y, batch_size=64, epochs=2, shuffle=False, verbose=0).history
    return {name: np.array(values) for name, values in history.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("network", [perceptron, convolutions, table])
def test_a_sample_tells_what_all_do(network, optimizer):
    whole = fitted(network, optimizer, sample=None)
    some = fitted(network, optimizer, sample=4000)
    exact = ["loss"] + (["noise_scale", "osgr"] if network is perceptron else [])
    exact += ["gap_growth"] if network is perceptron and optimizer == "sgd" else []
    for name in whole:
        tolerance = 2e-4 if name in exact else 0.1
        np.testing.assert_allclose(some[name], whole[name], rtol=tolerance, err_msg=name)
    assert any((some[name] != whole[name]).any() for name in whole)


def test_a_small_model_is_measured_whole():
    def small():
        return [keras.Input([40]), L.Dense(10, "relu"), L.Dense(3)], 40

    whole = fitted(small, sample=None)
    default = fitted(small)
    for name in whole:
        np.testing.assert_allclose(default[name], whole[name], rtol=1e-4, err_msg=name)


def test_shares():
    """In proportion, but for the least; weights make up for it."""
    shapes = [(100, 200), (200,), (200, 300), (10,)]
    sample = Sample(shapes, 2000)
    sizes = [there.size for there in sample.places]
    assert sizes[0] == pytest.approx(500, abs=64) and sizes[2] == pytest.approx(1500, abs=64)
    assert sizes[1] == 64 and sizes[3] == 10 and sample.places[3].whole
    np.testing.assert_allclose(np.bincount(sample.owner, sample.weights), [20000, 200, 60000, 10])
    values = [np.arange(np.prod(s)).reshape(s) for s in shapes]
    np.testing.assert_array_equal(
        sample.take([tf.constant(v) for v in values]),
        np.concatenate([v.ravel()[there.flat] for v, there in zip(values, sample.places)]),
    )


def test_sparse_gradients_are_taken_as_dense_ones():
    sample = Sample([(50, 16), (4, 3)], 200)
    assert not sample.places[0].whole
    slices = tf.IndexedSlices(RNG.normal(size=[30, 16]), RNG.integers(0, 50, [30]), [50, 16])
    dense = tf.convert_to_tensor(slices)
    np.testing.assert_allclose(sample.take([slices, None]), sample.take([dense, None]), rtol=1e-12)
    all_of_it = Places((50, 16))
    assert all_of_it.size == 800 and (all_of_it.flat == np.arange(800)).all()


@pytest.mark.parametrize("factor", [1e-18, 1e16])
def test_gradients_whose_squares_are_beyond_float32(factor):
    """In one layer of two; the ratios are what they are."""

    class Backward(L.Layer):
        """Multiplies the gradient, and leaves the value as it is."""

        def __init__(self, factor):
            super().__init__()
            self.multiplied = tf.custom_gradient(lambda x: (tf.identity(x), lambda d: d * factor))

        def call(self, x):
            return self.multiplied(x)

    def network(factor):
        def made():
            layers = [L.Dense(200, name="a"), Backward(factor), L.Dense(300, name="b"), L.Dense(3)]
            return [keras.Input([40]), *layers], 40

        return made

    options = dict(per_layer=True, shown=("gsnr", "gsnr_median", "same_sign"))
    for sample in (4000, None):
        wanted, found = (
            fitted(network(f), keras.optimizers.SGD(0.0), sample=sample, **options)
            for f in (1.0, factor)
        )
        assert np.isfinite(wanted["gsnr/model/a"]).all()
        for name in ("loss", "same_sign", "gsnr/model/a", "gsnr/model/b"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, err_msg=name)
