"""What `GSNRCallback` measures, as plain functions of a model and a fixed set of examples.

Index letters: n example of the probe set, j parameter, N training examples.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr import metrics
from tf_gsnr.gradients import examples, losses
from tf_gsnr.gradients.measure import gradient_moments
from tf_gsnr.moments import Moments
from tf_gsnr.training import gap
from tf_gsnr.training.sample import Sample


def check_fits(model, x, name: str):
    """Raises ValueError where the arrays are not what the model takes, as far as it says."""
    expected = getattr(model, "inputs", None)  # a subclassed model takes what its call takes
    if isinstance(x, examples.Batches):
        x = x.batches[0][0]
    preprocesses = getattr(model, "preprocessor", None) is not None
    if not expected or isinstance(x, dict) or preprocesses:
        return
    given = tf.nest.flatten(x)
    if len(expected) != len(given):
        raise ValueError(
            f"{name}: the probe set has {len(given)} inputs, model {model.name!r} takes "
            f"{len(expected)}"
        )
    for one, takes in zip(given, expected):
        if one is not None and not _fits(tuple(one.shape)[1:], takes.shape[1:]):
            raise ValueError(
                f"{name}: the probe set's examples have shape {tuple(one.shape)[1:]}, model "
                f"{model.name!r} takes {takes.shape[1:]}"
            )


def _fits(given, takes):
    """Whether Keras takes an example of one shape for the other; it mends a last axis of one."""
    if len(given) + 1 == len(takes) and takes[-1] == 1:
        given = (*given, 1)
    elif len(given) == len(takes) + 1 and given[-1] == 1:
        given = given[:-1]
    return len(given) == len(takes) and all(None in (g, t) or g == t for g, t in zip(given, takes))


def measure(model, x, y, **options) -> tuple[Moments, dict]:
    """Moments of the probe set at the model's present parameters, and their flat record."""
    moments = gradient_moments(model, x, y, **options)
    return moments, metrics.summarize(moments, model)


def loss_function(model, loss=None):
    """Returns `fn(x, y) -> float`: the mean loss in inference mode, summed in float64."""
    of_batch = losses.of_batch(model, loss)

    @tf.function(autograph=False, reduce_retracing=True)
    def total(x, y, sample_weight, valid):
        predictions = model(x, training=False)
        each = losses.of_examples(of_batch, x, y, predictions, sample_weight)
        return tf.reduce_sum(tf.cast(tf.where(valid, each, 0), tf.float64))

    def mean(x, y, batch_size):
        given = examples.as_fit_gives_them(model, x, y, None, batch_size)
        batches = examples.micro_batches(*given, batch_size)
        return sum(float(total(*batch)) for batch in batches) / examples.count(x)

    return mean


def predicted_growth(moments: Moments, optimizer, examples: int) -> float:
    """By how much the optimiser's last step is expected to widen the gap; see `gap.py`.

    Args:
      moments: at the parameters before the step.
      optimizer: after the step.
      examples: N, the number of training examples.
    """
    sample = Sample([np.shape(g) for g in moments.mean])  # of all
    factors = gap.preconditioner(optimizer, moments.mean, sample)
    variances = sample.take(moments.variance(1))
    return float(gap.expected(variances, sample.sums(variances), factors, sample)) / examples
