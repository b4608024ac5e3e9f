"""How each early quantity ranks the gap at the end: rank correlations, each with its interval.

A rank correlation over all trainings says little: label noise alone ranks almost everything, and
what noisier labels do to a quantity may be the opposite of what a higher learning rate does. So two
questions are apart: with width, learning rate and batch size held, do noisier labels show? With the
label noise held, does the set-up that will generalise? Each also given what the loss curve tells
anyway. Intervals are of a bootstrap over configurations, seeds kept together: they say how much
depends on the configurations that were tried, not on the data set or the kind of network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_gsnr.experiments.framework.statistics import interval, resampled, spearman
from tf_gsnr.plots.style import column

CELL = ("width", "learning_rate", "batch_size", "p_random")  # a configuration, of all its seeds
CURVE = "curve"  # what the loss curve tells: it has another name in each comparison
QUANTITIES = {
    "gsnr_mean": "GSNR, mean over parameters",
    "gsnr_of_sums": "GSNR, ratio of sums",  # 1 / noise scale; ranks as OSGR, of one n
    "same_sign": "agreement of signs",
    "gradient_norm": "gradient norm",
    "gradient_variance": "gradient variance",
    CURVE: "what the loss curve tells",
    "gap_loss": "the gap then (test data)",
}
DRAWS, MANY = 1000, 5  # of the bootstrap; trainings from which on a correlation is told


class Comparison(NamedTuple):
    """When networks are compared.

    Attributes:
      early, final: prefixes of the records' names.
      curve: of the early record, what the loss curve tells then.
      label: of that.
      title: of the comparison.
    """

    early: str
    final: str
    curve: str
    label: str
    title: str


COMPARISONS = {
    "same_epoch": Comparison(
        "early_epoch", "final_epoch", "train_loss", "training loss", "at the same epochs"
    ),
    "epoch_to_loss": Comparison(
        "early_epoch", "final_loss", "train_loss", "training loss", "from an epoch to a loss"
    ),
    "same_loss": Comparison(
        "early_loss", "final_loss", "epoch", "epochs to get there", "at the same training losses"
    ),
}


class Kind(NamedTuple):
    """What is held while a quantity and the gap are ranked.

    Attributes:
      label: in words.
      strata: names of the settings that are equal within a stratum.
      beyond: whether what the loss curve tells is taken out.
      unit: the settings of what the bootstrap draws.
    """

    label: str
    strata: tuple = ()
    beyond: bool = False
    unit: tuple = CELL


SETUP = ("width", "learning_rate", "batch_size")
KINDS = {
    "overall": Kind("overall"),
    "beyond": Kind("overall, beyond the loss curve", beyond=True),
    "setup": Kind("at each width, rate and batch size", SETUP, unit=SETUP),
    "setup_beyond": Kind("the same, beyond the loss curve", SETUP, True, SETUP),
    "noise": Kind("at each label noise", ("p_random",)),
    "noise_beyond": Kind("the same, beyond the loss curve", ("p_random",), True),
    "noise_rate": Kind("at each label noise and rate", ("p_random", "learning_rate")),
}


class Estimate(NamedTuple):
    """A rank correlation, or a difference of two, and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """Of the value where the interval is on one side of zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self):
        if np.isnan(self.value):
            return "not known"
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def values(records, name: str, comparison: Comparison):
    """An early quantity of each record."""
    return column(records, f"{comparison.early}/{comparison.curve if name == CURVE else name}")


def correlation(records, name, comparison, kind, target="gap_loss") -> Estimate:
    """Spearman's correlation of an early quantity with the gap at the end.

    Args:
      name: of `QUANTITIES`.
      comparison, kind: of `COMPARISONS`, `KINDS`.
      target: gap_loss or gap_error.
    """
    return _estimate(records, kind, lambda *held: _ranked(records, name, comparison, target, *held))


def advantage(records, name, other, comparison, kind, target="gap_loss") -> Estimate:
    """By how much a quantity's correlation is stronger, in size, than another's."""

    def difference(*held):
        a, b = (_ranked(records, one, comparison, target, *held) for one in (name, other))
        return np.abs(a) - np.abs(b)

    return _estimate(records, kind, difference)


def _ranked(records, name, comparison, target, kind, counts):
    given = [values(records, CURVE, comparison)] if kind.beyond else []
    if kind.beyond and name == CURVE:
        return np.full(1 if counts is None else len(counts), np.nan)
    strata = _numbered(records, kind.strata)
    final = column(records, f"{comparison.final}/{target}")
    return spearman(values(records, name, comparison), final, given, strata, counts)


def _estimate(records, kind, statistic: Callable) -> Estimate:
    if len(records) < MANY:
        return Estimate(np.nan, np.nan, np.nan)
    counts = resampled(_numbered(records, kind.unit), DRAWS)
    return Estimate(float(np.squeeze(statistic(kind, None))), *interval(statistic(kind, counts)))


def _numbered(records, names) -> list:
    """For each record the number of its group: those that are equal in these settings."""
    groups = [tuple(r[name] for name in names) for r in records]
    numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
    return [numbers[group] for group in groups]
