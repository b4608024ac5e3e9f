"""Predicted against measured gap over the whole training: how long each prediction is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_gsnr.experiments.framework.statistics import student
from tf_gsnr.plots.claims import Claim, verdict
from tf_gsnr.plots.style import by, column, data_of, plt

PREDICTIONS = {
    "first_order": "sum of (14) over the steps",
    "twins": "twins: examples weighted 1 + eta e, 1 - eta e",
    "folds": "K-fold: models without a K-th of the examples",
    "influence": "influence: the twins' limit, by the Hessian",
    "curvature": "propagated with the curvature",
}
COLOURS = {"first_order": "C3", "twins": "C0", "folds": "C2", "influence": "C4", "curvature": "C1"}
LEFT = (0.9, 0.75, 0.5, 0.25)  # of the training loss at the start
NEAR = 0.3  # a prediction is right within this, or within the 95% interval
HALF = 0.5  # of the training loss


class Curves:
    """One training set-up, over its seeds: arrays over the measured epochs.

    Attributes:
      name: of the set-up, in words.
      epochs, loss: those measured; the mean training loss, of that at the start.
      gap, se: of the mean over seeds, with the error that seeds and training sets leave.
      test_gap: by the test set.
      predicted: name -> `(mean, standard error)`, of the predictions that there are.
      reach: standard errors of a 95% interval.
    """

    def __init__(self, name, records):
        self.name = name
        seeds = list(by(records, "seed").values())
        self.reach = student(len(seeds))
        complete = min(map(len, seeds))
        self.epochs = column(seeds[0], "epoch")[:complete]

        def over_seeds(field):
            return np.array([column(seed, field)[:complete] for seed in seeds])

        losses = over_seeds("train_loss")
        self.loss = losses.mean(0) / losses[:, :1].mean(0)
        self.gap, self.se = _mean(over_seeds("gap"), over_seeds("gap_se"))
        self.test_gap = _mean(over_seeds("test_gap"), over_seeds("test_gap_se"))
        self.predicted = {}
        for field in PREDICTIONS:
            values = over_seeds(field)
            if np.isfinite(values).any():
                within = over_seeds(f"{field}_se") if field in ("twins", "folds") else 0 * values
                self.predicted[field] = _mean(values, within)

    def at(self, left) -> int | None:
        """The first measurement at which no more than this of the training loss is left."""
        below = np.flatnonzero(self.loss <= left)
        return int(below[0]) if len(below) else None

    def told(self) -> np.ndarray:
        """At which measurements the gap can be told from zero."""
        return (self.gap > self.reach * self.se) & (self.epochs > 0)

    def ratio(self, field, i) -> float:
        """Predicted over measured gap; NaN where the gap cannot be told from zero."""
        return float(self.predicted[field][0][i] / self.gap[i]) if self.told()[i] else float("nan")

    def is_right(self, field) -> np.ndarray:
        """At which measurements it is right: within `NEAR`, or the difference's 95% interval."""
        mean, se = self.predicted[field]
        errors = self.reach * np.hypot(se, self.se)
        return np.abs(mean - self.gap) <= np.maximum(NEAR * np.abs(self.gap), errors)

    def right_until(self, field) -> float:
        """The training loss left, of the start's, down to which the prediction is right."""
        right = self.is_right(field)
        wrong = np.flatnonzero(~right[1:]) + 1
        last = wrong[0] - 1 if len(wrong) else len(right) - 1
        return float(self.loss[last])


def _mean(values, within):
    """Mean over seeds, and its error: of their spread, or of each seed's own, if that is larger."""
    n = len(values)
    own = np.sqrt((within**2).mean(0) / n)
    return values.mean(0), np.maximum(own, values.std(0, ddof=1) / n**0.5) if n > 1 else own


def set_ups(records) -> list[Curves]:
    """The curves of each training set-up."""
    groups: dict = {}
    for r in records:
        groups.setdefault((r["n"], r["p_random"], r["optimizer"], r["batch_size"]), []).append(r)
    several = [len({key[i] for key in groups}) > 1 for i in range(4)]
    found = []
    for (n, p, optimizer, size), group in groups.items():
        batches = f"batches of {size}" if size else "full batch"
        words = [f"n = {n}", f"{p:.0%} random labels", optimizer, batches]
        name = ", ".join(w for w, k in zip(words, several) if k) or ", ".join(words)
        found.append(Curves(name, group))
    return found


def summary(records: list[dict]) -> dict:
    """Per set-up: the ratio predicted over measured, and how long each prediction is right.

    Returns:
      `{set-up: {prediction: {"ratio": {training loss left: ratio}, "right_until": loss left}}}`.
    """
    result = {}
    for curves in set_ups(records):
        result[curves.name] = {
            field: {
                "ratio": {
                    str(left): curves.ratio(field, i)
                    for left in LEFT
                    if (i := curves.at(left)) is not None
                },
                "right_until": curves.right_until(field),
            }
            for field in curves.predicted
        }
    return result


def table(records: list[dict]) -> str:
    """The summary for a terminal."""
    lines = [
        "predicted over measured gap where so much of the training loss is left; and down to which "
        "of it the prediction is right, within 30% or 95% intervals (nan: the gap cannot be told "
        "from zero there)"
    ]
    header = "".join(f"{left:>7.0%}" for left in LEFT)
    for curves in set_ups(records):
        lines += ["", f"{curves.name:<46}{header}  right until"]
        for name, values in (
            ("measured gap", curves.gap),
            ("  its standard error", curves.se),
            ("the same by the test set", curves.test_gap[0]),
            ("  its standard error", curves.test_gap[1]),
        ):
            numbers = [_number(values, curves.at(left), ".3f") for left in LEFT]
            lines.append(f"  {name:<44}{''.join(numbers)}")
        for field in curves.predicted:
            ratios = [
                f"{curves.ratio(field, i):7.2f}"
                if (i := curves.at(left)) is not None
                else "      -"
                for left in LEFT
            ]
            until = f"{curves.right_until(field):.0%}"
            lines.append(f"  {PREDICTIONS[field]:<44}{''.join(ratios)}  {until:>11}")
    return "\n".join(lines)


def _number(values, i, form):
    return "      -" if i is None else f"{values[i]:7{form}}"


def claims(records: list[dict]) -> list[Claim]:
    """Which prediction holds, over the measurements whose gap can be told from zero."""
    curves = [c for c in set_ups(records) if c.told().any()]
    found = []
    for field, name in PREDICTIONS.items():
        among = [c for c in curves if field in c.predicted]
        if not among:
            continue
        right = [bool(c.is_right(field)[c.told()].all()) for c in among]
        ratios = [c.ratio(field, i) for c in among for i in np.flatnonzero(c.told())]
        left = np.concatenate([c.loss[c.told()] for c in among])
        where = f"with {left.max():.0%} to {left.min():.0%} of the training loss left"
        found.append(
            Claim(
                "beyond the paper",
                f"The gap is predicted through training by: {name}",
                "(14), of one step [derived]" if field == "first_order" else "not in the paper",
                f"predicted over measured {min(ratios):.2f} to {max(ratios):.2f} where the gap can "
                f"be told from zero, {where}; right all the way in {sum(right)} of {len(right)} "
                "set-ups",
                verdict(all(right), sum(right) >= len(right) / 2),
                WHY.get(field, ""),
            )
        )
    return found


WHY = {
    "first_order": (
        "each step's term is right to first order; their sum supposes that what a step fits of the "
        "noise stays, while later steps undo most of it along sharp directions"
    ),
    "folds": (
        "needs K trainings; the models without a K-th see fewer examples, which is corrected as if "
        "the gap went as 1/N"
    ),
}


def figure(records: list[dict]) -> plt.Figure:
    """A panel a set-up: the gap as measured and as predicted, on a logarithmic axis."""
    curves = set_ups(records)
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    drawn, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.4 * columns + 0.4, 3.6 * rows + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for axis, one in zip(axes.flat, curves):
        after = slice(min(1, len(one.epochs) - 1), None)  # at the start all is zero
        axis.plot(one.epochs[after], one.gap[after], color="0.15", linewidth=2.2, label="measured")
        _band(axis, one.epochs[after], one.gap[after], one.reach * one.se[after], "0.15")
        by_test_set = {"color": "0.45", "linewidth": 1, "linestyle": "--"}
        axis.plot(one.epochs[after], one.test_gap[0][after], label="by the test set", **by_test_set)
        for field, (mean, se) in one.predicted.items():
            look = {"color": COLOURS[field], "linewidth": 1.5, "label": PREDICTIONS[field]}
            axis.plot(one.epochs[after], mean[after], **look)
            _band(axis, one.epochs[after], mean[after], one.reach * se[after], COLOURS[field])
        half = one.at(HALF)
        if half is not None:
            axis.axvline(one.epochs[half], color="0.6", linestyle=":", linewidth=1)
            axis.text(
                one.epochs[half],
                0.02,
                " loss halved",
                transform=axis.get_xaxis_transform(),
                fontsize=8,
                color="0.4",
            )
        top = max(np.nanmax(v[0][after]) for v in [(one.gap,), *one.predicted.values()])
        axis.set(yscale="log", xlabel="epoch", ylabel="generalisation gap")
        axis.set_ylim(max(np.nanmax(one.gap) / 300, 1e-6), max(top * 1.5, 1e-5))
        axis.set_title(one.name, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes.flat[: len(curves)]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    place: Any = "outside lower center"
    drawn.legend(handles=list(handles.values()), loc=place, ncols=2, frameon=False)
    first = records[0]
    drawn.suptitle(
        f"{data_of(first)}, {first['model']}: the gap predicted from the training set",
        fontsize=12,
    )
    return drawn


def _band(axis, x, mean, half, colour):
    if np.isfinite(half).any():
        low = np.maximum(mean - half, 1e-9)
        axis.fill_between(x, low, mean + half, color=colour, alpha=0.15, linewidth=0)
