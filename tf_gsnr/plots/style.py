"""What all figures share: their looks, and records by their fields.

Where there is no screen, matplotlib opens no window by itself; the binaries open none anywhere.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["by", "column", "curves", "draw_mean", "over_seeds", "plt"]


def by(records, name) -> dict:
    """Records grouped by the value of a field, in order of the value."""
    return {v: [r for r in records if r[name] == v] for v in sorted({r[name] for r in records})}


def column(records, name):
    return np.array([r[name] for r in records], float)


def data_of(record) -> str:
    """The data set, for a title: with a split of its own where that is not the usual one."""
    return record["dataset"] + (", split anew" if record.get("resplit") else "")


def curves(records, name):
    """`(epochs [k], values [seeds, k])` of a field where it is, for all seeds that are complete."""
    seeds = by([r for r in records if name in r], "seed")
    longest = max(map(len, seeds.values()), default=0)
    complete = [sorted(g, key=lambda r: r["epoch"]) for g in seeds.values() if len(g) == longest]
    return column(complete[0] if complete else [], "epoch"), np.array(
        [column(g, name) for g in complete]
    )


def over_seeds(values):
    """The mean over the first axis and its standard error, which is NaN with one seed.

    >>> [float(v) for v in over_seeds([1.0, 3.0])], [float(v) for v in over_seeds([1.0])]
    ([2.0, 1.0], [1.0, nan])
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(0), np.full(values.shape[1:], np.nan)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


def draw_mean(axis, x, values, *line, **looks):
    """The mean over seeds of `values [seeds, k]`, with a band of one standard error."""
    mean, se = over_seeds(values)
    (drawn,) = axis.plot(x, mean, *line, **looks)
    if len(values) > 1:
        axis.fill_between(x, mean - se, mean + se, color=drawn.get_color(), alpha=0.2, linewidth=0)
