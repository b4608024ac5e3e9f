"""How far a curve jumps from epoch to epoch, and how that compares over seeds.

Index letters: e epoch, s seed, k one of the steps around an epoch's end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tf_gsnr.experiments.framework.statistics import student
from tf_gsnr.plots.style import over_seeds


def variance(values) -> np.ndarray:
    """The variance from epoch to epoch of curves, without their trend.

        V = mean_e (x_{e+1} - 2 x_e + x_{e-1})^2 / 6

    It is the variance of independent values around a straight line, whatever its slope.

    Args:
      values: `[..., epochs]`, at least three.

    Returns:
      `[...]`, in the square of the unit of x.

    Example:

    >>> float(variance([1.0, 2.0, 3.0, 4.0])), float(variance([0.0, 1.0, 0.0]))
    (0.0, 0.6666666666666666)
    """
    x = np.asarray(values, float)
    return ((x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]) ** 2).mean(-1) / 6


def within(values) -> np.ndarray:
    """The variance among the steps around an epoch's end, averaged over the epochs.

    Args:
      values: `[steps, seeds, epochs]`.

    Returns:
      `[seeds]`.
    """
    return np.var(values, axis=0, ddof=1).mean(-1)


class Ratio(NamedTuple):
    """A ratio over seeds, with the ends of the 95% interval of its logarithm (Student's t)."""

    value: float
    low: float
    high: float

    def __str__(self):
        """
        >>> str(Ratio(0.0312, 0.0104, 0.0936)), str(Ratio(1.5, float("nan"), float("nan")))
        ('0.031 (0.010 to 0.094)', '1.5')
        """
        if np.isnan(self.low):
            return f"{self.value:#.2g}"
        return f"{self.value:#.2g} ({self.low:#.2g} to {self.high:#.2g})"


def ratio(numerators, denominators) -> Ratio:
    """The geometric mean over seeds of their ratio, each seed with itself.

    Args:
      numerators, denominators: `[seeds]`, positive.

    Returns:
      A `Ratio`, its interval NaN with one seed.

    Example:

    >>> ratio([1.0, 4.0], [1.0, 1.0]).value
    2.0
    """
    logarithms = np.log(np.asarray(numerators) / np.asarray(denominators))
    mean, se = over_seeds(logarithms)
    half = se * student(len(logarithms))
    return Ratio(*(float(v) for v in np.exp([mean, mean - half, mean + half])))
