"""Statistics that more than one experiment needs, in plain numpy."""

from __future__ import annotations

import numpy as np


def pearson(x, y) -> float:
    """Pearson's correlation; NaN with fewer than three finite pairs, or where one does not vary.

    >>> round(pearson([1, 2, 3, np.nan], [2, 4, 7, 1]), 3), pearson([1, 1, 1], [1, 2, 3])
    (0.993, nan)
    """
    x, y = np.asarray(x, float).ravel(), np.asarray(y, float).ravel()
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
