"""The numbers that are shown while a model trains: one table for `fit`, callback, pages and docs.

What is shown in `fit` is a formula of the sums that `training/meter.py` keeps over the steps; the
callback shows what `metrics.summarize` makes of the moments of its probe set. Both mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Sums(NamedTuple):
    """What `fit` has added up, when it is read; scalar tensors.

    Attributes:
      signal, noise: S and V of `GSNRMeter`.
      told: whether |G|^2 can be told from zero.
      examples: N.
      mean_ratio, median_ratio: of r_j over the parameters, NaN where it cannot be told.
      agreeing, pairs: of pairs of examples with a sign, those whose signs agree, and all.
      gap: N times the growth of the gap, NaN where none is known.
    """

    signal: Any
    noise: Any
    told: Any
    examples: Any
    mean_ratio: Any
    median_ratio: Any
    agreeing: Any
    pairs: Any
    gap: Any


class Number(NamedTuple):
    """One shown number.

    Attributes:
      meaning: one line.
      advice: what is usual, and what to do.
      needs: of "ratios" (sums for each parameter), "signs" (sign counts), "optimizer" (one whose
        step is known), "test" (test data).
      in_fit: `Sums -> scalar`; None where `fit` does not show it.
      in_records: its name in the records of `GSNRCallback`; None where it does not show it. With
        `gsnr/` before it, if that is not there, this is its name in the logs.
    """

    meaning: str
    advice: str
    needs: tuple = ()
    in_fit: Callable[[Sums], Any] | None = None
    in_records: str | None = None


def _ratio(numerator, denominator, told=True):
    """NaN where it cannot be told, or the denominator is zero."""
    from tf_gsnr import arrays  # with TensorFlow, which a page about a run needs not

    return arrays.choose(told, arrays.divide(numerator, denominator, np.nan), np.nan)


NUMBERS = {
    "gsnr": Number(
        "mean over the parameters of r_j = g_j^2 / rho2_j, the signal-to-noise ratio of their "
        "gradients (25)",
        "0.001 to 0.1 early in training, and falling; far below 1 / N little of a step carries "
        "over to unseen data",
        ("ratios",),
        lambda s: s.mean_ratio,
        "gsnr/mean",
    ),
    "gsnr_median": Number(
        "median over the parameters of r_j",
        "a tenth of the mean and less is usual: few parameters carry most of the signal",
        ("ratios",),
        lambda s: s.median_ratio,
        "gsnr/median",
    ),
    "gsnr_p95": Number(
        "95th percentile over the parameters of r_j",
        "how far the best parameters are above the median",
        in_records="gsnr/p95",
    ),
    "same_sign": Number(
        "the chance that the gradients of two examples have the same sign, mean over parameters",
        "0.5 is a coin's; where it rises examples agree, where it nears 0.5 each goes its own way",
        ("signs",),
        lambda s: _ratio(s.agreeing, s.pairs),
        "same_sign/mean",
    ),
    "noise_scale": Number(
        "tr(Sigma) / |G|^2, in examples: the batch size at which noise and gradient are as large",
        "with batches far below it, larger batches still pay; far above it, they do not",
        (),
        lambda s: _ratio(s.noise, s.signal, s.told),
        "noise_scale",
    ),
    "osgr": Number(
        "share of a step's decrease of the training loss that carries over to unseen data, as "
        "predicted from gradients (19)",
        "near 1 at first; where it falls, more training data help, and so may stopping",
        (),
        lambda s: _ratio(s.signal, s.signal + _ratio(s.noise, s.examples), s.told),
        "osgr_predicted",
    ),
    "gap_growth": Number(
        "by how much the test loss is expected to have parted from the training loss, (14) added "
        "up over the steps",
        "a rate to first order: what later steps undo is not taken off, so it is too large, by up "
        "to 17 times on MNIST (flags/gap_small.flags)",
        ("optimizer",),
        lambda s: _ratio(s.gap, s.examples),
    ),
    "dead": Number(
        "how many parameters have no variance: no example moves them otherwise than others",
        "ReLU units that are off for every example; many of them are capacity that is lost",
        in_records="dead",
    ),
    "gsnr_plain": Number(
        "mean over the parameters of r_j as the paper estimates it, too large by about 1 / n",
        "to be compared with the paper's figures",
        in_records="gsnr_plain/mean",
    ),
    "osgr_measured": Number(
        "decrease of the test loss over the probe's, in the measured steps of an epoch (23)",
        "it scatters about the predicted one; near 0 or below, steps no longer help unseen data",
        ("test",),
        in_records="osgr_measured",
    ),
    "gap": Number(
        "by how much the gap between test loss and probe loss has grown since the first "
        "measurement",
        "what `gap_predicted` is to be compared with",
        ("test",),
        in_records="gap",
    ),
    "gap_predicted": Number(
        "the same by (14), added up over all steps since then",
        "as `gap_growth`",
        ("test",),
        in_records="gap_predicted",
    ),
}

# What a number takes that needs more than the sums over all parameters, which are there anyway.
COSTS = {
    None: "sums that are there anyway",
    "ratios": "two sums for each sampled parameter",
    "signs": "the sign of every example's gradient at the sampled parameters",
    "optimizer": "the optimiser's state at the sampled parameters",
    "test": "a forward pass over probe and test set, before and after the measured step",
}

IN_FIT = tuple(name for name, number in NUMBERS.items() if number.in_fit)


def needed(names) -> set:
    """What these numbers need, all together."""
    return {need for name in names for need in NUMBERS[name].needs}


def in_logs(record: str) -> str:
    """The name in a callback's logs of what its records call so.

    >>> in_logs("same_sign/mean"), in_logs("gsnr/mean"), in_logs("dead")
    ('gsnr/same_sign', 'gsnr/mean', 'gsnr/dead')
    """
    record = "same_sign" if record == "same_sign/mean" else record
    return record if record.startswith("gsnr") else f"gsnr/{record}"
