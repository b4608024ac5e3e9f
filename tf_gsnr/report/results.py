"""Runs -> the document of results: the claims of the paper in one table, then run by run."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

from tf_gsnr import experiments, plots, progress
from tf_gsnr.plots.claims import FAILS, HOLDS, PARTLY
from tf_gsnr.report.document import (
    Badge,
    Code,
    Figure,
    Folded,
    Heading,
    Index,
    Link,
    Listing,
    Paragraph,
    Points,
    Table,
)
from tf_gsnr.report.runs import command

COLOURS = {HOLDS: "good", PARTLY: "middling", FAILS: "bad"}


def document(runs: list, figures=None) -> list:
    """The blocks of the document.

    Args:
      runs: with a record at least, each.
      figures: a directory, into which a PNG figure per run is drawn then; Markdown needs it.
    """
    claims = {run.name: _claims(run) for run in runs}
    rows = [_row(run, claim) for run in runs for claim in claims[run.name]]
    entries = [(Link(run.name), _index_text(claims[run.name])) for run in runs]
    blocks: list[Any] = [Heading(1, "Results"), Paragraph(ABOUT)]
    if rows:
        every_claim = [claim for of_run in claims.values() for claim in of_run]
        blocks += [
            Index([(Link(CLAIMS), "of all runs"), *entries]),
            Heading(2, CLAIMS),
            Paragraph((count(every_claim),)),
            Table(("verdict", "claim", "where", "paper", "ours", "run", "command"), rows),
        ]
    else:
        blocks.append(Index(entries))
    for run in runs:
        blocks += _section(run, claims[run.name], figures)
    return blocks


CLAIMS = "The claims"
ABOUT = (
    "What Liu et al. (ICLR 2020) claim and report, and what we measured. Made by ",
    Code("python -m tf_gsnr.report"),
    " from the run directories, verdicts included; not edited by hand. A paper's number is marked "
    "[text] where it stands in the paper's prose, [derived] where it follows from it, [reported] "
    "where other public write-ups of it have it.",
)


def _claims(run):
    """The claims that a run tests; an experiment of a user's own may have none."""
    return getattr(experiments.load(run.experiment), "claims", lambda records: [])(run.records)


def count(claims: list) -> str:
    """How many claims hold, in a sentence.

    >>> from tf_gsnr.plots.claims import Claim
    >>> some = [Claim("figure 1", "it rises", "1", "2", v) for v in (HOLDS, HOLDS, PARTLY)]
    >>> count(some), count(some[2:])
    ('2 of 3 claims hold, 1 holds partly.', '0 of 1 claim holds, 1 holds partly.')
    """
    number = Counter(claim.verdict for claim in claims)
    text = _hold(number[HOLDS], len(claims))
    if number[PARTLY]:
        text += f", {number[PARTLY]} {'holds' if number[PARTLY] == 1 else 'hold'} partly"
    if number[FAILS]:
        text += f", {number[FAILS]} {'does' if number[FAILS] == 1 else 'do'} not hold"
    return f"{text}."


def _hold(holding, total):
    verb = "holds" if 1 in (holding, total) else "hold"
    return f"{holding} of {total} claim{'s' * (total != 1)} {verb}"


def _index_text(claims):
    holding = sum(claim.verdict == HOLDS for claim in claims)
    return _hold(holding, len(claims)) if claims else "no claims"


def _row(run, claim):
    return (
        Badge(claim.verdict, COLOURS[claim.verdict]),
        claim.claim,
        claim.where,
        claim.paper,
        claim.ours,
        Link(run.name),
        Code(command(run)),
    )


def _section(run, claims, figures):
    drawn = experiments.load(run.experiment)
    described = inspect.getmodule(drawn.figure).__doc__
    caption = (described or run.name).strip().splitlines()[0]
    png = plots.draw(drawn, run.records, Path(figures) / f"{run.name}.png") if figures else None
    settings = [(Code(name), _text(value)) for name, value in run.settings.items()]
    return [
        Heading(2, run.name),
        *_finding(run, claims),
        Figure(plots.svg(drawn, run.records), caption, png),
        Listing(drawn.table(run.records)),
        *_remarks(run, claims),
        Listing(command(run)),
        Folded(f"Settings of {run.name}", Table(("setting", "value"), settings)),
        Folded(f"What {run.name} ran on", _machines(run)),
    ]


def _finding(run, claims):
    """What a run found: how many claims hold, and each in a sentence."""
    text = count(claims) if claims else "No claim of the paper is tested here."
    if run.diverged:
        text += f" {run.diverged} of {run.planned} configurations diverged and are not shown."
    if run.complete + run.diverged < run.planned:
        text += f" Unfinished: {run.complete} of {run.planned} configurations are complete."
    points = [
        (
            Badge(claim.verdict, COLOURS[claim.verdict]),
            f": {claim.claim.rstrip('.')} ({claim.where}). Ours: {claim.ours}; the paper: "
            f"{claim.paper}.",
        )
        for claim in claims
    ]
    return [Paragraph((text,)), *([Points(points)] if points else [])]


def _remarks(run, claims):
    """Why a claim does not hold, or not quite; and what else there is to say of one that holds."""
    differs = _whys([claim for claim in claims if claim.verdict != HOLDS])
    notes = _whys([claim for claim in claims if claim.verdict == HOLDS])
    blocks: list[Any] = []
    if differs:
        blocks += [Heading(3, f"Where {run.name} differs, and why"), *differs]
    if notes:
        blocks += [Heading(3, f"Notes on {run.name}"), *notes]
    return blocks


def _whys(claims):
    """The remarks of claims, each once."""
    remarks: dict = {}
    for claim in claims:
        remarks.setdefault(claim.why, {})[f"{claim.where}, {claim.verdict}"] = None
    remarks.pop("", None)
    return [Paragraph((f"{'; '.join(of)}: {why}",)) for why, of in remarks.items()]


def _machines(run):
    header = ("directory", "configurations", "time", "device", "engine", "versions", "last started")
    rows = [
        (
            Code(part.path.resolve().name),
            f"{part.complete} of {run.planned}",
            progress.duration(part.config["seconds"]),
            _device(part.config),
            f"{part.config['engine']}, XLA {'on' if part.config['jit_compile'] else 'off'}",
            ", ".join(f"{k} {v}" for k, v in part.config["versions"].items()),
            part.config["started"],
        )
        for part in run.parts
    ]
    return Table(header, rows)


def _device(config):
    accelerators = [d for d in config["devices"] if d != "CPU"]
    processor = f"{config['cpus']} cores of {config['processor']}"
    return ", ".join([*accelerators, processor])


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "default" if value is None else str(value)
