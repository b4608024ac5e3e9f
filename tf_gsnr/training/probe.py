"""What `GSNRCallback` measures, as plain functions of a model and a fixed set of examples.

Index letters: n example of the probe set, j parameter, N training examples.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import examples, losses, network
from tf_gsnr.moments import Moments
from tf_gsnr.training import gap
from tf_gsnr.training.sample import Sample


def check_fits(model, x, name: str):
    """Raises ValueError where the arrays are not what the model takes, as far as it says."""
    if isinstance(x, examples.Batches):
        x = x.batches[0][0]
    network.check_inputs(model, x, name)


def loss_function(model, loss=None):
    """Returns `fn(x, y, batch_size) -> float64 [n]`: the examples' losses in inference mode."""
    of_batch = losses.of_batch(model, loss)

    @tf.function(autograph=False, reduce_retracing=True)
    def of_micro_batch(x, y, sample_weight):
        predictions = model(x, training=False)
        each = losses.of_examples(of_batch, x, y, predictions, sample_weight)
        return tf.cast(each, tf.float64)

    def of_all(x, y, batch_size):
        given = examples.as_fit_gives_them(model, x, y, None, batch_size)
        batches = examples.micro_batches(*given, batch_size)
        return np.concatenate(
            [of_micro_batch(*batch[:3]).numpy()[batch[3].numpy()] for batch in batches]
        )

    return of_all


def ratio_of_decreases(test, probe, whole: bool) -> tuple[float, float]:
    """OSGR as measured, (23), and its standard error; NaN where the probe's loss did not fall.

        R = mean_i d'[i] / mean_n d[n],
        se^2 = (Var_i d'[i] / n' + R^2 Var_n d[n] / n) / (mean_n d[n])^2

    Args:
      test, probe: by how much the loss of each example fell, `[n']` and `[n]`.
      whole: whether the probe set is the whole training set, so that its mean is no estimate.
    """
    fall = probe.mean()
    if not fall > 0:
        return float("nan"), float("nan")
    ratio = test.mean() / fall
    variance = _variance_of_mean(test) + (0 if whole else ratio**2 * _variance_of_mean(probe))
    return float(ratio), float(np.sqrt(variance) / fall)


def growth_of_gap(test, probe, whole: bool) -> tuple[float, float]:
    """Its growth and standard error, from by how much the loss of each example has grown."""
    variance = _variance_of_mean(test) + (0 if whole else _variance_of_mean(probe))
    return float(test.mean() - probe.mean()), float(np.sqrt(variance))


def _variance_of_mean(values):
    return values.var(ddof=1) / len(values) if len(values) > 1 else float("nan")


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
