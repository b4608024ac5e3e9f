"""Sums over examples, in which micro-batches are added up before they become moments.

Adding g and g^2 passes over the parameters a third as often as merging means and squared deviations
does. What is lost is digits, where n mean^2 is nearly all of sum g^2. Variables of which the first
micro-batch tells as much are merged (`Moments.merge`); where others turn out so at the end, the
data are measured again. Index letters: n example, j variable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gsnr.gradients.dense_forms import CENTRED_BELOW
from tf_gsnr.moments import Moments

MOST = 2**24  # examples: float32 counts no further


class Sums(NamedTuple):
    """Of n examples; what follows the loss are lists over the variables, of their shapes.

    Attributes:
      count: n, int64.
      loss: the sum of the losses, float64.
      first, second: sum_n g[n] and sum_n g[n]^2; of a micro-batch also `tf.IndexedSlices`.
      difference, there: n+ - n- and n+ + n-, as floats; or empty lists.
    """

    count: Any
    loss: Any
    first: list
    second: list
    difference: list
    there: list

    @classmethod
    def accumulators(cls, variables: Sequence, sign_counts: bool) -> Sums:
        """Zeros that micro-batches can be added to: `tf.Variable`s."""

        def zeros(shape, dtype):
            return tf.Variable(tf.zeros(shape, dtype), trainable=False)

        lists = [[zeros(v.shape, v.dtype) for v in variables] for _ in range(4)]
        lists = lists if sign_counts else [*lists[:2], [], []]
        return cls(zeros([], tf.int64), zeros([], tf.float64), *lists)

    @classmethod
    def of(cls, moments: Moments) -> Sums:
        """Of what moments were made of."""
        n = moments.count
        pairs = list(zip(moments.mean, moments.m2))
        signs = [
            (tf.cast(p, g.dtype), tf.cast(q, g.dtype))
            for p, q, g in zip(moments.positives, moments.negatives, moments.mean)
        ]
        return cls(
            n,
            moments.loss * tf.cast(n, tf.float64),
            [g * tf.cast(n, g.dtype) for g, _ in pairs],
            [s + tf.cast(n, g.dtype) * tf.square(g) for g, s in pairs],
            [p - q for p, q in signs],
            [p + q for p, q in signs],
        )

    def add(self, other: Sums):
        """Adds a micro-batch to accumulators, in place."""
        for total, value in zip(tf.nest.flatten(self), tf.nest.flatten(other)):
            if isinstance(value, tf.IndexedSlices):
                total.scatter_add(value)
            else:
                total.assign_add(value)

    def moments(self):
        """`(moments, [j] whether digits were lost)`."""
        mean, m2, lost = [], [], []
        for first, second in zip(self.first, self.second):
            n = tf.cast(tf.maximum(self.count, 1), first.dtype)
            mean.append(first / n)
            m2.append(second - first * mean[-1])
            lost.append(cancels(m2[-1], second))
        signs = list(zip(self.difference, self.there))
        positives = [tf.cast((there + d) / 2, tf.int64) for d, there in signs]
        negatives = [tf.cast((there - d) / 2, tf.int64) for d, there in signs]
        loss = self.loss / tf.cast(tf.maximum(self.count, 1), tf.float64)
        moments = Moments(tf.identity(self.count), loss, mean, m2, positives, negatives)
        lost = tf.stack(lost) if lost else tf.zeros([0], tf.bool)
        return moments, lost | (self.count >= MOST if signs else False)


def cancels(m2, squares, below: float = CENTRED_BELOW):
    """Whether, for some parameter, the spread is less than this share of sum_n g[n]^2."""
    return tf.reduce_any(m2 < below * squares)


SUSPECT_BELOW = 0.1  # in the first micro-batch
ENOUGH = 8  # examples: of fewer, a spread of nearly nothing may be chance


def likely_to_cancel(moments: Moments) -> set:
    """The variables j of which one micro-batch tells that their sums would lose digits."""
    n = moments.count
    if n < ENOUGH:
        return set()
    pairs = enumerate(zip(moments.mean, moments.m2))
    squares = ((j, m2, m2 + tf.cast(n, g.dtype) * tf.square(g)) for j, (g, m2) in pairs)
    return {j for j, m2, square in squares if cancels(m2, square, SUSPECT_BELOW)}


def split(moments: Moments, chosen) -> tuple[Moments, Moments]:
    """Of the variables chosen, and of the others."""

    def some(wanted):
        lists = ([v for j, v in enumerate(one) if (j in chosen) == wanted] for one in moments[2:])
        return Moments(moments.count, moments.loss, *lists)

    return some(True), some(False)


def joined(of_chosen: Moments, others: Moments, chosen) -> Moments:
    """What was split, in the order of the variables."""
    lists = []
    for a, b in zip(of_chosen[2:], others[2:]):
        a, b, size = iter(a), iter(b), len(a) + len(b)
        lists.append([next(a if j in chosen else b) for j in range(size)])
    return Moments(of_chosen.count, of_chosen.loss, *lists)
