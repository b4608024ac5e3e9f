"""Statistics that more than one experiment needs, in plain numpy."""

from __future__ import annotations

import numpy as np

# By how many standard errors of a mean its 95% interval reaches, for 2, 3, ... seeds.
STUDENT = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.0)


def student(seeds: int) -> float:
    """By how many standard errors the 95% interval of a mean over seeds reaches (Student's t).

    >>> student(4), student(100), student(1)
    (3.18, 2.0, 2.0)
    """
    return STUDENT[min(seeds - 2, len(STUDENT) - 1)] if seeds > 1 else 2.0


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


def spearman(x, y, given=(), strata=None, counts=None):
    """Spearman's rank correlation, partial and within strata where asked for.

    The correlation of the ranks of x and y (of equals, their mean rank), after a straight line in
    the ranks of each of `given` is taken out of both. With strata ranks are taken within each, and
    the answer is the mean over strata, weighted by how many pairs they have.

    Args:
      x, y: `[n]`; what is not finite is left out.
      given: a list of `[n]`.
      strata: `[n]` of anything that can be compared.
      counts: `[draws, n]`, how often each pair is there, as in `resampled`; default: once.

    Returns:
      A float, or `[draws]`. NaN where no stratum has three pairs (more by those given) that vary.

    Example:

    >>> round(spearman([1, 2, 3, 4], [1, 8, 27, 20]), 2)
    0.8
    >>> round(spearman([1, 2, 3, 11, 12, 13], [3, 2, 1, 30, 20, 10], strata=[0, 0, 0, 1, 1, 1]), 2)
    -1.0
    """
    columns = np.array([x, y, *given], float)
    finite = np.isfinite(columns).all(0)
    strata = np.zeros(len(finite)) if strata is None else np.asarray(strata)
    draws = np.ones([1, len(finite)]) if counts is None else np.asarray(counts, float)
    sums, weights = np.zeros(len(draws)), np.zeros(len(draws))
    for stratum in np.unique(strata[finite]):
        own = finite & (strata == stratum)
        r, weight = _partial(columns[:, own], draws[:, own]), draws[:, own].sum(1)
        known = np.isfinite(r)
        sums[known] += (r * weight)[known]
        weights[known] += weight[known]
    with np.errstate(invalid="ignore"):
        means = sums / weights
    return float(means[0]) if counts is None else means


def _partial(columns, counts):
    """Correlations `[draws]` of the ranks of the first two columns, given the others."""
    less = columns[:, :, None] > columns[:, None, :]  # [k, n, n]
    equal = columns[:, :, None] == columns[:, None, :]
    ranks = (less + equal / 2) @ counts.T + 0.5  # [k, n, draws]: the mean rank of equals
    size = counts.sum(1)
    enough = (counts > 0).sum(1) >= len(columns) + 1
    size = np.where(size > 0, size, 1)
    ranks -= (ranks * counts.T).sum(1, keepdims=True) / size
    products = np.einsum("ind,jnd,dn->dij", ranks, ranks, counts) / size[:, None, None] ** 3
    of_given = products[:, 2:, 2:]
    across = products[:, :2, 2:]
    inverse = np.linalg.pinv(of_given, rcond=1e-9, hermitian=True)
    left = products[:, :2, :2] - across @ inverse @ np.swapaxes(across, 1, 2)
    spread = left[:, 0, 0] * left[:, 1, 1]
    varies = enough & (np.minimum(left[:, 0, 0], left[:, 1, 1]) > 1e-9)
    return np.where(varies, left[:, 0, 1] / np.sqrt(np.where(varies, spread, 1)), np.nan)


def resampled(groups, draws: int = 1000, seed: int = 0):
    """How often each record is in each draw of a bootstrap over groups: `[draws, records]`.

    Args:
      groups: for each record what it is one of; a group is drawn with all its records.

    Example:

    >>> counts = resampled(["a", "a", "b", "c"], draws=2)
    >>> counts.shape, bool((counts[:, 0] == counts[:, 1]).all())
    ((2, 4), True)
    """
    labels = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    picks = np.random.default_rng(seed).integers(0, len(labels), [draws, len(labels)])
    times = (picks[:, :, None] == np.arange(len(labels))).sum(1)
    return times[:, [labels[group] for group in groups]]


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of draws, of those that are finite; NaN without any.

    >>> [round(end, 6) for end in interval(np.arange(101.0))]
    [2.5, 97.5]
    """
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
