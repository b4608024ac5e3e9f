"""A sample of parameters: which entries it takes, and that every form answers with just these."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr.gradients import places
from tf_gsnr.gradients.layerwise import convolution, dense_forms, forms

RNG = np.random.default_rng(0)
SHAPES = [(784, 1024), (3, 3, 64, 64), (128, 8, 16), (8, 16, 128), (1000,), (13, 17), (5, 5, 6, 2)]


def normal(*shape):
    return tf.constant(RNG.normal(size=shape), tf.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 60, 512, 10**9])
def test_distinct_places(shape, size):
    found = places.of(shape, size, 0)
    assert len(set(found.flat)) == found.size == len(found.flat)
    assert 0 <= found.flat.min() and found.flat.max() < np.prod(shape)
    assert found.whole == (size >= np.prod(shape))
    assert found.whole or found.product(shape[-1]) is not None
    if size == 512 and not found.whole:
        assert 450 < found.size < 600


def test_every_place_is_as_likely():
    counts = np.zeros(6 * 10)
    for seed in range(3000):
        counts[places.of((6, 10), 15, seed).flat] += 1
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def variable(shape):
    return keras.Variable(np.zeros(shape), dtype="float64")


def outer(*shape, t=None):
    i, o = int(np.prod(shape[:-1])), shape[-1]
    lead = [4] if t is None else [4, t]
    return dense_forms.Outer(normal(*lead, i), normal(*lead, o), shape, "float64")


def kernel(*shape, groups=1, padding="SAME", strides=2, depthwise=False):
    *spatial, c, o = shape
    size = [9] * len(spatial)
    strides, dilations = [strides] * len(spatial), [1] * len(spatial)
    pads = convolution.paddings(padding, size, spatial, strides, dilations)
    x = normal(4, 1, *size, c * groups)
    t = [(n + sum(p) - k) // s + 1 for n, p, k, s in zip(size, pads, spatial, strides)]
    dz = normal(4, 1, *t, c * o if depthwise else o)
    return convolution.Kernel(x, dz, variable(shape), strides, dilations, pads, depthwise)


FORMS = {
    "dense": lambda: outer(24, 40),
    "dense, odd": lambda: outer(13, 17),
    "dense, one output": lambda: outer(40, 1),
    "positions": lambda: outer(24, 40, t=5),
    "heads": lambda: forms.Outer(normal(4, 5, 24), normal(4, 5, 40), (24, 4, 10), "float64"),
    "rows": lambda: dense_forms.Rows(normal(4, 50), (50,), "float64"),
    "convolution": lambda: kernel(3, 3, 8, 16),
    "convolution, stride 1": lambda: kernel(2, 3, 6, 10, strides=1, padding="VALID"),
    "convolution in 1 dimension": lambda: kernel(9, 2, 16),
    "convolution of 3 channels": lambda: kernel(3, 3, 3, 16),
    "convolution of one channel": lambda: kernel(5, 5, 1, 10, strides=1, padding="VALID"),
    "convolution of 3 dimensions": lambda: kernel(2, 3, 2, 5, 4),
    "grouped": lambda: kernel(3, 3, 4, 16, groups=2),
    "depthwise": lambda: kernel(3, 3, 16, 1, depthwise=True),
    "depthwise, multiplied": lambda: kernel(3, 3, 6, 4, depthwise=True),
    "tied": lambda: forms.Tied(
        forms.Sparse(
            tf.constant(RNG.integers(0, 30, [4, 6])), normal(4, 6, 16), (30, 16), "float64"
        ),
        forms.Outer(normal(4, 5, 30), normal(4, 5, 16), (30, 16), "float64"),
    ),
    "table": lambda: forms.Sparse(
        tf.constant(RNG.integers(0, 30, [4, 6])), normal(4, 6, 16), (30, 16), "float64"
    ),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name, small, monkeypatch):
    """What is sampled are entries of what is materialised."""
    if small:
        monkeypatch.setattr(dense_forms, "BLOCK_BYTES", 1000)
        monkeypatch.setattr(convolution, "PRODUCTS_PER_COPY", 1e-3)
    form = FORMS[name]()
    whole = form.materialise().numpy().reshape(4, -1)
    for size in (1, 20, 100, 10**6):
        there = places.of(form.shape, size, 1)
        np.testing.assert_allclose(form.sample(there), whole[:, there.flat], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(form.total(), whole.sum(0).reshape(form.shape), rtol=1e-9, atol=1e-9)
    squares = form.cheap_squares()
    if squares is not None:
        np.testing.assert_allclose(squares, np.sum(whole**2), rtol=1e-12)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("size", [1100, 3000, 10**6])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("name", ["dense", "table", "table of one"])
def test_moments_at(name, alike, size, signs):
    """Without the gradients of examples: as from them; where they are almost alike as well."""
    rng = np.random.default_rng(0)
    if name == "dense":
        x, dz = (
            1 + 1e-4 * rng.normal(size=[6, k]) if alike else rng.normal(size=[6, k])
            for k in (60, 90)
        )
        x = np.where(rng.random(x.shape) < 0.2, 0, x) if not alike else x
        form = dense_forms.Outer(tf.constant(x), tf.constant(dz), (60, 90), "float64")
    else:
        t = 1 if name == "table of one" else 5
        ids = rng.integers(0, 1 if alike else 90, [6, t])
        dz = rng.normal(size=[6, t, 48]) * (1e-4 if alike else 1) + (1 if alike else 0)
        form = forms.Sparse(tf.constant(ids), tf.constant(dz), (90, 48), "float64")
    there = places.of(form.shape, size, 1)
    wanted = dense_forms.moments_of(form.sample(there), 6, signs)
    found = form.moments_at(there, 6, signs)
    assert len(found) == len(wanted) == (4 if signs else 2)
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-14)
