"""Full-batch gradient descent on the per-example loss, with its loop in the graph.

A data set is held as chunks `(x, y, valid)` with leading axes `[chunks, batch]`
(`gradients.stack_chunks`), so that its size is no matter of memory.

With batch normalisation the statistics are those of the whole training set, at evaluation too. The
set is then one batch of the forward and of the backward pass; the gradient flows through its
statistics (`slopes` has the mathematics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tf_gsnr import gradients, metrics
from tf_gsnr.experiments import slopes
from tf_gsnr.gradients import recalibration
from tf_gsnr.gradients.losses import per_example_loss


class Descent(NamedTuple):
    """What `build` returns.

    Attributes:
      descend: `(chunks, steps, last_loss) -> (loss, rises)`: that many steps with the plain
        gradient; `loss` is the mean training loss before the last of them (float64), `rises` how
        often a step began at a higher loss than the one before, `last_loss` for the first.
      recalibrate: `chunks -> None`: sets the batch-norm statistics to those of these data; what
        `moments` and `losses` use. Nothing to do without batch normalisation.
      moments: `chunks -> Moments` of the per-example gradients, where the weights are.
      terms: `(chunks, moments, seed) -> (gradient, terms)`: the gradient of the training loss, and
        the two sums of (19), `noise` and `signal`; with batch normalisation also those of
        `moments`, `noise_frozen` and `signal_frozen`. The `seed`, two integers, draws directions.
      step: `gradient -> None`: one step along a given mean gradient.
      losses: `chunks -> [chunks, batch]`, each example's loss.
    """

    descend: Callable
    recalibrate: Callable
    moments: Callable
    terms: Callable
    step: Callable
    losses: Callable


def build(model, loss, learning_rate: float, *, engine="auto", jit_compile=False) -> Descent:
    """Gradient descent `theta <- theta - learning_rate g` of a model on mean losses.

    Args:
      model: a built Keras model, run in inference mode.
      loss: see `tf_gsnr.gradient_moments`.
      learning_rate: lambda.
      engine, jit_compile: see `tf_gsnr.gradient_moments`.
    """
    loss_fn = per_example_loss(loss, model)
    measure = gradients.build_engine(model, loss, engine=engine, sign_counts=True)
    variables = model.trainable_variables
    normalized = bool(recalibration.batch_norm_layers(model))

    def chunk_gradient(x, y, valid):
        with tf.GradientTape() as tape:
            predictions, _ = recalibration.forward(model, x, valid)
            losses = tf.where(valid, loss_fn(y, predictions), 0)
            total = tf.reduce_sum(losses)
        found = tape.gradient(total, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # In float32 losses near 2.3 differ by 2e-7, and a step moves them by 1e-4.
        return tf.reduce_sum(tf.cast(losses, tf.float64)), found

    def mean_gradient(x, y, valid):
        if normalized:
            x, y, valid = (v[None] for v in _whole(x, y, valid))
        n = tf.math.count_nonzero(valid, dtype=tf.float64)

        def body(i, loss, gradient):
            more_loss, more = chunk_gradient(x[i], y[i], valid[i])
            return i + 1, loss + more_loss, [a + b for a, b in zip(gradient, more)]

        start = (1, *chunk_gradient(x[0], y[0], valid[0]))
        if valid.shape[0] != 1:
            start = tf.while_loop(lambda i, *_: i < tf.shape(valid)[0], body, start)
        _, loss, gradient = start
        return loss / n, [g / tf.cast(n, g.dtype) for g in gradient]

    def step(gradient):
        for variable, g in zip(variables, gradient):
            variable.assign_sub(learning_rate * tf.cast(g, variable.dtype))

    def graph(function):
        # A grid goes through data sets of several sizes: after the second, one trace serves all.
        return tf.function(
            function, jit_compile=jit_compile, autograph=False, reduce_retracing=True
        )

    @graph
    def descend(chunks, steps, last_loss):
        def body(i, previous, rises):
            loss, gradient = mean_gradient(*chunks)
            step(gradient)
            return i + 1, loss, rises + tf.cast(loss > previous, tf.int32)

        _, loss, rises = tf.while_loop(
            lambda i, *_: i < steps, body, (0, last_loss, 0), parallel_iterations=1
        )
        return loss, rises

    @graph
    def recalibrate(chunks):
        x, _, valid = _whole(*chunks)
        for variable, value in recalibration.forward(model, x, valid)[1]:
            variable.assign(value)

    @graph
    def moments(chunks):
        return gradients.accumulate(measure, model, chunks, sign_counts=True)

    @graph
    def losses(chunks):
        x, y, valid = chunks
        return tf.map_fn(
            lambda chunk: loss_fn(chunk[1], model(chunk[0], training=False)),
            (x, y),
            fn_output_signature=tf.TensorSpec(valid.shape[1:], variables[0].dtype),
            parallel_iterations=1,
        )

    @graph
    def total_terms(chunks, seed):
        x, y, valid = _whole(*chunks)

        def losses_of():
            return loss_fn(y, recalibration.forward(model, x, valid)[0])

        parameters = [v.value for v in variables]
        noise = slopes.summed_variance(losses_of, parameters, valid, seed)
        _, gradient = mean_gradient(*chunks)
        signal = tf.add_n([tf.reduce_sum(tf.square(tf.cast(g, tf.float64))) for g in gradient])
        return gradient, noise / tf.math.count_nonzero(valid, dtype=tf.float64), signal

    def plain_terms(chunks, moments, seed):
        return moments.mean, dict(zip(("noise", "signal"), metrics.osgr_terms(moments)))

    def normalized_terms(chunks, moments, seed):
        gradient, noise, signal = total_terms(chunks, tf.constant(seed))
        frozen = zip(("noise_frozen", "signal_frozen"), metrics.osgr_terms(moments))
        return gradient, dict(noise=float(noise), signal=float(signal), **dict(frozen))

    if normalized:
        return Descent(descend, recalibrate, moments, normalized_terms, graph(step), losses)
    return Descent(descend, lambda chunks: None, moments, plain_terms, graph(step), losses)


def _whole(*chunks):
    """Chunks `[chunks, batch, ...]` as one batch `[chunks * batch, ...]`."""
    return [tf.reshape(v, [-1, *v.shape[2:]]) for v in chunks]
