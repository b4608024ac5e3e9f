"""Trust: per-example gradients must add up to the ordinary gradient, variable by variable.

They are compared on the user's own batch, with the gradient that the real variables have without a
scope. Index letters: n example.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gsnr.gradients import contract

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}  # of others (half precision): 0.1
ROUNDING = {"float64": 1e-12, "float32": 1e-5}  # of sums of gradients that cancel; others 0.05
# What a comparison may find. PENALISED: it agrees, but for the gradient of its regulariser.
ZERO, AGREES, DIFFERS, UNUSED, PENALISED = range(5)


class NotConserved(ValueError):
    """A model that the layer-wise engine cannot measure; the message names what is concerned."""


def precision_of(model) -> str:
    """The least precise dtype in which a layer of the model computes."""
    kinds = {layer.compute_dtype for layer in contract.sublayers(model)} - {None}
    return next((kind for kind in kinds if "16" in kind), model.variable_dtype)


def compared(precision, ours, theirs, noise):
    """Whether a sum of per-example gradients is the ordinary gradient: `ZERO`, `AGREES`, `DIFFERS`.

    `ZERO`, where both are exactly zero or one is not finite, is no agreement: nothing was compared
    with nothing.

    Args:
      precision: of `precision_of`.
      ours, theirs: the mean over examples, of the variable's shape.
      noise: the largest root mean square of the examples' gradients, over the parameters of the
        layer: what cancels (a bias before a batch norm) is known to the rounding of that only.
    """
    error, size, own = (
        tf.cast(tf.reduce_max(tf.abs(v)), tf.float64) for v in (ours - theirs, theirs, ours)
    )
    noise = tf.cast(noise, tf.float64)
    small = TOLERANCE.get(precision, 0.1) * size + ROUNDING.get(precision, 0.05) * noise
    nothing = (size == 0) & (own == 0) | ~tf.math.is_finite(error)
    return tf.where(nothing, ZERO, tf.where(error <= small, AGREES, DIFFERS))


def by_layer(variables, spreads) -> list:
    """Per variable the largest of the spreads in its layer."""
    largest = {}
    for variable, spread in zip(variables, spreads):
        layer = variable.path.rpartition("/")[0]
        largest[layer] = tf.maximum(tf.cast(spread, tf.float64), largest.get(layer, 0.0))
    return [largest[v.path.rpartition("/")[0]] for v in variables]
