"""How a step of gradient descent changes the mean gradient, the step being tried and not made.

    Delta g = g(theta - lambda g) - g(theta)

g is the mean gradient of the loss, not the direction of descent. The step may move all parameters,
or only those of the layers below the one whose Delta g is asked for: theta^(l-) of section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tf_gsnr.descent.microbatches import divided, total


class Changes(NamedTuple):
    """What the tried steps change; lists have an array per kernel, of the kernel's shape.

    Attributes:
      loss: the mean loss where the weights are, float64.
      gradient: g there.
      whole: Delta g by the step of all parameters.
      below: Delta g by the step of the parameters in the layers below; zero for the first kernel.
    """

    loss: tf.Tensor
    gradient: list
    whole: list
    below: list


def kernels(model) -> dict[str, int]:
    """The model's kernels, by the name of their layer, as places in `trainable_variables`."""
    paths = [v.path.split("/") for v in model.trainable_variables]
    return {path[-2]: place for place, path in enumerate(paths) if path[-1] == "kernel"}


def changes(model, loss_fn, learning_rate: float, microbatches) -> Changes:
    """Tries the steps from where the model's weights are; no variable changes.

    Costs a mean gradient per kernel, and one more.

    Args:
      model: a Keras model whose layers follow one another, run in inference mode.
      loss_fn: `(y_true, y_pred) -> [batch]`, see `models.per_example`.
      learning_rate: lambda.
      microbatches: `(x, y, valid)`, see `microbatches.of_data`.
    """
    start = [v.value for v in model.trainable_variables]
    loss, gradient = mean_gradient(model, loss_fn, start, microbatches)

    def after(moving):
        """The mean gradient after a step of the first `moving` variables."""
        moved = [w - learning_rate * g for w, g in zip(start[:moving], gradient)]
        return mean_gradient(model, loss_fn, moved + start[moving:], microbatches)[1]

    places = list(kernels(model).values())
    first, whole = places[0], after(len(start))
    return Changes(
        loss,
        [gradient[k] for k in places],
        [whole[k] - gradient[k] for k in places],
        [tf.zeros_like(gradient[first])] + [after(k)[k] - gradient[k] for k in places[1:]],
    )


def mean_gradient(model, loss_fn, values, microbatches):
    """The mean loss (float64) and its gradient where the trainable variables have these values."""
    n = tf.math.count_nonzero(microbatches[2], dtype=tf.float64)
    rest = [v.value for v in model.non_trainable_variables]

    def of_microbatch(x, y, valid):
        with tf.GradientTape() as tape:
            tape.watch(values)
            y_pred, _ = model.stateless_call(values, rest, x, training=False)
            losses = tf.where(valid, loss_fn(y, y_pred), 0)
        found = tape.gradient(losses, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return tf.reduce_sum(tf.cast(losses, tf.float64)), found

    return divided(total(of_microbatch, microbatches), n)
