"""Moments: the count, mean and spread of per-example gradients, as a value that merges.

Index letters: n example, j parameter, a and b two disjoint sets of examples.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, checks

Array = Any  # a numpy array or a TensorFlow tensor


class Moments(NamedTuple):
    """First and second moments of per-example gradients, a list entry per trainable variable.

    A value: nothing changes it, `merge` returns a new one. The fields are all TensorFlow tensors
    (inside a graph) or all numpy arrays (what `gradient_moments` returns); `tf.nest` sees through
    it, so it can be carried by a `tf.while_loop` or summed over replicas.

    Attributes:
      count: number of examples n; integer scalar.
      loss: mean of the per-example losses; float64 scalar.
      mean: per variable, `1/n sum_n g[n]`; the variable's shape and dtype.
      m2: per variable, `sum_n (g[n] - mean)^2`, the sum of squared deviations; like `mean`.
      positives: per variable, how many examples have `g[n] > 0`; int64. Empty unless asked for.
      negatives: likewise for `g[n] < 0`.

    Valid range: each micro-batch is centred on its own mean and micro-batches are merged by the
    pairwise formula, so no large numbers are subtracted: in float32 the variance of values with
    mean 1 and standard deviation 1e-4 is right to 0.1 %, where `E[g^2] - E[g]^2` has no digit.

    Example:

    >>> import numpy as np
    >>> gradients = [np.array([[1.0, 2.0], [3.0, 2.0]])]  # two examples, one variable of shape [2]
    >>> moments = Moments.of(gradients, losses=np.array([0.5, 1.5])).numpy()
    >>> moments.mean[0].tolist(), moments.variance()[0].tolist(), float(moments.loss)
    ([2.0, 2.0], [1.0, 0.0], 1.0)
    """

    count: Array
    loss: Array
    mean: list
    m2: list
    positives: list = []
    negatives: list = []

    def __repr__(self):
        try:
            check(self, least=0)
        except ValueError:
            return f"Moments{tuple(self)!r}"
        if tf.is_tensor(self.count) or not self.mean:
            return f"Moments of {len(self.mean)} variables"
        return f"Moments of {', '.join(self._about())}"

    def _repr_html_(self) -> str:
        """For a notebook."""
        return repr(self).replace("Moments", "<b>Moments</b>", 1)

    def _about(self) -> list:
        count = int(self.count)
        parts = [f"{count:,} examples", f"{len(self.mean)} variables"]
        parts.append(f"{sum(int(np.size(v)) for v in self.mean):,} parameters")
        if count > 1 and not tf.is_tensor(self.mean[0]):
            # Looked up when it is printed: nothing here depends on it.
            mean = importlib.import_module("tf_gsnr.metrics").mean_gsnr(self)
            told = f"mean GSNR {mean:.3g}" if mean == mean else "GSNR not told from zero"
            parts.append(told)
        return parts

    @classmethod
    def empty(cls, variables: Sequence, dtype=None, sign_counts: bool = False) -> Moments:
        """The neutral element of `merge`: no examples. Shapes and dtypes are those of `variables`.

        Args:
          variables: arrays, tensors or variables, for their shapes and dtypes.
          dtype: of the moments, instead of the variables' own.
          sign_counts: whether signs are counted.

        Raises:
          ValueError: an argument is not usable; the message names it.
        """
        checks.boolean("sign_counts", sign_counts)
        if dtype is not None:
            dtype = checks.floating("dtype", dtype)
        expected = "a list of variables, arrays or tensors of floating-point numbers"
        checks.instance("variables", variables, (list, tuple), expected)
        for v in variables:
            if not hasattr(v, "shape") or not _is_floating(v):
                checks.refuse("variables", v, expected)
        zeros = [tf.zeros(v.shape, dtype or v.dtype) for v in variables]
        counts = [tf.zeros(v.shape, tf.int64) for v in variables] if sign_counts else []
        return cls(tf.zeros([], tf.int64), tf.zeros([], tf.float64), zeros, zeros, counts, counts)

    @classmethod
    def of(cls, gradients: Sequence, losses, *, valid=None, sign_counts: bool = False) -> Moments:
        """The moments of a batch of materialised per-example gradients.

        Args:
          gradients: per variable, `[n, *variable.shape]`.
          losses: `[n]`.
          valid: optional bool `[n]`; examples that are not valid (padding) count for nothing.
          sign_counts: whether to count signs.

        Raises:
          ValueError: an argument is not usable; the message names it.
        """
        checks.boolean("sign_counts", sign_counts)
        expected = "a list of arrays [n, *variable.shape] of floating-point numbers"
        checks.instance("gradients", gradients, (list, tuple), expected)
        gradients = [_tensor("gradients", g, expected, _is_floating) for g in gradients]
        expected = "numbers [n], of n examples"
        losses = tf.cast(_tensor("losses", losses, expected, _is_real), tf.float64)
        if valid is not None:
            expected = "booleans [n], of n examples"
            valid = _tensor("valid", valid, expected, lambda v: v.dtype == tf.bool)
        _check_rows(gradients, losses, valid)
        if valid is None:
            valid = tf.ones(tf.shape(losses), tf.bool)
        count = tf.math.count_nonzero(valid, dtype=tf.int64)
        mean, m2, positives, negatives = [], [], [], []
        for g in gradients:
            mask = tf.reshape(valid, [-1] + [1] * (g.shape.rank - 1))
            n = tf.cast(tf.maximum(count, 1), g.dtype)
            center = tf.reduce_sum(tf.where(mask, g, 0), axis=0) / n
            mean.append(center)
            m2.append(tf.reduce_sum(tf.where(mask, tf.square(g - center), 0), axis=0))
            if sign_counts:
                positives.append(tf.math.count_nonzero(mask & (g > 0), axis=0))
                negatives.append(tf.math.count_nonzero(mask & (g < 0), axis=0))
        n = tf.cast(tf.maximum(count, 1), tf.float64)
        loss = tf.reduce_sum(tf.where(valid, losses, 0)) / n
        return cls(count, loss, mean, m2, positives, negatives)

    def merge(self, other: Moments) -> Moments:
        """The moments of the examples of both (Chan, Golub, LeVeque 1983; Pebay 2008).

            n = n_a + n_b,  delta = mean_b - mean_a
            mean = mean_a + delta n_b / n
            m2 = m2_a + m2_b + delta^2 n_a n_b / n

        Associative and commutative up to rounding; `Moments.empty` is neutral.

        Raises:
          ValueError: they are of other variables, or signs were counted in one of them only.
        """
        check(other, "other", least=0)
        if shapes(self) != shapes(other) or len(self.positives) != len(other.positives):
            raise ValueError(
                f"other={checks.shown(other)}: expected moments of the same variables, of shapes "
                f"{shapes(self)}, with signs counted in both or in neither"
            )
        counts = self.count, other.count
        pairs = zip(zip(self.mean, self.m2), zip(other.mean, other.m2))
        merged = [pairwise(counts, *pair) for pair in pairs]
        loss, _ = pairwise(counts, (self.loss, 0 * self.loss), (other.loss, 0 * other.loss))
        return Moments(
            self.count + other.count,
            loss,
            [mean for mean, _ in merged],
            [m2 for _, m2 in merged],
            [a + b for a, b in zip(self.positives, other.positives)],
            [a + b for a, b in zip(self.negatives, other.negatives)],
        )

    def variance(self, ddof: int = 0) -> list:
        """Per variable, `m2 / (count - ddof)`: the sample-wise gradient variance rho^2.

        Args:
          ddof: 0 for the variance of these examples (the paper's estimators), 1 for the unbiased
            estimate of the variance of the distribution they were drawn from.

        Raises:
          ValueError: it is no integer from 0 on, or there are no more examples than that.
        """
        checks.integer("ddof", ddof, 0)
        if ddof and not arrays.is_tensor(self.count) and self.count <= ddof:
            checks.refuse("ddof", ddof, f"less than the {int(self.count)} examples")
        return [v / arrays.like(v, self.count - ddof) for v in self.m2]

    def astype(self, dtype) -> Moments:
        """The same moments with `mean` and `m2` as tensors of another floating-point dtype."""
        dtype = checks.floating("dtype", dtype)
        return self._replace(
            mean=[tf.cast(v, dtype) for v in self.mean], m2=[tf.cast(v, dtype) for v in self.m2]
        )

    def numpy(self) -> Moments:
        """The same moments as numpy arrays."""
        return tf.nest.map_structure(
            lambda v: np.array(v) if tf.is_tensor(v) else np.asarray(v), self
        )


def check(moments, name: str = "moments", least: int = 1) -> Moments:
    """The value, if it is `Moments` whose fields fit each other.

    Args:
      name: of the argument, for the error.
      least: of how many variables they must be.

    Raises:
      ValueError: it is something else; the message says what.
    """
    if not isinstance(moments, Moments):
        checks.refuse(name, moments, "Moments, such as gradient_moments returns")
    mean, m2, signs = moments.mean, moments.m2, [moments.positives, moments.negatives]
    of = f"{name}: expected Moments of gradient_moments,"
    if not all(isinstance(part, (list, tuple)) for part in (mean, m2, *signs)):
        raise ValueError(f"{of} whose mean, m2, positives and negatives are lists")
    if len(mean) < least:
        raise ValueError(f"{of} got some of no variable")
    if not all(hasattr(v, "dtype") and _is_floating(v) for v in (*mean, *m2)):
        raise ValueError(f"{of} whose mean and m2 are arrays of floating-point numbers")
    for part in (m2, *(one for one in signs if one)):
        if [tuple(v.shape) for v in part] != [tuple(v.shape) for v in mean]:
            raise ValueError(f"{of} with an entry of one shape for each variable in every list")
    count = checks.plain(moments.count)
    whole = isinstance(count, (int, float)) and count % 1 == 0 and count >= 0
    if not whole and not arrays.is_tensor(count):
        raise ValueError(f"{of} got a count of {checks.shown(count)}")
    if any(isinstance(v, np.ndarray) and np.min(v, initial=0) < 0 for v in m2):
        raise ValueError(f"{of} got an m2 below zero, and it is a sum of squares")
    return moments


def shapes(moments) -> list:
    """Of the variables."""
    return [tuple(v.shape) for v in moments.mean]


def check_of_model(moments, model) -> Moments:
    """The moments, if they are those of the model's trainable variables.

    Raises:
      ValueError: they are not, or it is no model.
    """
    checks.keras_model(model)
    check(moments)
    expected = [tuple(v.shape) for v in model.trainable_variables]
    if shapes(moments) != expected:
        raise ValueError(
            f"moments: of variables of shapes {checks.shown(shapes(moments))}; expected those of "
            f"model {model.name!r}, {checks.shown(expected)}: pass the model that they are of"
        )
    return moments


def check_alike(name: str, list_of_moments) -> list:
    """A list of moments of one network, each of as many examples.

    Raises:
      ValueError: it is something else; the message says what.
    """
    if isinstance(list_of_moments, Moments):
        list_of_moments = [list_of_moments]
    expected = "Moments, or a list of Moments of one network, of as many examples each"
    if isinstance(list_of_moments, (str, bytes, dict)) or not np.iterable(list_of_moments):
        checks.refuse(name, list_of_moments, expected)
    found = list(list_of_moments)
    if not found:
        checks.refuse(name, list_of_moments, expected)
    for moments in found:
        check(moments, name)
    for what, values in (
        ("of variables of several shapes", [shapes(moments) for moments in found]),
        ("of several numbers of examples", [checks.plain(moments.count) for moments in found]),
    ):
        if any(not arrays.is_tensor(v) and v != values[0] for v in values):
            raise ValueError(f"{name}: {what}; expected {expected}")
    return found


def _is_floating(v) -> bool:
    try:
        return tf.as_dtype(v.dtype).is_floating
    except TypeError:  # numpy's own: texts, dates
        return False


def _is_real(v) -> bool:
    return _is_floating(v) or v.dtype.is_integer


def _tensor(name, value, expected, holds):
    """The value as a tensor with an axis of examples."""
    try:
        found = tf.convert_to_tensor(value)
    except (TypeError, ValueError, tf.errors.OpError):
        checks.refuse(name, value, expected)
    if not holds(found) or found.shape.rank == 0:
        checks.refuse(name, value, expected)
    return found


def _check_rows(gradients, losses, valid):
    """Raises ValueError where they are known to be of several numbers of examples."""
    given = [("losses", losses)] + ([] if valid is None else [("valid", valid)])
    n = next((g.shape[0] for g in gradients if g.shape.rank is not None and g.shape[0]), None)
    for name, value in [*given, *(("gradients", g) for g in gradients)]:
        rows = value.shape[0] if value.shape.rank else None
        flat = name == "gradients" or value.shape.rank in (None, 1)
        if not flat or None not in (n, rows) and rows != n:
            raise ValueError(
                f"{name}: of shape {value.shape}; expected an axis of {n} examples, as the first "
                "of gradients has"
            )


def pairwise(counts, a, b) -> tuple:
    """`(mean, m2)` of two sets of these counts together, from `(mean, m2)` of each; see `merge`."""
    n_a, n_b = counts
    n = n_a + n_b
    share = _float64(n_b) / _float64(n + _float_free(n == 0, n))  # 0 / 1 if both are empty
    (mean_a, m2_a), (mean_b, m2_b) = a, b
    delta = mean_b - mean_a
    weight = arrays.like(m2_a, _float64(n_a) * share)
    return mean_a + delta * arrays.like(mean_a, share), m2_a + m2_b + delta**2 * weight


def _float64(value):
    return tf.cast(value, tf.float64) if arrays.is_tensor(value) else np.float64(value)


def _float_free(condition, like):
    """`condition` as 0 or 1 in the integer type of `like`."""
    return tf.cast(condition, like.dtype) if arrays.is_tensor(like) else int(condition)
