"""Moments over several devices: replicas measure their shares, then the moments are merged.

Index letters: r replica, n example, j parameter.
"""

from __future__ import annotations

import itertools

import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.moments import Moments

SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)


def check_strategy(strategy, model):
    """Raises ValueError unless the replicas of `strategy` each hold all of `model`."""
    if not isinstance(strategy, SUPPORTED):
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise ValueError(
            f"strategy={strategy!r}: unsupported; available: {names}. With another, measure on one "
            "device (strategy=None)"
        )
    for variable in model.variables:
        if not keras_internals.is_of_strategy(strategy, variable):
            raise ValueError(
                f"model {model.name!r} was not made for this strategy: build (or load) it within "
                "`with strategy.scope():`"
            )


def check_fit(strategy):
    """Raises ValueError unless Keras's `fit` runs under `strategy`, and replicas hold all of it."""
    with strategy.scope():
        chosen = tf.distribute.has_strategy()  # not so for TensorFlow's default one
    kinds = (tf.distribute.MirroredStrategy, tf.distribute.OneDeviceStrategy)
    if chosen and not isinstance(strategy, kinds):
        raise ValueError(
            f"fit under {type(strategy).__name__}: unsupported; available: MirroredStrategy, "
            "OneDeviceStrategy. Keras 3's own fit does not run on several processes: use "
            "gradient_moments(..., strategy=) in a training loop of your own"
        )


def replicated(strategy, step):
    """`step`, on each replica at once, in one graph."""

    @tf.function(autograph=False)
    def on_all(*arguments):
        return strategy.run(step, args=arguments)

    return on_all


def stream(strategy, step, state, seed, batches, start=0):
    """The state after all micro-batches, of which each replica has measured its share.

    Replica r takes the micro-batches r, r + R, ... of all; the last round is filled up with
    micro-batches in which no example is valid. Their numbers, and with them the seeds of random
    layers, are those of one device.

    Args:
      step: what `replicated` returns, `(moments, bad, index, seed, *batch) -> (moments, bad)`.
      state: `(moments, bad)` of no examples.
      seed: integer tensor or None.
      batches: micro-batches `(x, y, sample_weight, valid)`, the same in every process.
      start: the number of the first of them.

    Returns:
      `(moments, bad)` of all examples; the same in every process.
    """

    def spread(values):
        """One entry of `values` per replica, as TensorFlow wants it: flat, without None."""
        flat = [[v for v in tf.nest.flatten(value) if v is not None] for value in values]
        per_replica = strategy.experimental_distribute_values_from_function(
            lambda context: flat[context.replica_id_in_sync_group]
        )
        return _like(values[0], per_replica)

    replicas = strategy.num_replicas_in_sync
    state = spread([state] * replicas)
    batches = iter(batches)
    for first in itertools.count(start, replicas):
        round_ = list(itertools.islice(batches, replicas))
        if not round_:
            break
        *last, valid = round_[-1]
        round_ += [(*last, tf.zeros_like(valid))] * (replicas - len(round_))
        indices = [tf.constant(first + r, tf.int64) for r in range(replicas)]
        state = step(*state, spread(indices), seed, *spread(round_))
    return _gathered(strategy, state)


def _gathered(strategy, state):
    @tf.function(autograph=False)
    def merged(moments, bad):
        return strategy.run(lambda m, b: (all_reduce(m), tf.reshape(b, [1])), args=(moments, bad))

    moments, bad = merged(*state)
    bad = strategy.gather(bad, axis=0)
    bad = tf.reduce_min(tf.where(bad < 0, bad.dtype.max, bad))
    bad = tf.where(bad == bad.dtype.max, tf.constant(-1, bad.dtype), bad)
    return first(strategy, moments), bad


def first(strategy, values):
    """Of what all replicas have alike, one's."""
    return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], values)


def _like(structure, leaves):
    """`leaves` in place of what is not None in `structure`."""
    leaves = iter(leaves)
    return tf.nest.map_structure(lambda v: None if v is None else next(leaves), structure)


def where(condition, action, moments):
    """Runs `action(moments)` on each replica if the condition, the same on all of them, holds.

    Like `tf.cond` in a replica, but the action may itself reduce over the replicas.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        tf.cond(condition, lambda: _done(action(moments)), lambda: False)
        return

    def across(strategy, condition, moments):
        # A replica's cond may not reduce: this one is around all replicas.
        first = strategy.experimental_local_results(condition)[0]

        def on_each():
            keras_internals.on_each_replica(strategy, action, (moments,))
            return True

        tf.cond(first, on_each, lambda: False)

    context.merge_call(across, args=(condition, moments))


def _done(_):
    return True


def sum_over_replicas(values: list) -> list:
    """The sums over the replicas of these tensors, on each replica; called in one."""
    context = tf.distribute.get_replica_context()
    summed = {}
    for dtype in dict.fromkeys(v.dtype for v in values):  # a round takes tensors of one dtype
        places = [i for i, v in enumerate(values) if v.dtype == dtype]
        # An argument of the function has no device of its own until it is copied.
        parts = [tf.identity(values[i]) for i in places]
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, parts)
        summed |= dict(zip(places, sums))
    return [summed[i] for i in range(len(values))]


def all_reduce(moments: Moments) -> Moments:
    """The moments of the examples of all replicas, on each of them; called in a replica.

        n = sum_r n_r,   mean = sum_r n_r mean_r / n
        m2 = sum_r ( m2_r + n_r (mean_r - mean)^2 )

    Two rounds, as m2 is centred on the mean of all: no large numbers are subtracted.
    """
    (count,) = sum_over_replicas([moments.count])

    def weight(dtype):  # n_r, and n or 1
        return tf.cast(moments.count, dtype), tf.cast(tf.maximum(count, 1), dtype)

    def sums(value):
        return value * weight(value.dtype)[0]

    means = sum_over_replicas([sums(moments.loss), *map(sums, moments.mean)])
    loss, *mean = [v / weight(v.dtype)[1] for v in means]
    m2 = sum_over_replicas(
        [
            spread + weight(spread.dtype)[0] * tf.square(own_mean - center)
            for spread, own_mean, center in zip(moments.m2, moments.mean, mean)
        ]
    )
    counts = map(sum_over_replicas, (moments.positives, moments.negatives))
    return Moments(count, loss, mean, m2, *counts)
