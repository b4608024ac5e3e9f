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
LOG = ("gradient_norm", "gradient_variance")
MARKERS = "ov^sDP"
COLOURS = ("#333333", "#2a6fbb", "#56a3d9", "#7fb77e", "#e08e45", "#c8553d")  # of `KINDS`


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
    lines = [_counted(records)]
    for comparison in COMPARISONS.values():
        lines += ["", f"Spearman's correlation with the gap in loss, {comparison.title}:"]
        lines += [f"{'':28}" + "".join(f"{_short(kind):>22}" for kind in KINDS)]
        for name in QUANTITIES:
            found = (correlation(records, name, comparison, kind) for kind in KINDS.values())
            cells = ("" if np.isnan(one.value) else str(one) for one in found)
            lines.append(f"{label(name, comparison):28}" + "".join(f"{c:>22}" for c in cells))
    return "\n".join([*lines, "", *(f"{c.claim}: {c.verdict}" for c in claims(records))])


def _short(kind):
    return {"setup": "each setup", "noise": "each noise", "noise_rate": "noise and rate"}.get(
        kind, kind.replace("noise_beyond", "beyond, each noise")
    )


def _counted(records):
    reached = np.isfinite(column(records, "final_loss/gap_loss"))
    told = np.isfinite(column(records, "early_epoch/osgr_predicted"))
    cells = len({tuple(r[name] for name in CELL) for r in records})
    return (
        f"{len(records)} trainings of {cells} configurations; {reached.sum()} came to a training "
        f"loss of {records[0]['final_loss']:g}, {told.sum()} had a signal that can be told from "
        f"zero after {records[0]['early_epochs']} epochs"
    )


CONFOUNDED = (
    "What is compared is confounded: at the same epoch a higher learning rate or a smaller batch "
    "has come further, which the training loss shows; at the same training loss noisy labels take "
    "longer, and fit noise already; the learning rate decides both how long, and in which minimum. "
    "On one data set, networks of one kind, and configurations of our choice"
)


def claims(records: list[dict]) -> list[Claim]:
    """For each early quantity: does it tell of the gap what the loss curve does not?"""
    return [_claim(records, name) for name in QUANTITIES] if len(records) >= MANY else []


def _claim(records, name):
    kind = "noise" if name == CURVE else "noise_beyond"
    signs, said = [], []
    for comparison in COMPARISONS.values():
        found = {k: correlation(records, name, comparison, held) for k, held in KINDS.items()}
        signs.append(found[kind].sign)
        kinds = ["overall", "noise", *([] if name == CURVE else ["beyond", "noise_beyond"])]
        text = ", ".join(f"{KINDS[k].label} {found[k]}" for k in kinds)
        if name in EXPECTED:
            better = advantage(records, name, CURVE, comparison, KINDS["noise"])
            text += f" (in size, more than {comparison.label}: {better})"
        said.append(f"{comparison.title}: {text}")
    wanted = [sign < 0 if name in EXPECTED else sign != 0 for sign in signs]
    agree = wanted[0] and wanted[1] and signs[0] == signs[1]
    return Claim(
        "ranking",
        "What the loss curve tells early ranks the gap at the end, at each label noise"
        if name == CURVE
        else f"Early, {QUANTITIES[name]} tells of the gap at the end what the loss curve does not, "
        "at each label noise",
        "larger where the gap will be smaller [derived]" if name in EXPECTED else "none",
        "; ".join(said),
        verdict(bool(agree), any(wanted)),
        CONFOUNDED,
    )


def figure(records: list[dict]) -> plt.Figure:
    """A scatter for each quantity, at the same epoch and at the same loss; below, all compared."""
    drawn = plt.figure(figsize=(17, 12), layout="constrained")
    rows: Any = drawn.subfigures(3, 1, height_ratios=(1, 1, 1.75))
    for row, comparison in zip(rows, COMPARISONS.values()):
        _scatters(row, records, comparison)
    for axis, comparison in zip(rows[2].subplots(1, 2, sharey=True), COMPARISONS.values()):
        _compared(axis, records, comparison)
    handles, labels = rows[2].axes[0].get_legend_handles_labels()
    rows[2].legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False, fontsize=10
    )
    first = records[0]
    drawn.suptitle(
        f"{first['dataset']}, {first['model']}, n = {first['n']}, SGD: {_counted(records)}",
        fontsize=11,
    )
    return drawn


def _scatters(part, records, comparison):
    first = records[0]
    early, late = (
        (f"after {first['early_epochs']} epochs", f"after {first['epoch']}")
        if comparison is COMPARISONS["same_epoch"]
        else (f"at loss {first['early_loss']:g}", f"at {first['final_loss']:g}")
    )
    part.suptitle(f"{comparison.title}: measured {early}, gap {late}", fontsize=11, weight="bold")
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
        axis.set_title(f"{found.value:+.2f}  [{found.low:+.2f}, {found.high:+.2f}]", fontsize=9)
        axis.set_xlabel(label(name, comparison), fontsize=9)
        axis.tick_params(labelsize=7)
        if name in LOG or name == CURVE and comparison.curve == "epoch":
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
    part.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)


def _compared(axis, records, comparison):
    """A row for each quantity, in it a dot with its interval for each kind of correlation."""
    names = list(QUANTITIES)[::-1]
    for place, (kind, colour) in enumerate(zip(KINDS, COLOURS)):
        heights = np.arange(len(names)) + 0.35 - 0.14 * place
        found = [correlation(records, name, comparison, KINDS[kind]) for name in names]
        axis.hlines(heights, *np.array([f[1:] for f in found]).T, color=colour, linewidth=1.6)
        known = [f.value for f in found]
        axis.plot(known, heights, "o", color=colour, markersize=4.5, label=KINDS[kind].label)
    axis.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    for height in np.arange(len(names) - 1) + 0.5:
        axis.axhline(height, color="0.85", linewidth=0.8, zorder=0)
    axis.set(xlim=(-1, 1), ylim=(-0.5, len(names) - 0.5), yticks=range(len(names)))
    axis.set_yticklabels([QUANTITIES[name] for name in names], fontsize=10)
    axis.set_xlabel("Spearman's correlation with the gap at the end, 95% interval", fontsize=10)
    axis.set_title(f"{comparison.title} (the loss curve: {comparison.label})", fontsize=11)
    axis.grid(alpha=0.25, axis="x")
