"""Why the GSNR jumps from epoch to epoch: weights around an epoch's end, other trainings."""

from __future__ import annotations

import numpy as np

from tf_gsnr.experiments.jagged import jumps
from tf_gsnr.experiments.jagged.causes import AVERAGE, PLACES, causes, complete
from tf_gsnr.experiments.jagged.settings import AS_IT_IS, AVERAGED, BEFORE, VARIANTS
from tf_gsnr.plots.claims import Claim, beyond, verdict, with_error
from tf_gsnr.plots.style import by, column, curves, draw_mean, over_seeds, plt

DRAWN = {
    "end": ("#2a6fbb", "-"),
    "other_probe": ("#2a6fbb", ":"),
    "before_1": ("#c8553d", "-"),
    "line_minimum": ("#e0a030", "-"),
    AVERAGE: ("#3d8b57", "-"),
}
COLOURS = ("#2a6fbb", "#7d5ba6", "#c8553d", "#e0a030", "0.4")


def summary(records: list[dict]) -> dict:
    """Per cause: the level, the standard deviation from epoch to epoch, the ratio of variances."""
    return {
        f"{c.variant}/{c.place}": {
            "seeds": len(c.level),
            "level": float(c.level.mean()),
            "deviation": float(np.sqrt(c.variance.mean())),
            "ratio": c.ratio.value,
            "ratio_low": c.ratio.low,
            "ratio_high": c.ratio.high,
            "correlation": c.like,
        }
        for c in causes(records)
    }


def table(records: list[dict]) -> str:
    """The same for a terminal, a line per cause."""
    lines = [
        f"{'what is changed':>50}  GSNR, corrected  jumps (s.d.)  variance of jumps over as it is"
        "  correlation with it"
    ]
    for c in causes(records):
        lines.append(
            f"{c.text:>50}  {c.level.mean():15.4f}  {np.sqrt(c.variance.mean()):12.4f}"
            f"  {c.ratio!s:>31}  {c.like:19.2f}"
        )
    return "\n".join(lines)


def figure(records: list[dict]) -> plt.Figure:
    """One seed's curves by place; the mean curves by variant; what is left of the jumps."""
    drawn, axes = plt.subplots(
        1, 3, figsize=(16, 5), layout="constrained", width_ratios=(1, 1, 0.8)
    )
    first = min(r["seed"] for r in records)
    base = [r for r in records if r["variant"] == AS_IT_IS and r["epoch"] > 0]
    for place, (colour, line) in DRAWN.items():
        epochs, values = curves([r for r in base if r["seed"] == first], f"gsnr_plain/{place}")
        if len(values):
            axes[0].plot(epochs, values[0], line, color=colour, label=PLACES[place])
    by_variant = by(records, "variant")
    for colour, variant in zip(COLOURS, (v for v in VARIANTS if v in by_variant)):
        for place, line in (("end", "-"), (AVERAGE, "--")):
            label = VARIANTS[variant] if place == "end" else None
            epochs, values = curves(by_variant[variant], f"gsnr_plain/{place}")
            draw_mean(axes[1], epochs, values, line, color=colour, label=label)
    for axis in axes[:2]:
        axis.axhline(1 / records[0]["count"], color="0.6", linestyle=":", linewidth=1, zorder=0)
        axis.set(xlabel="epoch", yscale="log")
        if axis.lines[:-1]:
            axis.set_ylim(top=3 * axis.get_ylim()[1])  # room for the legend
            axis.legend(loc="upper left", frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="GSNR (25), mean over parameters")
    axes[0].set_title(f"as in figure 5, seed {first}: other weights, other examples", fontsize=10)
    axes[1].set_title("other trainings, mean over seeds (dashed: averaged weights)", fontsize=10)
    _bars(axes[2], causes(records))
    r = records[0]
    drawn.suptitle(
        f"{r['dataset']}, {r['model']}, n = {r['n']}, real labels, SGD: learning rate "
        f"{r['learning_rate']:g}; dotted grey: the bias 1/n",
        fontsize=11,
    )
    return drawn


def _bars(axis, rows):
    """The variance from epoch to epoch over that of the training as it is."""
    rows = [c for c in rows if (c.variant, c.place) != (AS_IT_IS, "end")]
    for k, c in enumerate(rows):
        axis.plot([c.ratio.low, c.ratio.high], [k, k], color="#2a6fbb", linewidth=2)
        axis.plot(c.ratio.value, k, "o", color="#2a6fbb")
    axis.axvline(1, color="0.6", linewidth=1)
    axis.set_yticks(range(len(rows)), [c.text for c in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="variance from epoch to epoch, relative")
    axis.set_title("left of the jumps (95% intervals)", fontsize=10)
    axis.grid(alpha=0.25, axis="x")


def claims(records: list[dict]) -> list[Claim]:
    """What the jumps are, and whether the rise of figure 5a is there without them."""
    rows = {(c.variant, c.place): c for c in causes(records)}
    if not rows:
        return []
    base = [r for r in complete(records) if r["variant"] == AS_IT_IS]
    own = {place: rows[AS_IT_IS, place] for place in PLACES}
    average, line, probe = (own[p].ratio for p in (AVERAGE, "line_minimum", "other_probe"))
    model = base[0]["model"]
    settles = _below(average, 0.25) and _below(line, 0.5) and own["other_probe"].like > 0.8
    return [
        Claim(
            "figure 5a",
            f"{model}, real labels: the GSNR is jagged since the weights swing along a sharp "
            "direction from step to step",
            "none [ours]",
            f"variance from epoch to epoch, over that as it is: {average} at weights averaged over "
            f"{max(AVERAGED)} steps, {line} after one step to the minimum along the gradient, "
            f"{probe} on another probe",
            verdict(settles, _below(average, 0.5)),
            _finding(base, rows),
        ),
        Claim(
            "figure 5a, b",
            f"{model}, real labels: the GSNR rises early and stays high, at weights averaged over "
            f"the last {max(AVERAGED)} steps of an epoch",
            "no number given; rising [text]",
            *_rise(base, "gsnr_plain", ".4f"),
        ),
        Claim(
            "figure 5c",
            f"{model}, real labels: the share of gradients of one sign rises (majority's sign, "
            f"convolutions' parameters), at weights averaged over the last {max(AVERAGED)} steps",
            "about 50% to about 56% [text]",
            *_rise(base, "same_sign_plain", ".1%"),
        ),
    ]


def _rise(base, name, form):
    """`(our numbers, verdict)`: from the start to the last quarter at averaged weights."""
    start = curves(base, f"{name}/end")[1][:, 0]
    values = curves(base, f"{name}/{AVERAGE}")[1]
    late = values[:, -max(values.shape[1] // 4, 1) :].mean(1)
    rise, best = over_seeds(late - start), values.mean(0).max()
    text = (
        f"{start.mean():{form}} at the start, at most {best:{form}}, {late.mean():{form}} over the "
        f"last quarter ({with_error(*rise, '+' + form)})"
    )
    return text, verdict(beyond(*rise))


def _below(ratio, bound):
    return (ratio.value if np.isnan(ratio.high) else ratio.high) < bound


def _finding(base, rows):
    """The paragraph of the report: each cause with its numbers."""
    end, probe, both, earlier, long_before, line, average = (
        rows[AS_IT_IS, place]
        for place in (
            "end",
            "other_probe",
            "larger_probe",
            f"before_{BEFORE[0]}",
            f"before_{BEFORE[2]}",
            "line_minimum",
            AVERAGE,
        )
    )
    after = [r for r in base if r["epoch"] > 0]
    around = ["end", *(f"before_{k}" for k in BEFORE)]
    steps = np.array([curves(after, f"gsnr_plain/{place}")[1] for place in around])
    inside = jumps.ratio(jumps.within(steps), end.variance)
    sharp = np.median(column(after, "curvature")) * base[0]["learning_rate"]
    turned = (column(after, "cosine") < 0).mean()
    others = "; ".join(
        f"{VARIANTS[variant]} {cause.ratio}"
        for (variant, place), cause in rows.items()
        if variant != AS_IT_IS and place == "end"
    )
    others = f"Other trainings, at their last weights: {others}. " if others else ""
    return (
        "variances from epoch to epoch, over that of the training as it is, with 95% intervals "
        "over seeds. The jumps are not the probe's: another one shows the same curve (correlation "
        f"of log GSNR {probe.like:.2f}), and twice as many examples leave {both.ratio}. They are "
        f"the weights': {BEFORE[0]} step earlier the correlation is {earlier.like:.2f}, "
        f"{BEFORE[2]} steps earlier {long_before.like:.2f}, and the weights of the last "
        f"{max(BEFORE)} steps of one epoch differ among each other as those of epochs do "
        f"({inside}). Averaged over {max(AVERAGED)} steps they leave {average.ratio}; one step "
        "along one direction, the mean gradient of other examples, to the lowest point there "
        f"leaves {line.ratio}. So it is the distance from the valley's floor along a sharp "
        f"direction (learning rate times curvature along the gradient: median {sharp:.2f}; in "
        f"{turned:.0%} of the last steps the mean gradient turned round). {others}"
        "Most of the height is swinging, too: the corrected GSNR is "
        f"{end.level.mean():.4f} on average over the epochs at the last weights, "
        f"{line.level.mean():.4f} at the line's minimum and {average.level.mean():.4f} at the "
        "averaged ones"
    )
