"""Full-batch gradient descent on the per-example loss, with its loop in the graph.

A data set is held as chunks `(x, y, valid)` with leading axes `[chunks, batch]`
(`gradients.stack_chunks`), so that its size is no matter of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tf_gsnr import gradients
from tf_gsnr.gradients.losses import per_example_loss


class Descent(NamedTuple):
    """What `build` returns.

    Attributes:
      descend: `(chunks, steps, last_loss) -> (loss, rises)`: that many steps with the plain
        gradient; `loss` is the mean training loss before the last of them (float64), `rises` how
        often a step began at a higher loss than the one before, `last_loss` for the first.
      moments: `chunks -> Moments` of the per-example gradients, where the weights are.
      step: `gradient -> None`: one step along a given mean gradient.
      losses: `chunks -> [chunks, batch]`, each example's loss.
    """

    descend: Callable
    moments: Callable
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

    def chunk_gradient(x, y, valid):
        with tf.GradientTape() as tape:
            losses = tf.where(valid, loss_fn(y, model(x, training=False)), 0)
            total = tf.reduce_sum(losses)
        found = tape.gradient(total, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # In float32 losses near 2.3 differ by 2e-7, and a step moves them by 1e-4.
        return tf.reduce_sum(tf.cast(losses, tf.float64)), found

    def mean_gradient(x, y, valid):
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

    return Descent(descend, moments, graph(step), losses)
