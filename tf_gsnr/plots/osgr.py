"""OSGR predicted against measured: figures 4, 9 and 11."""

from __future__ import annotations

import numpy as np

from tf_gsnr.plots.style import by, column, pearson, plt

MARKERS = "osD^vP*X"


def summary(records: list[dict]) -> dict:
    """Per epoch: how well the predicted OSGR matches the measured one.

    Returns:
      A dict of dicts by epoch (as text): `pearson`; `measured_minus_predicted`, the mean over the
      configurations; `within_two_se`, the share whose difference is under two standard errors;
      `small_step`, the share of configurations still in the small-step regime; `configurations`.
    """
    found = {
        "pearson": {},
        "measured_minus_predicted": {},
        "within_two_se": {},
        "small_step": {},
        "configurations": {},
    }
    for epoch, group in by(records, "epoch").items():
        measured, predicted = column(group, "osgr_measured"), column(group, "osgr_predicted")
        se = np.hypot(column(group, "osgr_measured_se"), column(group, "osgr_predicted_se"))
        key = str(epoch)
        found["pearson"][key] = pearson(predicted, measured)
        found["measured_minus_predicted"][key] = float(np.mean(measured - predicted))
        found["within_two_se"][key] = float(np.mean(np.abs(measured - predicted) < 2 * se))
        found["small_step"][key] = float(np.mean([r["small_step"] for r in group]))
        found["configurations"][key] = len(group)
    return found


def table(records: list[dict]) -> str:
    """The summary as a table for a terminal, a line an epoch."""
    s = summary(records)
    lines = ["  epoch  Pearson  measured - predicted  within 2 s.e.  small step  configurations"]
    for epoch in s["pearson"]:
        lines.append(
            f"{epoch:>7}  {s['pearson'][epoch]:7.3f}  {s['measured_minus_predicted'][epoch]:+20.3f}"
            f"  {s['within_two_se'][epoch]:12.0%}  {s['small_step'][epoch]:10.0%}"
            f"  {s['configurations'][epoch]:14d}"
        )
    return "\n".join(lines)


def figure(records: list[dict]) -> plt.Figure:
    """Figure 4 (and 9, 11): a panel per epoch, a point per configuration, measured over predicted.

    Colour is n, marker is p_random, error bars are one standard error; hollow points have left the
    small-step regime. All panels share their axes.
    """
    epochs = by(records, "epoch")
    columns = min(len(epochs), 3)
    rows = -(-len(epochs) // columns)
    drawn, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.6 * columns + 1.6, 3.5 * rows + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    sizes = sorted({r["n"] for r in records})
    noises = sorted({r["p_random"] for r in records})
    colours = dict(zip(sizes, plt.cm.viridis(np.linspace(0, 0.9, len(sizes)))))
    markers = dict(zip(noises, (MARKERS * len(noises))[: len(noises)]))
    low, high = _limits(records)
    for axis, (epoch, group) in zip(axes.flat, epochs.items()):
        axis.plot([low, high], [low, high], "--", color="0.6", linewidth=1, zorder=0)
        for r in group:
            axis.errorbar(
                r["osgr_predicted"],
                r["osgr_measured"],
                xerr=_error(r["osgr_predicted_se"]),
                yerr=_error(r["osgr_measured_se"]),
                fmt=markers[r["p_random"]],
                color=colours[r["n"]],
                markerfacecolor=colours[r["n"]] if r["small_step"] else "none",
                markersize=5.5,
                elinewidth=0.8,
                alpha=0.9,
            )
        value = pearson(column(group, "osgr_predicted"), column(group, "osgr_measured"))
        axis.set_title(f"epoch {epoch}", fontsize=11)
        axis.text(0.04, 0.94, f"Pearson {value:.3f}", transform=axis.transAxes, va="top")
        axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(epochs) :]:
        axis.set_visible(False)
    for place, axis in enumerate(axes[-1]):
        if not axis.get_visible():
            axes[-2][place].xaxis.set_tick_params(labelbottom=True)
    drawn.supxlabel("OSGR predicted from per-example gradients, (24)")
    drawn.supylabel("OSGR measured, (23)")
    handles = [
        plt.Line2D([], [], color=colours[n], marker="o", linestyle="", label=f"n = {n}")
        for n in sizes
    ] + [
        plt.Line2D([], [], color="0.35", marker=markers[p], linestyle="", label=f"p_random = {p}")
        for p in noises
    ]
    if not all(r["small_step"] for r in records):
        handles.append(
            plt.Line2D(
                [], [], color="0.35", marker="o", fillstyle="none", linestyle="", label="large step"
            )
        )
    drawn.legend(handles=handles, loc="outside right upper", frameon=False)
    first = records[0]
    drawn.suptitle(
        f"{first['dataset']}: {len(epochs[records[0]['epoch']])} configurations, "
        f"M = {first['training_sets']}, learning rate {first['learning_rate']:g}",
        fontsize=12,
    )
    return drawn


def _error(se):
    return se if np.isfinite(se) else None


def _limits(records):
    """Axes that hold all points, whatever outliers' error bars do."""
    values = np.concatenate([column(records, k) for k in ("osgr_measured", "osgr_predicted")])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin
