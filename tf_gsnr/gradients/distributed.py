"""Moments over several devices: replicas measure their shares, then the moments are merged.

Index letters: r replica, n example, j parameter.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gsnr.moments import Moments


def all_reduce(moments: Moments) -> Moments:
    """The moments of the examples of all replicas, on each of them; called in a replica.

        n = sum_r n_r,   mean = sum_r n_r mean_r / n
        m2 = sum_r ( m2_r + n_r (mean_r - mean)^2 )

    Two rounds, as m2 is centred on the mean of all: no large numbers are subtracted.
    """
    context = tf.distribute.get_replica_context()

    def total(values):
        summed = {}
        for dtype in dict.fromkeys(v.dtype for v in values):  # a round takes tensors of one dtype
            places = [i for i, v in enumerate(values) if v.dtype == dtype]
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [values[i] for i in places])
            summed |= dict(zip(places, sums))
        return [summed[i] for i in range(len(values))]

    (count,) = total([moments.count])

    def weight(dtype):  # n_r, and n or 1
        return tf.cast(moments.count, dtype), tf.cast(tf.maximum(count, 1), dtype)

    def sums(value):
        return value * weight(value.dtype)[0]

    means = total([sums(moments.loss), *map(sums, moments.mean)])
    loss, *mean = [v / weight(v.dtype)[1] for v in means]
    m2 = total(
        [
            spread + weight(spread.dtype)[0] * tf.square(own - center)
            for spread, own, center in zip(moments.m2, moments.mean, mean)
        ]
    )
    return Moments(count, loss, mean, m2, total(moments.positives), total(moments.negatives))
