"""Early quantities against the gap at the end, and how each ranks it: overall, held, and beyond the
loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_gsnr.experiments.ranking.correlations import (
    CELL,
    COMPARISONS,
    CURVE,
    KINDS,
    MANY,
    QUANTITIES,
    advantage,
    correlation,
    values,
)
from tf_gsnr.plots.claims import Claim, verdict
from tf_gsnr.plots.style import by, column, plt

TARGETS = {"gap_loss": "test - training loss", "gap_error": "test - training error"}
EXPECTED = ("gsnr_mean", "gsnr_of_sums", "same_sign")  # the theory has a sign for them: negative
MARKERS = "ov^sDP"
COLOURS = (
    "#222222",
    "#222222",
    "#c8553d",
    "#c8553d",
    "#2a6fbb",
    "#2a6fbb",
    "#7fb77e",
)  # of `KINDS`


def label(name: str, comparison) -> str:
    """A quantity in words, in this comparison."""
    return comparison.label if name == CURVE else QUANTITIES[name]


def summary(records: list[dict]) -> dict:
    """How many trainings there are, and all correlations.

    Returns:
      `trainings`, `configurations`, `reached` (how many came to the final training loss), and
      `{comparison: {gap: {quantity: {kind: [value, low, high]}}}}`.
    """
    result: dict = {
        "trainings": len(records),
        "configurations": len({tuple(r[name] for name in CELL) for r in records}),
        "reached": int(np.isfinite(column(records, "final_loss/gap_loss")).sum()),
    }
    for key, comparison in COMPARISONS.items():
        result[key] = {
            target: {
                name: {
                    kind: list(correlation(records, name, comparison, held, target))
                    for kind, held in KINDS.items()
                }
                for name in QUANTITIES
            }
            for target in TARGETS
        }
    return result


def table(records: list[dict]) -> str:
    """Correlations with the gap in loss, and what they say, for a terminal."""
    heads = ("overall", "beyond loss", "set-up held", "beyond loss", "noise held", "beyond loss")
    lines = [_counted(records)]
    for comparison in COMPARISONS.values():
        lines += ["", f"Spearman's correlation with the gap in loss, {comparison.title}:"]
        lines += [f"{'':28}" + "".join(f"{h:>22}" for h in (*heads, "noise and rate held"))]
        for name in QUANTITIES:
            found = (correlation(records, name, comparison, kind) for kind in KINDS.values())
            cells = ("" if np.isnan(one.value) else str(one) for one in found)
            lines.append(f"{label(name, comparison):28}" + "".join(f"{c:>22}" for c in cells))
        for name in EXPECTED:
            cells = (str(advantage(records, name, CURVE, comparison, KINDS[k])) for k in QUESTIONS)
            apart = dict(zip(("set-up held", "noise held"), cells))
            text = ", ".join(f"{held} {by_how_much}" for held, by_how_much in apart.items())
            lines.append(f"  in size, {QUANTITIES[name]} above {comparison.label}: {text}")
    return "\n".join([*lines, "", *(f"{c.claim}: {c.verdict}. {c.ours}" for c in claims(records))])


def _counted(records):
    reached = np.isfinite(column(records, "final_loss/gap_loss"))
    told = np.isfinite(column(records, "early_epoch/osgr_predicted"))
    cells = len({tuple(r[name] for name in CELL) for r in records})
    return (
        f"{len(records)} trainings of {cells} configurations; {reached.sum()} came to a training "
        f"loss of {records[0]['final_loss']:g}; after {records[0]['early_epochs']} epochs "
        f"{told.sum()} had a signal that can be told from zero"
    )


CONFOUNDED = (
    "What is compared is confounded. At the same epoch a higher learning rate, a smaller batch or "
    "a wider network has come further: its GSNR is larger, and so will its gap be. At the same "
    "training loss noisy labels took longer, and part of the noise is fitted already. With width, "
    "rate and batch size held only labels and seeds differ: there, to tell more than the loss "
    "curve means to be a second reading of how noisy labels are. One data set, one kind of "
    "network, configurations of our choice; test labels are as noisy as those trained on"
)
QUESTIONS = {
    "setup": "noisier labels, width, rate and batch size held",
    "noise": "set-ups that will have the larger gap, label noise held",
}


def claims(records: list[dict]) -> list[Claim]:
    """For each early quantity: does it tell of the gap what the loss curve does not?

    It tells noisier labels, or set-ups, apart where in all comparisons its interval is on the one
    side of zero: the theory's where there is one. The verdict is of both: one of them is partly.
    """
    return [_claim(records, name) for name in QUANTITIES] if len(records) >= MANY else []


def _claim(records, name):
    beyond = "" if name == CURVE else "_beyond"
    said, told = [], []
    for kind, question in QUESTIONS.items():
        found = [correlation(records, name, c, KINDS[kind + beyond]) for c in COMPARISONS.values()]
        signs = [one.sign for one in found]
        wanted = -1 if name in EXPECTED else signs[0] or 1
        told.append(signs == [wanted] * len(signs))
        words = _in_words(signs, name in EXPECTED)
        said.append(f"{question}: {words} ({', '.join(map(str, found))})")
    return Claim(
        "not in the paper",
        "What the loss curve tells early ranks the gap at the end"
        if name == CURVE
        else f"Early, {QUANTITIES[name]} tells of the gap at the end what the loss curve does not",
        "larger where the gap will be smaller [derived]" if name in EXPECTED else "none",
        "; ".join(said),
        verdict(all(told), any(told)),
        CONFOUNDED,
    )


def _in_words(signs, expected: bool) -> str:
    """What the signs of the comparisons say, such as "as expected in 2 of 3"."""
    of = f"of {len(signs)}"
    down, up = signs.count(-1), signs.count(1)
    if not down and not up:
        return "told in no comparison"
    if expected:
        texts = [
            f"as expected in {down} {of}" * bool(down),
            f"the other way in {up} {of}" * bool(up),
        ]
    else:
        texts = [f"falling with it in {down} {of}" * bool(down), f"rising in {up} {of}" * bool(up)]
    return ", ".join(filter(None, texts))


def figure(records: list[dict]) -> plt.Figure:
    """A scatter for each quantity, at the same epoch and at the same loss; below, all compared."""
    drawn = plt.figure(figsize=(17, 16), layout="constrained")
    rows: Any = drawn.subfigures(4, 1, height_ratios=(1, 1, 1, 2.1))
    for row, comparison in zip(rows, COMPARISONS.values()):
        _scatters(row, records, comparison)
    for axis, comparison in zip(rows[3].subplots(1, 3, sharey=True), COMPARISONS.values()):
        _compared(axis, records, comparison)
    handles, labels = rows[3].axes[0].get_legend_handles_labels()
    rows[3].legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    first = records[0]
    drawn.suptitle(
        f"{first['dataset']}, {first['model']}, n = {first['n']}, SGD: {_counted(records)}",
        fontsize=11,
    )
    return drawn


def _scatters(part, records, comparison):
    first = records[0]
    places = {
        "early_epoch": f"after {first['early_epochs']} epochs",
        "early_loss": f"where the training loss is first {first['early_loss']:g}",
        "final_epoch": f"after {first['epoch']} epochs",
        "final_loss": f"where the training loss is first {first['final_loss']:g}",
    }
    early, late = places[comparison.early], places[comparison.final]
    part.suptitle(f"{comparison.title}: measured {early}; gap {late}", fontsize=11, weight="bold")
    axes = part.subplots(1, len(QUANTITIES), sharey=True)
    noises = sorted(by(records, "p_random"))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(noises)))
    for axis, name in zip(axes, QUANTITIES):
        for colour, noise in zip(colours, noises):
            for marker, group in zip(MARKERS, by(records, "learning_rate").values()):
                own = [r for r in group if r["p_random"] == noise]
                gap = column(own, f"{comparison.final}/gap_loss")
                axis.plot(
                    *(values(own, name, comparison), gap),
                    *(marker,),
                    **dict(color=colour, markersize=4, alpha=0.75, markeredgewidth=0),
                )
        found = correlation(records, name, comparison, KINDS["overall"])
        axis.set_title(f"Spearman {found}", fontsize=9)
        axis.set_xlabel(label(name, comparison), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=4)
        if name == CURVE and comparison.curve == "epoch":
            axis.set_xscale("log")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("gap at the end\n(test - training loss)", fontsize=9)
    if comparison is COMPARISONS["same_epoch"]:
        _key(part, colours, noises, sorted(by(records, "learning_rate")))


def _key(part, colours, noises, rates):
    dot = dict(linestyle="", markersize=6)
    handles = [
        *(plt.Line2D([], [], marker="o", color=c, label=f"p_random {p:g}", **dot)
          for c, p in zip(colours, noises)),
        *(plt.Line2D([], [], marker=m, color="0.5", label=f"rate {r:g}", **dot)
          for m, r in zip(MARKERS, rates)),
    ]  # fmt: skip
    part.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )


def _compared(axis, records, comparison):
    """A row for each quantity, in it a dot with its interval for each kind of correlation."""
    names = list(QUANTITIES)[::-1]
    for place, (kind, colour) in enumerate(zip(KINDS, COLOURS)):
        heights = np.arange(len(names)) + 0.36 - 0.12 * place
        found = [correlation(records, name, comparison, KINDS[kind]) for name in names]
        beyond = dict(linestyle=":") if KINDS[kind].beyond else {}
        axis.hlines(heights, *np.array([f[1:] for f in found]).T, color=colour, **beyond)
        inside = dict(markerfacecolor="white") if KINDS[kind].beyond else {}
        known = [f.value for f in found]
        axis.plot(known, heights, "o", color=colour, label=KINDS[kind].label, ms=5, **inside)
    axis.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    for height in np.arange(len(names) - 1) + 0.5:
        axis.axhline(height, color="0.85", linewidth=0.8, zorder=0)
    axis.set(xlim=(-1, 1), ylim=(-0.5, len(names) - 0.5), yticks=range(len(names)))
    axis.set_yticklabels([QUANTITIES[name] for name in names], fontsize=10)
    axis.set_xlabel("Spearman's correlation with the gap at the end, 95% interval", fontsize=10)
    axis.set_title(f"{comparison.title}\n(the loss curve: {comparison.label})", fontsize=10)
    axis.grid(alpha=0.25, axis="x")
