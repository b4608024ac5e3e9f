"""The laws of Moments: a value with a neutral element, merged in any micro-batches and order."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr import Moments


def moments_of(values, dtype=np.float64, **kwargs):
    return Moments.of([values.astype(dtype)], np.arange(len(values)), **kwargs).numpy()


def assert_same(a, b, rtol):
    for x, y in zip(tf.nest.flatten(a), tf.nest.flatten(b)):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(1.0, 2.0, size=[40, 3, 2])


def test_of_is_numpy(values):
    m = moments_of(values, sign_counts=True)
    assert m.count == 40 and m.loss == 19.5
    np.testing.assert_allclose(m.mean[0], values.mean(0))
    np.testing.assert_allclose(m.variance()[0], values.var(0))
    np.testing.assert_allclose(m.variance(ddof=1)[0], values.var(0, ddof=1))
    np.testing.assert_array_equal(m.positives[0], (values > 0).sum(0))
    np.testing.assert_array_equal(m.negatives[0], (values < 0).sum(0))


def test_empty_is_neutral(values):
    m = moments_of(values, sign_counts=True)
    empty = Moments.empty(m.mean, sign_counts=True).numpy()
    assert_same(empty.merge(m), m, rtol=0)
    assert_same(m.merge(empty), m, rtol=0)
    assert_same(empty.merge(empty), empty, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_any_chunks_in_any_order(values, seed):
    rng = np.random.default_rng(seed)
    losses = np.arange(40.0)
    cuts = np.sort(rng.choice(np.arange(1, 40), size=rng.integers(0, 10), replace=False))
    parts = [
        Moments.of([part], loss, sign_counts=True).numpy()
        for part, loss in zip(np.split(values, cuts), np.split(losses, cuts))
    ]
    while len(parts) > 1:  # merge neighbours or strangers, in any tree
        i, j = rng.choice(len(parts), 2, replace=False)
        merged = parts[i].merge(parts[j])
        parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [merged]
    assert_same(parts[0], moments_of(values, sign_counts=True), rtol=1e-10)


def test_merge_in_a_graph_is_merge_in_numpy(values):
    a, b = moments_of(values[:7]), moments_of(values[7:])
    tensors = tf.nest.map_structure(tf.constant, (a, b))
    in_graph = tf.function(lambda a, b: a.merge(b))(*tensors)
    assert_same(in_graph.numpy(), a.merge(b), rtol=1e-12)


def test_padding_counts_for_nothing(values):
    padded = np.concatenate([values, np.full([3, 3, 2], np.nan)])
    valid = np.arange(43) < 40
    m = Moments.of([padded], np.arange(43.0), valid=valid, sign_counts=True).numpy()
    assert_same(m, moments_of(values, sign_counts=True), rtol=1e-12)


@pytest.mark.parametrize("dtype, rtol", [(np.float32, 3e-3), (np.float64, 1e-9)])
def test_small_spread_on_a_large_mean(dtype, rtol):
    """Mean 1, spread 1e-4: E[g^2] - E[g]^2 has no digit left in float32."""
    values = np.random.default_rng(1).normal(1.0, 1e-4, size=[1000, 5])
    total = Moments.empty([values[0].astype(dtype)]).numpy()
    for microbatch in np.split(values, 10):
        total = total.merge(moments_of(microbatch, dtype))
    assert total.m2[0].dtype == dtype
    np.testing.assert_allclose(total.variance()[0], values.var(0), rtol=rtol)
    naive = (values.astype(np.float32) ** 2).mean(0) - values.astype(np.float32).mean(0) ** 2
    assert np.abs(naive / values.var(0) - 1).max() > 1  # what is avoided


def test_a_merge_keeps_the_dtype(values):
    a = moments_of(values, np.float32)
    assert a.merge(a).mean[0].dtype == np.float32
    assert a.astype("float64").mean[0].dtype == tf.float64


def test_equal_examples_have_zero_variance_and_never_less():
    one = moments_of(np.full([1, 4], 0.1), np.float32)
    total = one
    for _ in range(100):
        total = total.merge(one)
    assert (total.m2[0] == 0).all()
