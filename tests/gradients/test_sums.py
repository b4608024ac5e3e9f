"""Micro-batches added up rather than merged: the same moments, measured again where digits go."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import Moments
from tf_gsnr.gradients import stream, sums
from tf_gsnr.gradients.layerwise import dense_forms, forms
from tf_gsnr.gradients.sums import Sums

RNG = np.random.default_rng(0)
L = keras.layers
FORMS = {
    "dense": lambda: dense_forms.Outer(
        tf.constant(RNG.normal(size=[6, 4])),
        tf.constant(RNG.normal(size=[6, 5])),
        (4, 5),
        "float64",
    ),
    "positions": lambda: dense_forms.Outer(
        tf.constant(RNG.normal(size=[6, 3, 4])),
        tf.constant(RNG.normal(size=[6, 3, 5])),
        (4, 5),
        "float64",
    ),
    "rows": lambda: dense_forms.Rows(tf.constant(RNG.normal(size=[6, 4, 5])), (4, 5), "float64"),
    "table": lambda: forms.Sparse(
        tf.constant(RNG.integers(0, 4, [6, 3])),
        tf.constant(RNG.normal(size=[6, 3, 5])),
        (4, 5),
        "float64",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_sums_of_forms(name):
    form = FORMS[name]()
    g = form.materialise().numpy()
    wanted = [g.sum(0), (g**2).sum(0), np.sign(g).sum(0), np.abs(np.sign(g)).sum(0)]
    for found, value in zip(form.sums(True), wanted, strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(found), value, atol=1e-12)
    assert len(form.sums(False)) == 2


@pytest.mark.parametrize("sign_counts", [False, True])
def test_there_and_back(sign_counts, monkeypatch):
    """A large variable, one that is merged, and small ones in one vector."""
    monkeypatch.setattr(sums, "LARGE", 6)
    g = [RNG.normal(size=[7, *shape]) for shape in ([3, 2], [4], [], [5])]
    losses = RNG.normal(size=7)
    whole = Moments.of(g, losses, sign_counts=sign_counts)
    groups = sums.groups_of(whole.mean, {0, 2, 3})
    assert groups == ((0,), (2, 3))
    total = Sums.accumulators(whole.mean, groups, sign_counts)
    others = Moments.empty([whole.mean[1]], sign_counts=sign_counts)
    for s in (slice(0, 3), slice(3, 7)):
        kinds = [tf.identity, tf.square]
        kinds += [tf.sign, lambda v: tf.abs(tf.sign(v))] if sign_counts else []
        sums_of = [{j: tf.reduce_sum(kind(v[s]), 0) for j, v in enumerate(g)} for kind in kinds]
        lists = [sums.grouped(groups, values) for values in sums_of]
        total.add(Sums(*lists))
        others = others.merge(Moments.of([g[1][s]], losses[s], sign_counts=sign_counts))
    moments, lost = total.moments(7, extreme=True)
    assert not any(v.any() for v in lost)
    found = sums.joined(moments, others, groups, whole.mean)
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(whole), strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-10)


def models():
    dense = [keras.Input([6]), L.Dense(5, "relu"), L.Dense(3)]
    table = [keras.Input([6], dtype="int32"), L.Embedding(20, 4), L.Flatten(), L.Dense(3)]
    images = [keras.Input([6]), L.Reshape([3, 2, 1]), L.Conv2D(4, 2, padding="same")]
    images += [L.LayerNormalization(), L.Flatten(), L.Dense(3)]
    return {"dense": dense, "table": table, "images": images}


@pytest.mark.parametrize("told", [True, False], ids=["told", "late"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("name", ["dense", "table", "images"])
def test_against_one_batch(name, offset, told, monkeypatch):
    """Targets far away make all gradients alike: sum g^2 and n mean^2 agree to many digits.

    The first micro-batch tells, or else it is seen at the end.
    """
    if not told:
        monkeypatch.setattr(sums, "ENOUGH", 1000)
    runs = []
    run = stream.Stream._all
    monkeypatch.setattr(stream.Stream, "_all", lambda self, b, s: runs.append(s) or run(self, b, s))
    keras.utils.set_random_seed(0)
    model = keras.Sequential(models()[name])
    rng = np.random.default_rng(1)
    x = rng.integers(0, 20, [50, 6]) if name == "table" else rng.normal(size=[50, 6])
    y = rng.normal(size=[50, 3]) + offset
    found = tf_gsnr.gradient_moments(model, x, y, "mse", batch_size=8, sign_counts=True)
    assert runs == ([True, False] if offset and not told else [True])
    runs.clear()
    again = tf_gsnr.gradient_moments(model, x, y, "mse", batch_size=8, sign_counts=True)
    assert runs == [True]  # by now it is known which are to be merged
    wanted = tf_gsnr.gradient_moments(
        model, x, y, "mse", batch_size=50, sign_counts=True, engine="vectorized", dtype="float64"
    )
    for a, b in zip(tf.nest.flatten(again), tf.nest.flatten(found)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * np.abs(b).max())
    for a, b in zip(found.mean, wanted.mean):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    for a, b in zip(found.m2, wanted.m2):
        np.testing.assert_allclose(a, b, rtol=2e-3 if offset else 1e-4, atol=1e-5 * np.max(b))
    for a, b in zip(found.positives + found.negatives, wanted.positives + wanted.negatives):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("factor", [1e-16, 1.0])
@pytest.mark.parametrize("name", ["dense", "table", "images"])
def test_small_gradients(name, factor, jit_compile):
    """Squares of gradients of 1e-17 underflow in float32; several micro-batches, on XLA too."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(models()[name])
    rng = np.random.default_rng(1)
    x = rng.integers(0, 20, [50, 6]) if name == "table" else rng.normal(size=[50, 6])
    y = rng.normal(size=[50, 3])

    def loss(y, z):
        return factor * keras.losses.mean_squared_error(y, z)

    options = dict(loss=loss, sign_counts=True)
    wanted = tf_gsnr.gradient_moments(
        model, x, y, engine="vectorized", dtype="float64", batch_size=50, **options
    )
    for _ in range(2):
        found = tf_gsnr.gradient_moments(
            model, x, y, batch_size=8, jit_compile=jit_compile, **options
        )
        for a, b in zip(found.mean + found.m2, wanted.mean + wanted.m2):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
        for a, b in zip(found.positives + found.negatives, wanted.positives + wanted.negatives):
            np.testing.assert_array_equal(a, b)


def test_gradients_that_grow():
    """A scale that was found where gradients were 1e-16 must not let those of 1e12 overflow."""
    model = keras.Sequential([keras.Input([3]), L.Dense(2, "tanh"), L.Dense(1)])
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=[40, 3]), rng.normal(size=[40, 1])
    factor = tf.Variable(1e-16, trainable=False)

    def loss(y, z):
        return factor * keras.losses.mean_squared_error(y, z)

    small = tf_gsnr.gradient_moments(model, x, y, loss, batch_size=8)
    factor.assign(1e12)
    large = tf_gsnr.gradient_moments(model, x, y, loss, batch_size=8)
    for a, b, power in [(u, v, k + 1) for k in (0, 1) for u, v in zip(small[2 + k], large[2 + k])]:
        np.testing.assert_allclose(b / 1e28**power, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())
