"""How well points can be correlated, given the errors with which they were measured.

Index letters: i point, r repetition.

A point's two sides come from M training sets and a finite test set, so each has a standard error.
Points whose true values lay exactly on a line would then not show Pearson 1. `on_a_line` says what
they would show: for each repetition it draws

    x[r, i] = t[i] + se_x[i] N(0, 1)        y[r, i] = t[i] + se_y[i] N(0, 1)

where t are the predicted values, drawn together towards their mean so that the x[r] are as far
apart as the predicted values are: they have the errors in them already. The errors of the two sides
count as independent; both are of the same training sets, so this is an approximation.
"""

from __future__ import annotations

import numpy as np

DRAWS = 2000
Z = 1.96  # of a 95% interval


def on_a_line(predicted, se_predicted, se_measured, seed: int = 0) -> tuple[float, float, float]:
    """The Pearson correlation that points on a line would show: its median, 2.5% and 97.5% points.

    Args:
      predicted, se_predicted, se_measured: floats `[points]`.
      seed: of the draws.

    Returns:
      `(median, low, high)`; NaN where there are too few points, or no errors.

    >>> median, low, high = on_a_line([0.2, 0.4, 0.6, 0.8], [0.0] * 4, [0.1] * 4)
    >>> bool(0.8 < low < median < high <= 1)
    True
    """
    x, se_x, se_y = (np.asarray(v, float) for v in (predicted, se_predicted, se_measured))
    finite = np.isfinite(x) & np.isfinite(se_x) & np.isfinite(se_y)
    x, se_x, se_y = x[finite], se_x[finite], se_y[finite]
    if len(x) < 3 or not np.ptp(x):
        return (float("nan"),) * 3
    true = max(1 - np.mean(se_x**2) / np.var(x, ddof=1), 0.0)  # of the variance
    t = x.mean() + np.sqrt(true) * (x - x.mean())
    rng = np.random.default_rng(seed)
    x, y = (t + se * rng.normal(size=[DRAWS, len(t)]) for se in (se_x, se_y))
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    drawn = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    low, median, high = np.nanquantile(drawn, [0.025, 0.5, 0.975])
    return float(median), float(low), float(high)


def interval(correlation: float, points: int) -> tuple[float, float]:
    """The 95% interval of a Pearson correlation by Fisher's transformation.

    The points count as draws of a normal distribution, which those of a grid are not.

    >>> [round(end, 2) for end in interval(0.841, 24)]
    [0.66, 0.93]
    """
    if points < 4 or not abs(correlation) < 1:
        return float("nan"), float("nan")
    centre, half = np.arctanh(correlation), Z / np.sqrt(points - 3)
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))
