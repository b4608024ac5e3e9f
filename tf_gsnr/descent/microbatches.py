"""Sums over the micro-batches of a data set, of one network's losses, gradients and moments.

A data set is held as micro-batches, `(x, y, valid)` with leading axes `[micro-batches, batch]`
(`of_data`), so that its size is no matter of memory. The weights are arguments, the arrays of
`model.get_weights()`: the model's own are neither read nor changed.

Index letters: m replica (M in all), i micro-batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from tf_gsnr.descent.ensemble import each
from tf_gsnr.gradients import engines, examples, recalibration
from tf_gsnr.models import per_example
from tf_gsnr.moments import Moments

# Chunks in work at a time: where one waits, on what a single core does, the other goes on. The
# descent of table 2's network took 117 ms a step with 1, 104 with 2, 102 with 3 (n = 5000, p = 6,
# two cores).
SIDE_BY_SIDE = 2


def of_data(x, y, size: int) -> tuple:
    """`(x, y, valid)`, tensors, of a data set's arrays: `size` examples a micro-batch, none empty.

    >>> [v.shape.as_list() for v in of_data(tf.zeros([5, 2]).numpy(), tf.zeros([5]).numpy(), 2)]
    [[3, 2, 2], [3, 2], [3, 2]]
    """
    return tuple(map(tf.constant, examples.stack_microbatches(x, y, size)))


class OfMicrobatch(NamedTuple):
    """What `of_microbatch` returns: functions of one model's weights and of one micro-batch.

    Attributes:
      at: `weights -> ` a scope in which the model has them.
      trainable: where in the weights the trainable ones are.
      losses: `(weights, x, y) -> [batch]`.
      training_losses: `(weights, x, y, valid) -> [batch]`, under batch normalisation with the
        micro-batch's own statistics.
      loss: `(weights, x, y, valid) -> ` the sum of `losses` (float64).
      gradient: `(weights, x, y, valid) -> (loss, gradient)`, sums of `training_losses`.
      moments: `(weights, x, y, valid) -> Moments`.
    """

    at: Callable
    trainable: list
    losses: Callable
    training_losses: Callable
    loss: Callable
    gradient: Callable
    moments: Callable


def of_microbatch(model, loss, engine="auto") -> OfMicrobatch:
    """A built Keras model, run in inference mode; for `loss`, `engine` see `gradient_moments`."""
    loss_fn = per_example(loss)
    measure = engines.build(model, loss, engine=engine, sign_counts=True)
    places = {id(v): k for k, v in enumerate(model.weights)}
    trainable = [places[id(v)] for v in model.trainable_variables]

    def at(weights):
        return keras.StatelessScope(state_mapping=list(zip(model.weights, weights)))

    def losses(weights, x, y):
        with at(weights):
            return loss_fn(y, model(x, training=False))

    def summed(losses, valid):
        # In float32 losses near 2.3 differ by 2e-7, and a step moves them by 1e-4.
        return tf.reduce_sum(tf.cast(tf.where(valid, losses, 0), tf.float64))

    def summed_loss(weights, x, y, valid):
        return summed(losses(weights, x, y), valid)

    def training_losses(weights, x, y, valid):
        with at(weights):
            predictions, _ = recalibration.forward(model, x, valid)
            return loss_fn(y, predictions)

    def gradient(weights, x, y, valid):
        parameters = [weights[k] for k in trainable]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameters)
            losses = training_losses(weights, x, y, valid)
            total = tf.reduce_sum(tf.where(valid, losses, 0))
        gradients = tape.gradient(
            total, parameters, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return summed(losses, valid), [tf.convert_to_tensor(g) for g in gradients]

    def moments(weights, x, y, valid):
        with at(weights):
            return measure(x, y, None, valid).moments

    return OfMicrobatch(
        at,
        trainable,
        _apart(losses),
        training_losses,
        _apart(summed_loss),
        _apart(gradient),
        _apart(moments),
    )


def _apart(function):
    """The function as a graph of its own, which the graph that calls it does not take in.

    In the graph of a loop, which has cycles, TensorFlow turns the gradient of a max-pooling into
    oneDNN's only by luck: otherwise it takes three times as long, and a descent a quarter longer.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def over(function, add, weights, x, y, valid):
    """`function` of each replica and micro-batch, added up over the micro-batches.

    Args:
      function: of `OfMicrobatch`: of one replica and one micro-batch.
      add: of two of its results, each with a leading axis M.
      weights, x, y: with a leading axis M; before the axis of micro-batches where there is one.
      valid: `[micro-batches, batch]`.
    """

    def microbatch(i):
        return each(lambda w, x, y: function(w, x[i], y[i], valid[i]), weights, x, y)

    return _added_up(microbatch, valid.shape[0], add)


def total(function, data):
    """The sum over the micro-batches of `function(x, y, valid)`, nested tensors."""
    return _added_up(lambda i: function(*(v[i] for v in data)), data[2].shape[0], plus)


def _added_up(microbatch, number, add):
    if number == 1:
        return microbatch(0)
    return tf.while_loop(
        lambda i, _: i < number,
        lambda i, found: (i + 1, add(found, microbatch(i))),
        (1, microbatch(0)),
        parallel_iterations=SIDE_BY_SIDE,
    )[1]


def plus(a, b):
    return tf.nest.map_structure(operator.add, a, b)


def divided(sums, n):
    """Nested sums over n examples -> means."""
    return tf.nest.map_structure(lambda v: v / tf.cast(n, v.dtype), sums)


def merge(a: Moments, b: Moments) -> Moments:
    """Of each replica; axes M."""
    return each(Moments.merge, a, b)
