"""What the paper claims, what it reports, what we measured: the rows of the report."""

from __future__ import annotations

import math
from typing import NamedTuple

HOLDS, PARTLY, FAILS = "holds", "holds partly", "does not hold"


class Claim(NamedTuple):
    """One claim of the paper beside our measurement of it.

    Attributes:
      where: the paper's figure, table or section, such as "figure 4".
      claim: in a sentence.
      paper: the paper's number, with its mark, such as "0.907 to 0.968 [reported]".
      ours: ours, with its uncertainty.
      verdict: HOLDS, PARTLY or FAILS, decided by the numbers and never by hand.
      why: where we differ: why, as far as it was tested.
    """

    where: str
    claim: str
    paper: str
    ours: str
    verdict: str
    why: str = ""


def verdict(holds: bool, partly: bool = False) -> str:
    """HOLDS, else PARTLY, else FAILS."""
    return HOLDS if holds else PARTLY if partly else FAILS


def beyond(value, se) -> bool:
    """Whether a value is positive by two standard errors (one seed has none: by its sign).

    >>> beyond(0.3, 0.1), beyond(0.1, 0.1), beyond(0.1, math.nan)
    (True, False, True)
    """
    return bool(value > (2 * se if math.isfinite(se) else 0))


def with_error(value, se, form: str) -> str:
    """
    >>> with_error(0.25, 0.013, "+.2f"), with_error(0.25, math.nan, ".1f")
    ('+0.25 ± 0.01', '0.2')
    """
    error = f" ± {se:{form.lstrip('+')}}" if math.isfinite(se) else ""
    return f"{value:{form}}{error}"
