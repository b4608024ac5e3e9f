"""What `GSNRCallback` measures, as plain functions of a model and a fixed set of examples.

Index letters: n example of the probe set, j parameter, N training examples.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr import metrics
from tf_gsnr.gradients import gradient_moments
from tf_gsnr.gradients.losses import per_example_loss
from tf_gsnr.moments import Moments
from tf_gsnr.training import gap


def check_fits(model, x, name: str):
    """Raises ValueError where the arrays are not what the model takes, as far as it says."""
    try:
        expected = model.input_shape
    except AttributeError:  # subclassed: it takes what its call takes
        return
    expected = expected if isinstance(expected, list) else [expected]
    given = [np.shape(v) for v in tf.nest.flatten(x)]
    if isinstance(x, dict) or any(isinstance(shape, dict) for shape in expected):
        return
    if len(expected) != len(given):
        raise ValueError(
            f"{name}: the probe set has {len(given)} inputs, model {model.name!r} takes "
            f"{len(expected)}"
        )
    for one, shape in zip(given, expected):
        fits = len(one) == len(shape) and all(s in (None, g) for g, s in zip(one, shape))
        if not fits and not (len(one) + 1 == len(shape) and shape[-1] == 1):
            raise ValueError(
                f"{name}: the probe set's examples have shape {one[1:]}, model {model.name!r} "
                f"takes {shape[1:]}"
            )


def measure(model, x, y, **options) -> tuple[Moments, dict]:
    """Moments of the probe set at the model's present parameters, and their flat record."""
    moments = gradient_moments(model, x, y, **options)
    return moments, metrics.summarize(moments, model)


def loss_function(model, loss=None):
    """Returns `fn(x, y) -> float`: the mean loss in inference mode, summed in float64."""
    per_example = per_example_loss(loss, model)

    @tf.function(autograph=False, reduce_retracing=True)
    def total(x, y):
        return tf.reduce_sum(tf.cast(per_example(y, model(x, training=False)), tf.float64))

    def mean(x, y, batch_size):
        n = len(tf.nest.flatten(y)[0])

        def rows(value, i):
            return tf.nest.map_structure(
                lambda v: tf.convert_to_tensor(v[i : i + batch_size]), value
            )

        sums = [float(total(rows(x, i), rows(y, i))) for i in range(0, n, batch_size)]
        return sum(sums) / n

    return mean


def predicted_growth(moments: Moments, optimizer, examples: int) -> float:
    """By how much the optimiser's last step is expected to widen the gap; see `gap.py`.

    Args:
      moments: at the parameters before the step.
      optimizer: after the step.
      examples: N, the number of training examples.
    """
    factors = gap.preconditioner(optimizer, [tf.convert_to_tensor(g) for g in moments.mean])
    variances = [tf.convert_to_tensor(v) for v in moments.variance(1)]
    return float(gap.expected(variances, factors)) / examples


def osgr_for(moments: Moments, examples: int) -> float:
    """Predicted OSGR (19) of a training set of N examples, from the moments of any number.

    R = |G|^2 / (|G|^2 + tr(Sigma) / N)     with unbiased |G|^2 and tr(Sigma)
    """
    trace = sum(float(np.sum(v, dtype=np.float64)) for v in moments.variance(1))
    square = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in moments.mean)
    signal = square - trace / int(moments.count)
    return signal / (signal + trace / examples)
