"""Sums over examples, in which micro-batches are added up before they become moments.

Adding g and g^2 passes over the parameters a third as often as merging means and squared deviations
does. What is lost is digits, where n mean^2 is nearly all of sum g^2; that is seen at the end, and
such data are measured again by merging (`Moments.merge`). Index letters: n example.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tf_gsnr.gradients.dense_forms import CENTRED_BELOW
from tf_gsnr.moments import Moments

MOST = 2**24  # examples: float32 counts no further


class Sums(NamedTuple):
    """Of n examples; what follows the loss are lists over the variables, of their shapes.

    Attributes:
      count: n, int64.
      loss: the sum of the losses, float64.
      first, second: sum_n g[n] and sum_n g[n]^2; of a batch also `tf.IndexedSlices`.
      difference, there: n+ - n- and n+ + n-, as floats; or empty lists.
    """

    count: tf.Tensor
    loss: tf.Tensor
    first: list
    second: list
    difference: list
    there: list

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

    def plus(self, other: Sums) -> Sums:
        """The sums of both; only the other's may be `tf.IndexedSlices`."""
        lists = [[_plus(*pair) for pair in zip(a, b)] for a, b in zip(self[2:], other[2:])]
        return Sums(self.count + other.count, self.loss + other.loss, *lists)

    def moments(self):
        """`(moments, whether no digits were lost)`."""
        mean, m2, lost = [], [], []
        for first, second in zip(self.first, self.second):
            n = tf.cast(tf.maximum(self.count, 1), first.dtype)
            mean.append(first / n)
            m2.append(second - first * mean[-1])
            lost.append(tf.reduce_any(m2[-1] < CENTRED_BELOW * second))
        signs = list(zip(self.difference, self.there))
        positives = [tf.cast((there + d) / 2, tf.int64) for d, there in signs]
        negatives = [tf.cast((there - d) / 2, tf.int64) for d, there in signs]
        loss = self.loss / tf.cast(tf.maximum(self.count, 1), tf.float64)
        moments = Moments(self.count, loss, mean, m2, positives, negatives)
        enough = (self.count < MOST) | tf.equal(len(signs), 0)
        return moments, enough & ~tf.reduce_any(tf.stack(lost))


def _plus(total, added):
    if not isinstance(added, tf.IndexedSlices):
        return total + added
    return tf.tensor_scatter_nd_add(total, added.indices[:, tf.newaxis], added.values)
