"""Runs -> the document of results: the claims of the paper in one table, then run by run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from tf_gsnr import experiments, plots
from tf_gsnr.plots.claims import FAILS, HOLDS, PARTLY
from tf_gsnr.report.document import Badge, Code, Figure, Heading, Link, Listing, Paragraph, Table
from tf_gsnr.report.runs import command

COLOURS = {HOLDS: "good", PARTLY: "middling", FAILS: "bad"}


def document(runs: list, figures) -> list:
    """The blocks of the document; draws a figure per run into the directory `figures`.

    Args:
      runs: with a record at least, each.
      figures: the directory.
    """
    claims = {run.name: _claims(run) for run in runs}
    blocks: list[Any] = [
        Heading(1, "Results"),
        Paragraph(
            (
                "What Liu et al. (ICLR 2020) claim and report, and what we measured. Made by ",
                Code("python -m tf_gsnr.report"),
                " from the run directories, verdicts included; not edited by hand. A paper's "
                "number is marked [text] where it stands in the paper's prose, [derived] where it "
                "follows from it, [reported] where other public write-ups of it have it.",
            )
        ),
    ]
    rows = [_row(run, claim) for run in runs for claim in claims[run.name]]
    if rows:
        header = ("where", "claim", "paper", "ours", "verdict", "run", "command")
        blocks.append(Table(header, rows))
    for run in runs:
        blocks += _section(run, claims[run.name], Path(figures))
    return blocks


def _claims(run):
    """The claims that a run tests; an experiment of a user's own may have none."""
    return getattr(experiments.load(run.experiment), "claims", lambda records: [])(run.records)


def _row(run, claim):
    return (
        claim.where,
        claim.claim,
        claim.paper,
        claim.ours,
        Badge(claim.verdict, COLOURS[claim.verdict]),
        Link(run.name),
        Code(command(run)),
    )


def _section(run, claims, figures):
    drawn = experiments.load(run.experiment)
    described = inspect.getmodule(drawn.figure).__doc__
    caption = (described or run.name).strip().splitlines()[0]
    blocks = [
        Heading(2, run.name),
        Listing(command(run)),
        Figure(plots.draw(drawn, run.records, figures / f"{run.name}.png"), caption),
        Listing(drawn.table(run.records)),
    ]
    remarks = {}
    for claim in claims:
        remarks.setdefault(claim.why, {})[f"{claim.where}, {claim.verdict}"] = None
    remarks.pop("", None)
    if remarks:
        blocks.append(Heading(3, f"Where {run.name} differs, and why"))
        blocks += [Paragraph((f"{'; '.join(of)}: {why}",)) for why, of in remarks.items()]
    settings = [(Code(name), _text(value)) for name, value in run.settings.items()]
    blocks += [
        Heading(3, f"Settings of {run.name}"),
        Table(("setting", "value"), settings),
        Heading(3, f"What {run.name} ran on"),
        _machines(run),
    ]
    return blocks


def _machines(run):
    header = ("directory", "configurations", "time", "device", "engine", "versions", "last started")
    rows = [
        (
            Code(part.path.resolve().name),
            f"{part.complete} of {run.planned}",
            _duration(part.config["seconds"]),
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


def _duration(seconds) -> str:
    """
    >>> _duration(452.3), _duration(9_000), _duration(0.4)
    ('7 min 32 s', '2 h 30 min', '0 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "default" if value is None else str(value)
