"""Full-batch gradient descent on the per-example loss, with its loop in the graph.

A data set is held as micro-batches `(x, y, valid)` (`microbatches`). M models of one network
descend as one program, each on a training set of its own (`build_ensemble`); a single model is
M = 1 (`build`).

With batch normalisation the statistics are those of the whole training set, at evaluation too. The
set is then one batch of the forward and of the backward pass; the gradient flows through its
statistics (`directional_variance` has the mathematics).

Index letters: m replica (M in all).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gsnr import metrics
from tf_gsnr.descent import directional_variance, ensemble, microbatches
from tf_gsnr.gradients import network, recalibration


class Ensemble(NamedTuple):
    """What `build_ensemble` returns: functions of the M models' weights.

    `weights` are the arrays of `model.get_weights()`, `own` are micro-batches `(x, y, valid)`, each
    but `valid` with a leading axis M: the training sets are of one size.

    Attributes:
      descend: `(weights, own, steps, last_loss) -> (weights, loss, rises)`: that many steps with
        the plain gradient; `loss` `[M]` is the mean training loss before the last of them
        (float64), `rises` `[M]` how often a step began at a higher loss than the one before,
        `last_loss` `[M]` for the first.
      recalibrate: `(weights, own) -> weights`, with the batch-norm statistics of the training set;
        what `moments` and `losses` use. Nothing changes without batch normalisation.
      moments: `(weights, own) -> Moments` of the per-example gradients, each with an axis M.
      terms: `(weights, own, moments, seeds) -> (gradient, [dict] * M)`: the gradient of the
        training loss, and the two sums of (19), `noise` and `signal`; with batch normalisation also
        those of `moments`, `noise_frozen` and `signal_frozen`. The seeds `[M, 2]` draw directions.
      step: `(weights, gradient) -> weights`: one step along given mean gradients.
      loss: `(weights, own) -> [M]`, the mean training loss (float64).
      losses: `(weights, data) -> [M, micro-batches, batch]`, each example's loss on one data set
        that all models share.
    """

    descend: Callable
    recalibrate: Callable
    moments: Callable
    terms: Callable
    step: Callable
    loss: Callable
    losses: Callable


def build_ensemble(
    model, loss, learning_rate: float, m: int, *, engine="auto", jit_compile=False
) -> Ensemble:
    """Gradient descent `theta <- theta - learning_rate g` of many models on mean losses.

    Args:
      model: a built Keras model, run in inference mode; its own weights are neither read nor
        changed.
      loss: see `tf_gsnr.gradient_moments`.
      learning_rate: lambda.
      m: how many models. XLA compiles the descent of several, whatever `jit_compile` is.
      engine, jit_compile: see `tf_gsnr.gradient_moments`.
    """
    of_microbatch = microbatches.of_microbatch(model, loss, engine)
    trainable, each = of_microbatch.trainable, ensemble.each
    normalized = bool(network.all_batch_norms(model))

    def step(weights, gradient):
        weights = list(weights)
        for k, g in zip(trainable, gradient):
            weights[k] -= learning_rate * tf.cast(g, weights[k].dtype)
        return weights

    def batched(x, y, valid):
        """As they go through the network together: all at once, where they share statistics."""
        if not normalized:
            return x, y, valid
        x, y = (tf.reshape(v, [v.shape[0], 1, -1, *v.shape[3:]]) for v in (x, y))
        return x, y, tf.reshape(valid, [1, -1])

    def descend(own, shared):
        (weights, x, y, last_loss), (valid, steps) = own, shared
        x, y, valid = batched(x, y, valid)
        n = tf.math.count_nonzero(valid, dtype=tf.float64)

        def mean_gradient(weights):
            sums = microbatches.over(
                of_microbatch.gradient, microbatches.plus, weights, x, y, valid
            )
            return microbatches.divided(sums, n)

        return loop(mean_gradient, step, weights, last_loss, steps)

    def recalibrate(own, shared):
        def one(weights, x, y, valid):
            with of_microbatch.at(weights):
                _, statistics = recalibration.forward(model, x, valid)
            by_variable = {id(variable): value for variable, value in statistics}
            return [by_variable.get(id(v), w) for v, w in zip(model.weights, weights)]

        weights, x, y, valid = own[0], *batched(*own[1:], *shared)
        return each(lambda w, x, y: one(w, x[0], y[0], valid[0]), weights, x, y)

    def normalized_sums(own, shared):
        def noise(weights, x, y, valid, seed):
            parameters = [weights[k] for k in trainable]
            return directional_variance.summed_variance(
                lambda: of_microbatch.training_losses(weights, x, y, valid), parameters, valid, seed
            )

        weights, seeds, (x, y, valid) = own[0], own[3], batched(*own[1:3], *shared)
        n = tf.math.count_nonzero(valid, dtype=tf.float64)
        total = each(lambda w, x, y, s: noise(w, x[0], y[0], valid[0], s), weights, x, y, seeds)
        _, gradient = microbatches.over(
            of_microbatch.gradient, microbatches.plus, weights, x, y, valid
        )
        return microbatches.divided(gradient, n), total / n

    def moments(own, shared):
        return microbatches.over(of_microbatch.moments, microbatches.merge, *own, *shared)

    def mean_loss(own, shared):
        n = tf.math.count_nonzero(*shared, dtype=tf.float64)
        return microbatches.over(of_microbatch.loss, microbatches.plus, *own, *shared) / n

    def losses(own, shared):
        def microbatch(data):
            return each(lambda weights: of_microbatch.losses(weights, *data), *own)

        (weights,), (x, y, valid) = own, shared
        shape = [weights[0].shape[0], valid.shape[1]]
        signature = tf.TensorSpec(shape, weights[0].dtype)
        each_loss = tf.map_fn(
            microbatch,
            (x, y),
            fn_output_signature=signature,
            parallel_iterations=microbatches.SIDE_BY_SIDE,
        )
        return tf.transpose(each_loss, [1, 0, 2])

    def grouped(function, x_of, jit_compile):
        def size_of(own, shared):
            return ensemble.group_size(model, x_of(own, shared))

        return ensemble.grouped(function, size_of, jit_compile)

    def own_x(own, shared):
        return own[1][0, 0]

    fused = jit_compile or m > 1
    descend = grouped(descend, own_x, fused)
    mean_loss = grouped(mean_loss, own_x, jit_compile)
    losses = grouped(losses, lambda own, shared: shared[0][0], fused)
    # An engine chooses its way by what it finds in the data, which has no vectorised form; and
    # moments are rare.
    moments = ensemble.grouped(moments, lambda own, shared: 1, jit_compile)
    recalibrate = ensemble.grouped(recalibrate, lambda own, shared: 1, jit_compile)
    normalized_sums = ensemble.grouped(normalized_sums, lambda own, shared: 1, jit_compile)

    def sums(moments):
        for r in range(len(moments.loss)):
            yield metrics.osgr_terms(
                tf.nest.map_structure(lambda v, r=r: np.asarray(v)[r], moments)
            )

    def plain_terms(weights, own, moments, seeds):
        return moments.mean, [dict(noise=noise, signal=signal) for noise, signal in sums(moments)]

    def normalized_terms(weights, own, moments, seeds):
        gradient, noise = of(normalized_sums)(weights, own, tf.constant(seeds))
        terms = [
            dict(
                noise=float(noise[r]),
                signal=sum(np.sum(np.square(g[r], dtype=np.float64)) for g in gradient),
                noise_frozen=noise_frozen,
                signal_frozen=signal_frozen,
            )
            for r, (noise_frozen, signal_frozen) in enumerate(sums(moments))
        ]
        return gradient, terms

    def of(function):
        """As functions of the weights and of micro-batches `(x, y, valid)` are called."""

        def called(weights, own, *more, shared=()):
            x, y, valid = own
            return function((list(weights), x, y, *more), (valid, *shared))

        return called

    def descended(weights, own, steps, last_loss):
        return of(descend)(weights, own, last_loss, shared=(steps,))

    def losses_of(weights, data):
        return losses((list(weights),), tuple(data))

    return Ensemble(
        descend=descended,
        recalibrate=of(recalibrate) if normalized else lambda weights, own: weights,
        moments=of(moments),
        terms=normalized_terms if normalized else plain_terms,
        step=step,
        loss=of(mean_loss),
        losses=losses_of,
    )


def loop(mean_gradient, step, weights, last_loss, steps):
    """That many steps in the graph; `(weights, loss, rises)`, as `descend` of `Ensemble` has them.

    Args:
      mean_gradient: `weights -> (loss, gradient)`, of the training set.
      step: `(weights, gradient) -> weights`.
      weights, last_loss, steps: see `Ensemble`.
    """

    def body(i, weights, previous, rises):
        loss, gradient = mean_gradient(weights)
        return i + 1, step(weights, gradient), loss, rises + tf.cast(loss > previous, tf.int32)

    return tf.while_loop(
        lambda i, *_: i < steps,
        body,
        (0, list(weights), last_loss, tf.zeros_like(last_loss, tf.int32)),
        parallel_iterations=1,
    )[1:]


class Descent(NamedTuple):
    """What `build` returns: functions of one model, where its weights are.

    Attributes:
      descend: `(data, steps, last_loss) -> (loss, rises)`, as in `Ensemble`.
      moments: `data -> Moments` of the per-example gradients.
      step: `gradient -> None`: one step along a given mean gradient.
      losses: `data -> [micro-batches, batch]`, each example's loss.
    """

    descend: Callable
    moments: Callable
    step: Callable
    losses: Callable


def build(model, loss, learning_rate: float, *, engine="auto", jit_compile=False) -> Descent:
    """Gradient descent of one model, whose weights it reads and assigns; see `build_ensemble`."""
    one = build_ensemble(model, loss, learning_rate, 1, engine=engine, jit_compile=jit_compile)

    def weights():
        return [tf.expand_dims(v.value, 0) for v in model.weights]

    def own(data):
        x, y, valid = data
        return tf.expand_dims(x, 0), tf.expand_dims(y, 0), valid

    def assign(weights):
        for variable, value in zip(model.weights, weights):
            variable.assign(value[0])

    graph = tf.function(autograph=False)  # else the axis that comes and goes costs more than a step

    @graph
    def descend(data, steps, last_loss):
        new_weights, loss, rises = one.descend(weights(), own(data), steps, last_loss[tf.newaxis])
        assign(new_weights)
        return loss[0], rises[0]

    @graph
    def moments(data):
        return tf.nest.map_structure(lambda v: v[0], one.moments(weights(), own(data)))

    @graph
    def step(gradient):
        assign(one.step(weights(), [g[tf.newaxis] for g in gradient]))

    @graph
    def losses(data):
        return one.losses(weights(), data)[0]

    return Descent(descend, moments, step, losses)
