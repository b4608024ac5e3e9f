"""The GSNR of the second layer with the first one learning or frozen: figure 6 and table 1."""

from __future__ import annotations

import numpy as np

from tf_gsnr.plots import style
from tf_gsnr.plots.style import column, plt

COLOURS = {False: "#2a6fbb", True: "#c8553d"}
LABELS = {False: "whole network", True: "first layer frozen"}
BEST = 5  # rows of table 1


def curves(records: list[dict], frozen: bool, name: str):
    """`(steps [k], values [seeds, k])` of a field, for all seeds that are complete."""
    return style.curves([r for r in records if r["frozen"] == frozen], name)


def features(records: list[dict]) -> list[dict]:
    """Table 1: the features whose GSNR rises most, in the first seed's whole network.

    Returns:
      Per feature: `feature`, `gsnr_start`, `gsnr_max`, `step` of the maximum, and the Pearson
      correlation with the target `correlation_start` and `correlation_max`, at the maximum.
    """
    first = min(r["seed"] for r in records)
    path = [r for r in records if r["seed"] == first and not r["frozen"]]
    path = sorted(path, key=lambda r: r["epoch"])
    names = [k.removeprefix("gsnr/") for k in path[0] if k.startswith("gsnr/feature")]
    rows = []
    for name in names:
        ratio = column(path, f"gsnr/{name}")
        if not np.isfinite(ratio).any():
            continue
        best = int(np.nanargmax(ratio))
        rows.append(
            {
                "feature": int(name.removeprefix("feature")),
                "gsnr_start": ratio[0],
                "gsnr_max": ratio[best],
                "step": path[best]["epoch"],
                "correlation_start": path[0][f"correlation/{name}"],
                "correlation_max": path[best][f"correlation/{name}"],
            }
        )
    return sorted(rows, key=lambda row: row["gsnr_start"] - row["gsnr_max"])[:BEST]


def summary(records: list[dict]) -> dict:
    """Start, maximum and end of the mean GSNR over the seeds, and table 1."""
    found = {}
    for frozen, label in ((False, "whole"), (True, "frozen")):
        if any(r["frozen"] == frozen for r in records):
            steps, values = curves(records, frozen, "gsnr/second_layer")
            mean = values.mean(0)
            found[label] = {
                "seeds": len(values),
                "gsnr_start": mean[0],
                "gsnr_max": mean.max(),
                "step_of_max": steps[mean.argmax()],
                "gsnr_end": mean[-1],
            }
    if any(not r["frozen"] for r in records):
        found["features"] = features(records)
    return found


def table(records: list[dict]) -> str:
    """The summary as two tables for a terminal."""
    found = summary(records)
    lines = ["first layer  seeds  GSNR at start  maximum (step)  at end"]
    for label in ("whole", "frozen"):
        if label in found:
            s = found[label]
            lines.append(
                f"{'learns' if label == 'whole' else 'frozen':>11}  {s['seeds']:5d}"
                f"  {s['gsnr_start']:13.4f}  {s['gsnr_max']:.4f} ({s['step_of_max']:.0f})"
                f"  {s['gsnr_end']:8.4f}"
            )
    lines += ["", "feature  correlation with y at start  at its GSNR's maximum (step)"]
    for row in found.get("features", []):
        lines.append(
            f"{row['feature']:7d}  {row['correlation_start']:27.2f}"
            f"  {row['correlation_max']:21.2f} ({row['step']:.0f})"
        )
    return "\n".join(lines)


def figure(records: list[dict]) -> plt.Figure:
    """Figure 6: the mean over the second layer with a band over seeds; its single parameters."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for frozen in (False, True):
        if not any(r["frozen"] == frozen for r in records):
            continue
        steps, values = curves(records, frozen, "gsnr/second_layer")
        style.draw_mean(left, steps, values, color=COLOURS[frozen], label=LABELS[frozen])
    left.set(
        xlabel="gradient-descent step", ylabel="GSNR, mean over the second layer", ylim=(0, None)
    )
    left.set_title(f"mean over {len(values)} seeds, band: one standard error", fontsize=10)
    left.legend(frameon=False)
    path = [r for r in records if not r["frozen"] and r["seed"] == min(r["seed"] for r in records)]
    path = sorted(path, key=lambda r: r["epoch"])
    marked = {row["feature"] for row in features(records)} if path else set()
    for name in [k for k in (path[0] if path else {}) if k.startswith("gsnr/feature")]:
        number = int(name.removeprefix("gsnr/feature"))
        right.plot(
            column(path, "epoch"),
            column(path, name),
            linewidth=1.6 if number in marked else 0.8,
            color=None if number in marked else "0.75",
            label=f"feature {number}" if number in marked else None,
            zorder=2 if number in marked else 1,
        )
    right.set(xlabel="gradient-descent step", ylabel="GSNR of a parameter", ylim=(0, None))
    right.set_title("single parameters of the second layer, first seed", fontsize=10)
    if marked:
        right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return drawn
