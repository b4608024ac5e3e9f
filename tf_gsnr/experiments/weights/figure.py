"""Weights against the change of their gradients: figure 7, and term (28) beside it."""

from __future__ import annotations

import numpy as np

from tf_gsnr.plots.claims import Claim, beyond, verdict, with_error
from tf_gsnr.plots.style import curves, draw_mean, over_seeds, plt

COLOURS = {"all": "#2a6fbb", "top": "#c8553d"}
LABELS = {"all": "all weights", "top": "top 10% by |W|"}
STEPS = {"below": "step of the layers below", "whole": "whole step"}
LINES = {"below": "-", "whole": "--"}
PARTS = {
    "own_weight": ("own weight, (28)", "#c8553d"),
    "other_weights": ("other weights", "#7a9e3a"),
    "errors": ("change of the errors", "#2a6fbb"),
    "remainder": ("remainder (kinks, higher orders)", "0.6"),
}
EARLY = 0.1  # [ours] "the early training stage" is this share of the epochs


def layers(records: list[dict]) -> list[str]:
    """The names of the layers, the lowest first."""
    start = "opposite/all/"
    return [name.removeprefix(start) for name in records[0] if name.startswith(start)]


def summary(records: list[dict]) -> dict:
    """Each field of figure 7 and each part of Delta g, over the epochs and the seeds.

    Returns:
      `seeds`, and for each field a dict: `early` and `mean`, over the first tenth of the epochs and
      over all, each with its standard error over the seeds, `_se`; `low` and `high` of the mean
      over the seeds, and their epochs `_epoch`; and `end`.
    """
    names = [f"correlation_{step}" for step in STEPS] + ["opposite", "growth"]
    names += [f"{kind}/{part}" for kind in ("explained", "contribution") for part in PARTS]
    names += ["term_correlation", "term_same_sign"]
    result = {"seeds": len(curves(records, "train_loss")[1])}
    for suffix in ["", *(f"/{layer}" for layer in layers(records))]:
        for name in [f"{name}/{which}{suffix}" for name in names for which in LABELS]:
            epochs, values = curves(records, name)
            if np.isfinite(values).any():
                result[name] = _over_epochs(epochs, values)
    return result


def _over_epochs(epochs, values):
    mean = values.mean(0)
    result = {"end": mean[-1]}
    for name, chosen in (("early", epochs <= EARLY * epochs[-1]), ("mean", epochs >= 0)):
        result[name], result[f"{name}_se"] = over_seeds(values[:, chosen].mean(1))
    for name, find in (("low", np.nanargmin), ("high", np.nanargmax)):
        if np.isfinite(mean).any():
            result[name], result[f"{name}_epoch"] = mean[find(mean)], epochs[find(mean)]
    return result


def table(records: list[dict]) -> str:
    """The summary as tables for a terminal."""
    result = summary(records)
    lines = [
        f"mean of {result['seeds']} seeds                            "
        "first tenth (s.e.)   all epochs (s.e.)     end"
    ]
    for name, text in _rows(records):
        if name in result:
            s = result[name]
            lines.append(
                f"{text:42}{s['early']:+10.3f} ({s['early_se']:.3f})"
                f"   {s['mean']:+9.3f} ({s['mean_se']:.3f})  {s['end']:+6.3f}"
            )
    if f"explained/{next(iter(PARTS))}/all" in result:
        lines += ["", "a step of the layers below, first tenth    correlation with W   of Delta g"]
        for part, (text, _) in PARTS.items():
            made, explained = (result[f"{k}/{part}/all"] for k in ("contribution", "explained"))
            lines.append(f"{text:42}{made['early']:+19.3f}   {explained['early']:10.1%}")
    return "\n".join(lines)


def _rows(records):
    for which, label in LABELS.items():
        yield f"growth/{which}", f"growth of g in a step, {label}"
    for which, label in LABELS.items():
        yield f"opposite/{which}", f"W g < 0, {label}"
    for layer in layers(records):
        for which, label in LABELS.items():
            yield f"opposite/{which}/{layer}", f"  {layer}, {label}"
    for step, what in STEPS.items():
        for which, label in LABELS.items():
            yield f"correlation_{step}/{which}", f"{what}, {label}"
        for layer in layers(records):
            for which, label in LABELS.items():
                yield f"correlation_{step}/{which}/{layer}", f"  {layer}, {label}"


def figure(records: list[dict]) -> plt.Figure:
    """Figure 7 above; below it, what Delta g by a step of the layers below is made of."""
    drawn, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (left, right), (made, explained) = axes
    for step, line in LINES.items():
        for which, label in LABELS.items():
            name = f"correlation_{step}/{which}"
            _draw(left, records, name, f"{label}, {STEPS[step]}", COLOURS[which], line)
    left.set(
        ylabel="correlation of $W$ with $\\Delta g$", title="figure 7a: one step's change of g"
    )
    first = layers(records)[0]
    for which, label in LABELS.items():
        _draw(right, records, f"opposite/{which}", label, COLOURS[which], "-")
        name, label = f"opposite/{which}/{first}", f"{label}, first layer: nothing below"
        _draw(right, records, name, label, COLOURS[which], ":", band=False)
    right.axhline(0.5, color="0.5", linewidth=1)
    right.set(
        ylabel="share of weights with $W g < 0$",
        title="figure 7b: opposite signs",
        ylim=(0.2, 1.02),
    )
    _draw(made, records, "correlation_below/all", "whole $\\Delta g$", "0.2", "-")
    for part, (label, colour) in PARTS.items():
        _draw(made, records, f"contribution/{part}/all", label, colour, "o-")
        _draw(explained, records, f"explained/{part}/all", label, colour, "o-")
    made.set(
        ylabel="contribution to the correlation",
        title="what correlates with $W$ (step of the layers below, all weights)",
    )
    explained.set(
        ylabel="share of $\\Delta g$",
        title="what $\\Delta g$ is made of (step of the layers below, all weights)",
    )
    for axis in axes.flat:
        if axis is not right:
            axis.axhline(0, color="0.5", linewidth=1)
        axis.set_xlabel("epoch")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, edgecolor="none", framealpha=0.9)
    run, seeds = records[0], len(curves(records, "train_loss")[1])
    batches = "full batch" if run["batch_size"] == run["n"] else f"batches of {run['batch_size']}"
    drawn.suptitle(
        f"{run['dataset']}, {run['n']} examples, {run['model']}, {batches}, learning rate "
        f"{run['learning_rate']:g}: mean over {seeds} seeds, band: one standard error",
        fontsize=11,
    )
    return drawn


def _draw(axis, records, name, label, colour, line, band=True):
    """The mean over the seeds of a field by epoch, with a band of one standard error."""
    epochs, values = curves(records, name)
    if not np.isfinite(values).any():
        return
    looks = dict(color=colour, label=label, markersize=4)
    if band:
        draw_mean(axis, epochs, values, line, **looks)
    else:
        axis.plot(epochs, values.mean(0), line, **looks)


def claims(records: list[dict]) -> list[Claim]:
    """The claims of section 3.3. A number is beyond another when it is by two standard errors."""
    s = summary(records)
    return _correlation_claims(records, s) + _sign_claims(records, s) + _term_claims(s)


def _correlation_claims(records, s):
    below, whole = (s[f"correlation_{step}/all"] for step in ("below", "whole"))
    negative = [beyond(-c["early"], c["early_se"]) for c in (below, whole)]
    growth, why = s["growth/all"], ""
    if whole["mean"] > 0 > growth["mean"]:
        why = (
            f"Later the whole step's is positive, at most {whole['high']:.2f} (epoch "
            f"{whole['high_epoch']:.0f}): a step changes g by {growth['early']:+.1%} of itself "
            f"over the first tenth, by {growth['mean']:+.1%} over all epochs, and where W g < 0 a "
            "g that shrinks changes towards W"
        )
    found = [
        Claim(
            "figure 7a",
            "Early in training, weights correlate negatively with their gradients' one-step change",
            "negative [text]",
            f"{_text(below, 'early')} by a step of the layers below, {_text(whole, 'early')} by "
            f"the whole step, over the first tenth of the epochs; {below['end']:.2f} and "
            f"{whole['end']:.2f} at the end",
            verdict(all(negative), any(negative)),
            why,
        )
    ]
    if all(f"correlation_{step}/top" in s for step in STEPS):  # a tiny network has too few
        below, whole = (s[f"correlation_{step}/top"] for step in ("below", "whole"))
        more = [
            beyond(*_difference(records, f"correlation_{step}/all", f"correlation_{step}/top"))
            for step in STEPS
        ]
        found.append(
            Claim(
                "figure 7a",
                "More so for the 10% with the largest |W|",
                "more negative [text]",
                f"{_text(below, 'early')} by a step of the layers below, {_text(whole, 'early')} "
                "by the whole step",
                verdict(all(more), any(more)),
            )
        )
    return found


def _sign_claims(records, s):
    share, top = s["opposite/all"], s["opposite/top"]
    first = s.get(f"opposite/top/{layers(records)[0]}")
    why = ""
    if first and beyond(first["mean"] - 0.5, first["mean_se"]):
        why = (
            f"In the first layer it is {_text(first, 'mean')}, though nothing is below it and (28) "
            "does not apply: the share alone is no evidence for (28)"
        )
    return [
        Claim(
            "figure 7b",
            "More weights have W g < 0 than not",
            "above 0.5 [text]",
            f"{_text(share, 'mean')} over all epochs, {share['end']:.2f} at the end",
            verdict(beyond(share["mean"] - 0.5, share["mean_se"]), share["end"] > 0.5),
        ),
        Claim(
            "figure 7b",
            "Towards 80% of the 10% with the largest |W| have W g < 0",
            "nearly 0.8 [text]",
            f"{_text(top, 'mean')} over all epochs, {_text(top, 'early')} over the first tenth, at "
            f"most {top['high']:.2f} (epoch {top['high_epoch']:.0f}), {top['end']:.2f} at the end",
            verdict(top["high"] >= 0.75, top["high"] > 0.5),
            why,
        ),
    ]


def _term_claims(s):
    """Whether (28) is what makes the correlation, and most of Delta g."""
    if "contribution/own_weight/all" not in s:
        return []
    made, explained = (s[f"{kind}/own_weight/all"] for kind in ("contribution", "explained"))
    errors, change = s["contribution/errors/all"], s["correlation_below/all"]
    share = explained["early"]
    causes = change["early"] < 0 and made["early"] < change["early"] / 2
    return [
        Claim(
            "section 3.3",
            "Term (28) leads the change of g by a step of the layers below, and makes it correlate "
            "negatively with W",
            "its sign is against W [derived]",
            f"it contributes {_text(made, 'early')} to the correlation of {change['early']:.2f} "
            f"over the first tenth of the epochs, and is {share:.0%} of the change",
            verdict(causes and share > 0.5, causes),
            f"Most of the change has no fixed sign against W; at the end (28) contributes "
            f"{made['end']:.2f} and the change of the errors {errors['end']:.2f}",
        )
    ]


def _difference(records, larger, smaller):
    """The mean over the seeds of early `larger - smaller`, with its standard error."""
    epochs, one = curves(records, larger)
    _, other = curves(records, smaller)
    early = (one - other)[:, epochs <= EARLY * epochs[-1]].mean(1)
    return over_seeds(early)


def _text(field, when):
    return with_error(field[when], field[f"{when}_se"], ".2f")
