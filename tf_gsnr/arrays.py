"""Arithmetic that reads the same for numpy arrays and for tensors in a graph.

The names of numpy and `keras.ops` agree, so with `xp = namespace(value)` one formula serves both;
numpy values are widened to float64 first, tensors keep their dtype.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf


def is_tensor(value):
    """`tf.is_tensor`, which takes 30 us to say that a numpy array is none."""
    return not isinstance(value, (np.ndarray, np.generic, int, float)) and tf.is_tensor(value)


def namespace(value):
    """numpy, or keras.ops for a tensor."""
    return keras.ops if is_tensor(value) else np


def wide(arrays):
    return [a if is_tensor(a) else np.asarray(a, np.float64) for a in arrays]


def like(array, scalar):
    """The scalar in the array's dtype."""
    return tf.cast(scalar, array.dtype) if is_tensor(array) else array.dtype.type(scalar)


def like_float(counts):
    return tf.cast(counts, tf.float32) if is_tensor(counts) else counts.astype(np.float64)


def divide(a, b, where_zero):
    """a / b, and `where_zero` where b is 0."""
    xp = namespace(a)
    a, b = (v if is_tensor(v) else np.asarray(v) for v in (a, b))
    zero = b == 0
    return xp.where(zero, like(a, where_zero), a / xp.where(zero, like(b, 1), b))


def choose(condition, a, b):
    """One of two scalars; a Python number takes the dtype of the other."""
    if not is_tensor(condition):
        return a if condition else b
    a, b = (v if is_tensor(v) else like(other, v) for v, other in ((a, b), (b, a)))
    return tf.where(condition, a, b)


def total(arrays):
    """The sum over all entries of all arrays."""
    return sum(namespace(a).sum(a) for a in wide(arrays))


def flat(arrays):
    """All entries in one vector."""
    xp = namespace(arrays[0])
    return xp.concatenate([xp.reshape(a, [-1]) for a in arrays])


def rows_of_examples(value, n, fold=None):
    """A tensor whose number of rows is known when it is run, if these are rows of the examples.

    Args:
      value: `[rows, ...]`.
      n: the number of examples, an int or a scalar tensor.
      fold: rows per example; None for any number.

    Returns:
      It, or zeros in its place, `fold` rows per example or one; as it is where its rows are known.
    """
    if value.shape[0] is not None:
        return value
    shape = tf.shape(value)
    rows = tf.cast(n, shape.dtype) * (fold or 1)
    fits = tf.equal(shape[0], rows) if fold else (shape[0] > 0) & (shape[0] % rows == 0)
    zeros = tf.zeros(tf.concat([[rows], shape[1:]], 0), value.dtype)
    known = n * fold if fold and isinstance(n, int) else None
    even = tf.cond(fits, lambda: value, lambda: zeros)
    return tf.ensure_shape(even, [known, *value.shape[1:]])


def mean(values):
    """The mean of what is not NaN; NaN if nothing is."""
    xp = namespace(values)
    alive = ~xp.isnan(values)
    count = xp.sum(xp.where(alive, like(values, 1), like(values, 0)))
    return scalar(divide(xp.sum(xp.where(alive, values, like(values, 0))), count, np.nan))


def quantile(values, q):
    """The q-quantile of what is not NaN, linearly interpolated; NaN if nothing is."""
    xp = namespace(values)
    alive = ~xp.isnan(values)
    ordered = xp.sort(xp.where(alive, values, like(values, 3e38)))  # the NaN come last
    count = xp.sum(xp.where(alive, 1, 0))
    last = xp.maximum(count - 1, 0)
    place = q * like(values, last)
    below = xp.floor(place)
    low, high = (
        xp.take(ordered, index(k)) for k in (below, xp.minimum(below + 1, like(values, last)))
    )
    result = low + xp.where(place > below, (place - below) * (high - low), like(values, 0))
    return scalar(xp.where(count > 0, result, like(values, np.nan)))


def weighted_median(values, weights):
    """The median of tensors, each of which stands for so many; what has no weight is left out.

    Each is in the middle of its share of the sum of the weights, with straight lines between: for
    equal weights it is the usual median. NaN if nothing has weight.
    """
    order = tf.argsort(tf.where(weights > 0, values, like(values, np.inf)))
    values, weights = tf.gather(values, order), tf.gather(weights, order)
    ends = tf.cumsum(weights)
    middles, half = ends - weights / 2, ends[-1] / 2
    last = tf.math.count_nonzero(weights, dtype=tf.int32) - 1
    above = tf.searchsorted(middles[: tf.maximum(last + 1, 1)], half[tf.newaxis])[0]
    pair = [tf.clip_by_value(above - k, 0, tf.maximum(last, 0)) for k in (1, 0)]
    (low, high), (a, b) = (tf.unstack(tf.gather(v, pair)) for v in (values, middles))
    result = low + tf.math.divide_no_nan(half - a, b - a) * (high - low)
    return tf.where(last < 0, like(values, np.nan), result)


def index(number):
    return tf.cast(number, tf.int32) if is_tensor(number) else int(number)


def scalar(value):
    """A Python number, or the tensor as it is."""
    return value if is_tensor(value) else np.asarray(value).item()
