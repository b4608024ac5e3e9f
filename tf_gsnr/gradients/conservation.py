"""Trust: per-example gradients must add up to the ordinary gradient, variable by variable.

They are compared on the user's own batch, with the gradient that the real variables have without a
scope. Index letters: n example.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}  # of others (half precision): 0.1
ROUNDING = {"float64": 1e-12, "float32": 1e-5}  # of sums of gradients that cancel; others 0.05
NOTHING = {"float64": 1e-14, "float32": 1e-6}  # of the model's largest gradients; others 0.01
ZERO, UNUSED, AGREES, DIFFERS = range(4)  # what a comparison may find, the worst last


class NotConserved(ValueError):
    """A model that the layer-wise engine cannot measure; the message names what is concerned."""


def compared(variables, precision, ours, theirs, variances):
    """Whether sums of per-example gradients are the ordinary gradients, int32 `[variables]`.

    `ZERO`, where both are zero or one is not finite, is no agreement: nothing was compared with
    nothing. So it is where they differ by rounding of the rest of the model's gradients, as behind
    a layer through which, in exact numbers, no gradient passes.

    Args:
      variables: of which, for their layers.
      precision: of `precision_of`.
      ours, theirs: per variable the mean over examples, of the variable's shape.
      variances: per variable the largest over its parameters. With the mean it says how large
        single gradients are: what cancels (a bias before a batch norm) is known to the rounding of
        its layer's only.
    """
    error, size = (
        stacked([tf.reduce_max(tf.abs(v)) for v in values])
        for values in ([a - b for a, b in zip(ours, theirs)], theirs)
    )
    return judged(variables, precision, error, size, stacked(variances))


def judged(variables, precision, error, size, variances):
    """The same from the largest difference, and from the largest of theirs.

    Args:
      error, size, variances: float64 `[variables]`.
    """
    spreads = tf.sqrt(variances + size**2)
    layers = {}
    index = [layers.setdefault(v.path.rpartition("/")[0], len(layers)) for v in variables]
    noise = tf.gather(tf.math.unsorted_segment_max(spreads, index, len(layers)), index)
    small = TOLERANCE.get(precision, 0.1) * size + ROUNDING.get(precision, 0.05) * noise
    least = NOTHING.get(precision, 0.01) * tf.reduce_max(tf.where(spreads < np.inf, spreads, 0))
    nothing = (size == 0) & (error == 0) | ~tf.math.is_finite(error)
    differs = tf.where(error <= least, ZERO, DIFFERS)
    return tf.where(nothing, ZERO, tf.where(error <= small, AGREES, differs))


def stacked(scalars):
    """In float64, cast one by one only where they are not of one dtype already."""
    scalars = [tf.convert_to_tensor(v) for v in scalars]
    if len({v.dtype for v in scalars}) > 1:
        scalars = [tf.cast(v, tf.float64) for v in scalars]
    return tf.cast(tf.stack(scalars), tf.float64)
