"""What all figures share: matplotlib without a window, and records by their fields."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

__all__ = ["by", "column", "pearson", "plt"]


def pearson(x, y) -> float:
    """Pearson correlation; NaN with fewer than three finite pairs."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.sum() < 3:
        return float("nan")
    return float(np.corrcoef(x[finite], y[finite])[0, 1])


def by(records, name) -> dict:
    """Records grouped by the value of a field, in order of the value."""
    return {v: [r for r in records if r[name] == v] for v in sorted({r[name] for r in records})}


def column(records, name):
    return np.array([r[name] for r in records], float)
