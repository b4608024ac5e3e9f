"""Term (28): what learning the layers below does to the mean gradient of a layer's weights.

A fully connected layer has o_s = sum_c W_sc a_c + b_s (26) and, with the error delta_s = dL/do_s,
the mean gradient g_sc = 1/n sum_i delta_is a_ic. The layers below it learn through W alone:

    g_p = sum_sc W_sc A_sc,p    with    A_sc,p = 1/n sum_i delta_is da_ic/dtheta_p

A gradient-descent step of them alone, theta_p <- theta_p - lambda g_p, changes features and errors,
and so, to first order in lambda (27),

    Delta g_sc = - lambda W_sc sum_p A_sc,p^2                              own weight: (28)
                 - lambda sum_p A_sc,p sum_{s'c' != sc} W_s'c' A_s'c',p    other weights
                 + 1/n sum_i a_ic Delta delta_is                           errors

The first two lines are the features' change, 1/n sum_i delta_is Delta a_ic. Only the first has a
sign: against that of W_sc. A relu at the layer's own output adds what no derivative shows: the
examples that a step carries over its kink, whose number is of first order, too.

Index letters: i example, c feature (the layer's input), s its output, p parameter of a layer below.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import tensorflow as tf

from tf_gsnr.descent.microbatches import total
from tf_gsnr.gradients.vectorized.converters import vectorised_ops


class Terms(NamedTuple):
    """First-order parts of Delta g, each of the kernel's shape `[c, s]`; they add up to it.

    Attributes:
      own_weight: term (28).
      other_weights: the features' change that is due to the layer's other weights.
      errors: the errors' change.
    """

    own_weight: tf.Tensor
    other_weights: tf.Tensor
    errors: tf.Tensor


def feature_terms(model, layer, loss_fn, learning_rate: float, microbatches) -> Terms:
    """The parts of the change of a kernel's mean gradient by a step of the layers below alone.

    Costs a backward pass per weight of the kernel; memory for `[c, p]`, one output s at a time.

    Args:
      model: a `keras.Sequential`, run in inference mode.
      layer: a `Dense` layer of it, with trainable layers below.
      loss_fn: `(y_true, y_pred) -> [batch]`, see `models.per_example`.
      learning_rate: lambda.
      microbatches: `(x, y, valid)`, see `microbatches.of_data`.

    Returns:
      `Terms` of the kernel's shape and dtype.

    Raises:
      ValueError: a model or layer that has no such term.

    Example:

    >>> import numpy as np
    >>> from tf_gsnr.gradients import examples
    >>> from tf_gsnr.models import per_example
    >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(3), keras.layers.Dense(1)])
    >>> data = examples.stack_microbatches(np.ones([4, 2], "f4"), np.ones([4, 1], "f4"), 4)
    >>> terms = feature_terms(model, model.layers[1], per_example("mse"), 0.1, data)
    >>> terms.own_weight.shape, bool(tf.reduce_all(terms.own_weight * model.layers[1].kernel <= 0))
    (TensorShape([3, 1]), True)
    """
    below, above = _split(model, layer)
    kernel = tf.convert_to_tensor(layer.kernel)
    parameters = [v.value for one in below for v in one.trainable_variables]
    n = tf.math.count_nonzero(microbatches[2], dtype=kernel.dtype)

    def features(x):
        for one in below:
            x = one(x, training=False)
        return x

    def errors(a, y, valid):
        """delta, `[i, s]`; zero where there is no example."""
        outputs = a @ kernel + (0 if layer.bias is None else layer.bias)
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            y_pred = layer.activation(outputs)
            for one in above:
                y_pred = one(y_pred, training=False)
            loss = tf.reduce_sum(tf.where(valid, loss_fn(y, y_pred), 0))
        return tape.gradient(loss, outputs)

    def jacobian(s):
        """A_sc,p of one output, `[c, *shape of p]` for each parameter."""

        def of_microbatch(x, y, valid):
            with tf.GradientTape() as tape:
                a = features(x)
                delta = tf.stop_gradient(errors(a, y, valid))[:, s]
                mean = tf.einsum("ic,i->c", a, delta) / n
            with vectorised_ops():
                return tape.jacobian(mean, parameters)

        return total(of_microbatch, microbatches)

    def of_output(s, squares, gradient):
        found = jacobian(s)
        square = tf.add_n([tf.reduce_sum(A**2, axis=range(1, A.shape.rank)) for A in found])
        through = [tf.tensordot(kernel[:, s], A, 1) for A in found]
        return s + 1, squares.write(s, square), [g + more for g, more in zip(gradient, through)]

    width = kernel.shape[1]
    _, squares, gradient = tf.while_loop(
        lambda s, *_: s < width,
        of_output,
        (0, tf.TensorArray(kernel.dtype, width), [tf.zeros_like(p) for p in parameters]),
        parallel_iterations=1,
    )

    def changes(x, y, valid):
        step = [-learning_rate * g for g in gradient]
        with tf.autodiff.ForwardAccumulator(parameters, step) as forward:
            a = features(x)
            delta = errors(a, y, valid)
        product = "ic,is->cs"
        through_features = tf.einsum(product, forward.jvp(a), delta) / n
        return [through_features, tf.einsum(product, a, forward.jvp(delta)) / n]

    through_features, through_errors = total(changes, microbatches)
    own_weight = -learning_rate * kernel * tf.transpose(squares.stack())  # (28)
    return Terms(own_weight, through_features - own_weight, through_errors)


def _split(model, layer):
    """The layers below and above a layer."""
    if not isinstance(model, keras.Sequential) or layer not in model.layers:
        raise ValueError(
            f"model {model.name!r}, layer {layer.name!r}: expected a keras.Sequential and a layer "
            "of it"
        )
    if not isinstance(layer, keras.layers.Dense):
        raise ValueError(
            f"layer {layer.name!r} is a {type(layer).__name__}: (28) is about a fully connected "
            "layer, a Dense"
        )
    place = model.layers.index(layer)
    below = model.layers[:place]
    if not any(one.trainable_variables for one in below):
        raise ValueError(f"layer {layer.name!r} has no trainable layers below it")
    return below, model.layers[place + 1 :]
