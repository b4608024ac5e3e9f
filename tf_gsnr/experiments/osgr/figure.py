"""OSGR predicted against measured: figures 4, 9 and 11."""

from __future__ import annotations

import numpy as np

from tf_gsnr.experiments.framework.statistics import pearson
from tf_gsnr.experiments.osgr import noise
from tf_gsnr.plots.claims import Claim, verdict
from tf_gsnr.plots.style import by, column, data_of, plt

MARKERS = "osD^vP*X"
FIGURES = {"mnist": "figure 4", "cifar10": "figure 9", "toy": "figure 11"}

# With batch normalisation (24) is there twice: with the statistics as constants, which is the
# paper's, and as what they are, functions of the weights.
FROZEN = "osgr_predicted_frozen"

# Both sides by a step on training sets that the models have not seen.
UNSEEN, UNSEEN_MEASURED = "osgr_unseen_predicted", "osgr_unseen_measured"

WIDE = 2.0  # of all points' OSGR: then each panel has limits of its own


def summary(records: list[dict]) -> dict:
    """Per epoch: how well the predicted OSGR matches the measured one.

    Returns:
      A dict of dicts by epoch (as text): `pearson`, `pearson_interval`, its 95% interval, and
      `pearson_on_a_line`, what points on a line would show, given their errors: median, 2.5% and
      97.5% points (`noise.on_a_line`); `measured_minus_predicted`, the mean over the
      configurations; `within_two_se`, the share whose difference is under two standard errors;
      `small_step`, the share of configurations still in the small-step regime; `configurations`.
      With batch normalisation also `frozen`, the first three with its statistics as constants;
      where measured, `unseen`, the same by training sets that the models have not seen.
    """
    result = _agreement(records, "osgr_predicted") | {"small_step": {}, "configurations": {}}
    for epoch, group in by(records, "epoch").items():
        result["small_step"][str(epoch)] = float(np.mean([r["small_step"] for r in group]))
        result["configurations"][str(epoch)] = len(group)
    if all(FROZEN in r for r in records):
        result["frozen"] = _agreement(records, FROZEN)
    if all(UNSEEN in r for r in records):
        result["unseen"] = _agreement(records, UNSEEN, UNSEEN_MEASURED)
    return result


def _agreement(records, field, measured_field="osgr_measured") -> dict:
    fields = "pearson pearson_interval pearson_on_a_line measured_minus_predicted within_two_se"
    result: dict[str, dict] = {name: {} for name in fields.split()}
    for epoch, group in by(records, "epoch").items():
        measured, predicted = column(group, measured_field), column(group, field)
        errors = [column(group, f"{name}_se") for name in (field, measured_field)]
        se = np.hypot(*errors)
        key = str(epoch)
        result["pearson"][key] = found = pearson(predicted, measured)
        result["pearson_interval"][key] = noise.interval(found, len(group))
        result["pearson_on_a_line"][key] = noise.on_a_line(predicted, *errors)
        result["measured_minus_predicted"][key] = float(np.mean(measured - predicted))
        result["within_two_se"][key] = float(np.mean(np.abs(measured - predicted) < 2 * se))
    return result


def table(records: list[dict]) -> str:
    """The summary as a table for a terminal, a line an epoch."""
    s = summary(records)
    lines = [
        "  epoch  Pearson  95% interval    on a line  measured - predicted  within 2 s.e."
        "  small step  configurations"
    ]
    for epoch in s["pearson"]:
        lines.append(
            f"{_row(s, epoch)}  {s['small_step'][epoch]:10.0%}  {s['configurations'][epoch]:14d}"
        )
    if "frozen" in s:
        lines += ["predicted with the batch-norm statistics as constants:"]
        lines += [_row(s["frozen"], epoch) for epoch in s["pearson"]]
    if "unseen" in s:
        lines += ["both sides by training sets that the models have not seen, at the same weights:"]
        lines += [_row(s["unseen"], epoch) for epoch in s["pearson"]]
    return "\n".join(lines)


def _row(agreement, epoch):
    low, high = agreement["pearson_interval"][epoch]
    return (
        f"{epoch:>7}  {agreement['pearson'][epoch]:7.3f}  {low:5.2f} to {high:4.2f}"
        f"  {agreement['pearson_on_a_line'][epoch][0]:11.3f}"
        f"  {agreement['measured_minus_predicted'][epoch]:+20.3f}"
        f"  {agreement['within_two_se'][epoch]:12.0%}"
    )


def claims(records: list[dict]) -> list[Claim]:
    """What section 2.4 and appendix A say of the figure of this data set, and what we find.

    Configurations beyond the small-step regime are left out: the measured side means nothing there.
    """
    where = FIGURES.get(records[0]["dataset"], records[0]["dataset"])
    small = [r for r in records if r["small_step"]]
    small = [r for g in by(small, "epoch").values() if len(g) > 2 for r in g]
    if not small:
        return []
    why = ""
    if len(small) < len(records):
        left_out = len(records) - len(small)
        why = f"{left_out} of {len(records)} points left out, whose steps were too large"
    frozen = all(FROZEN in r for r in small)
    field = FROZEN if frozen else "osgr_predicted"
    near, distance = _near_the_diagonal(small, field)
    low, correlation = _correlation(small, field)
    if not frozen:
        reported = "0.907 to 0.968 [reported]" if where == "figure 4" else "high [text]"
        causes = ". ".join([_possible_causes(small), _noise(small, field)])
        why = "; ".join(filter(None, [causes, why]))
        return [
            Claim(
                where,
                "early in training the points lie along the diagonal",
                "along the diagonal [text]",
                distance,
                verdict(near >= 0.8, near >= 0.5),
                why,
            ),
            Claim(
                where,
                "predicted and measured OSGR stay correlated as training goes on",
                f"Pearson {reported}",
                correlation,
                verdict(low >= 0.9, low >= 0.7),
                why,
            ),
        ]
    follow = "with statistics that follow the weights: "
    return [
        Claim(
            where,
            "with batch norm the points do not lie on the diagonal, even early",
            "off the diagonal [text]",
            distance,
            verdict(near < 0.5, near < 0.8),
            follow + _near_the_diagonal(small, "osgr_predicted")[1],
        ),
        Claim(
            where,
            "with batch norm predicted and measured OSGR are strongly correlated",
            "strong positive correlation [text]",
            correlation,
            verdict(low >= 0.8, low >= 0.5),
            "; ".join(
                filter(
                    None,
                    [
                        follow + _correlation(small, "osgr_predicted")[1],
                        _noise(small, field),
                        why,
                    ],
                )
            ),
        ),
    ]


def _possible_causes(records):
    """What the step size and the noise can account for of the distance to the diagonal."""
    first_order = column(records, "first_order_ratio").mean()
    errors = [column(records, f"osgr_{side}_se") for side in ("measured", "predicted")]

    def distances(*fields):
        gaps = _agreement(records, *fields)["measured_minus_predicted"]
        return ", ".join(f"{gap:+.3f} at epoch {epoch}" for epoch, gap in gaps.items())

    adaptation = ""
    if all(UNSEEN in r for r in records):
        adaptation = (
            ". The models' adaptation to their training sets, which (19) leaves out: by steps from "
            "the same weights on training sets that the models have not seen, measured - "
            f"predicted is {distances(UNSEEN, UNSEEN_MEASURED)}"
        )
    return (
        f"measured - predicted is {distances('osgr_predicted')}. The step size: to first order the "
        f"training loss falls by lambda |g|^2, on average {first_order:.3f} of what it does fall "
        "by. The number of training sets and the finite test set: a point's standard error is "
        f"{np.median(np.hypot(*errors)):.3f} (median){adaptation}"
    )


def _near_the_diagonal(records, field):
    """At the first epoch: the share of points within two standard errors; the same in words."""
    agreement = _agreement(records, field)
    epoch = next(iter(agreement["pearson"]))
    near = agreement["within_two_se"][epoch]
    mean = agreement["measured_minus_predicted"][epoch]
    return near, (
        f"epoch {epoch}: measured - predicted {mean:+.3f} on average, {near:.0%} of the points "
        "within 2 s.e."
    )


def _correlation(records, field):
    """The smallest Pearson correlation of all epochs; all of them in words."""
    agreement = _agreement(records, field)
    found, intervals = agreement["pearson"], agreement["pearson_interval"]
    values = ", ".join(
        f"{value:.3f} ({intervals[epoch][0]:.2f} to {intervals[epoch][1]:.2f})"
        for epoch, value in found.items()
    )
    groups = [len(group) for group in by(records, "epoch").values()]
    points = f"{min(groups)} to {max(groups)}" if min(groups) < max(groups) else f"{groups[0]}"
    text = f"Pearson {values} at epochs {', '.join(found)}, of {points} points"
    return min(found.values()), text


def _noise(records, field):
    """How much of the distance of the correlation from 1 is noise of M and of the test set."""
    agreement = _agreement(records, field)
    lines = agreement["pearson_on_a_line"].items()
    would = ", ".join(f"{m:.3f} ({low:.2f} to {high:.2f})" for _, (m, low, high) in lines)
    inside = [agreement["pearson"][e] >= low for e, (_, low, _) in lines]
    judged = {
        True: "all of the distance from 1 can be noise",
        False: "noise is not all of the distance from 1",
    }[all(inside)]
    return (
        f"Noise of the M training sets and of the test set: points exactly on a line, with the "
        f"errors that these have, would show Pearson {would} (95% of 2,000 draws); {judged}"
        + ("" if all(inside) or not any(inside) else f", at {sum(inside)} of {len(inside)} epochs")
    )


def figure(records: list[dict]) -> plt.Figure:
    """Figure 4 (and 9, 11): a panel per epoch, a point per configuration, measured over predicted.

    Colour is n, marker is p_random, error bars are one standard error; hollow points have left the
    small-step regime. All panels share their axes, unless some points are far out. With batch
    normalisation there are rows of panels for its statistics as constants, and as functions of the
    weights; where measured, others for both sides by training sets that the models have not seen.
    """
    epochs = by(records, "epoch")
    kinds = _kinds(records)
    fields = {field for kind in kinds for field in kind[:2]}
    limits = _limits(records, fields)
    shared = limits[1] - limits[0] < WIDE
    columns = min(len(epochs), 3)
    rows = -(-len(epochs) // columns) * len(kinds)
    drawn, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.6 * columns + 1.6, 3.5 * rows + 0.7),
        sharex=shared,
        sharey=shared,
        squeeze=False,
        layout="constrained",
    )
    sizes = sorted({r["n"] for r in records})
    noises = sorted({r["p_random"] for r in records})
    colours = dict(zip(sizes, plt.cm.viridis(np.linspace(0, 0.9, len(sizes)))))
    markers = dict(zip(noises, (MARKERS * len(noises))[: len(noises)]))
    blocks = zip(np.split(axes, len(kinds)), kinds)
    panels = [(a, e, kind) for block, kind in blocks for a, e in zip(block.flat, epochs)]
    for axis, epoch, (field, measured, label) in panels:
        group = epochs[epoch]
        low, high = limits if shared else _limits(group, (field, measured))
        axis.plot([low, high], [low, high], "--", color="0.6", linewidth=1, zorder=0)
        for r in group:
            axis.errorbar(
                r[field],
                r[measured],
                xerr=_error(r[f"{field}_se"]),
                yerr=_error(r[f"{measured}_se"]),
                fmt=markers[r["p_random"]],
                color=colours[r["n"]],
                markerfacecolor=colours[r["n"]] if r["small_step"] else "none",
                markersize=5.5,
                elinewidth=0.8,
                alpha=0.9,
            )
        value = pearson(column(group, field), column(group, measured))
        axis.set_title(f"epoch {epoch}" + (label and f", {label}"), fontsize=11 - bool(label))
        axis.text(0.96, 0.05, f"Pearson {value:.3f}", transform=axis.transAxes, ha="right")
        axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axis.grid(alpha=0.25)
    used = [axis for axis, _, _ in panels]
    for axis in axes.flat:
        axis.set_visible(axis in used)
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
        f"{data_of(first)}: {len(epochs[records[0]['epoch']])} configurations, "
        f"M = {first['training_sets']}, learning rate {first['learning_rate']:g}",
        fontsize=12,
    )
    return drawn


def _kinds(records):
    """The rows of panels: the fields of the predicted and of the measured side, and a label."""
    kinds = [("osgr_predicted", "osgr_measured", "")]
    if all(FROZEN in r for r in records):
        kinds = [
            (FROZEN, "osgr_measured", "statistics constant"),
            ("osgr_predicted", "osgr_measured", "statistics follow the weights"),
        ]
    if all(UNSEEN in r for r in records):
        kinds.append((UNSEEN, UNSEEN_MEASURED, "unseen training sets"))
    return kinds


def _error(se):
    return se if np.isfinite(se) else None


def _limits(records, fields):
    """Axes that hold all points, whatever outliers' error bars do."""
    values = np.concatenate([column(records, k) for k in fields])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin
