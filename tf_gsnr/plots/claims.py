"""What the paper claims, what it reports, what we measured: the rows of RESULTS.md."""

from __future__ import annotations

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
