"""What a training's numbers mean, in sentences: the head of the page, its tiles, its warnings."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np

from tf_gsnr import progress
from tf_gsnr.status.training import Training

MANY_DEAD = 0.5  # share of a layer's parameters without variance, from which it is named
JUMPS = 1 / 4  # share of measured steps that raised the probe's loss, from which it is said


class Tile(NamedTuple):
    """A number with what it means for this run; `tone` is "good", "middling", "bad" or ""."""

    label: str
    value: str
    error: str
    sentence: str
    tone: str = ""


def head(run: Training) -> list[tuple[str, str]]:
    """What was trained and measured: pairs of a label and a text."""
    settings, config = run.settings, run.config
    pairs = [
        ("model", f"{settings.get('model')}, {_count(settings.get('parameters'))} parameters"),
        ("optimiser", _optimiser(run)),
        ("loss", settings.get("loss")),
        ("training examples N", _count(examples(run))),
        ("batch", _batch(run)),
        ("probe set", _count(settings.get("probe_examples"))),
        ("test set", _count(settings.get("test_examples") or None)),
        ("measured by", _measured_by(settings)),
        ("steps", f"{_count(run.rows[-1]['step'])}" if run.rows else "0"),
        ("time", _time(run.last("seconds"))),
        ("started", config.get("started")),
        ("on", f"{config.get('cpus')} cores of {config.get('processor')}"),
    ]
    accelerators = [d for d in config.get("devices") or [] if d != "CPU"]
    if accelerators:
        pairs[-1] = ("on", ", ".join(map(str, accelerators)))
    return [(label, str(text)) for label, text in pairs if text not in (None, "", "None")]


def _optimiser(run):
    rate = run.last("learning_rate")
    rate = run.settings.get("learning_rate") if math.isnan(rate) else rate
    name = run.settings.get("optimizer")
    return f"{name}, rate {number(rate)}" if isinstance(rate, (int, float)) else name


def _time(seconds):
    return progress.duration(seconds) if math.isfinite(seconds) else None


def _measured_by(settings):
    if settings.get("measured_by") == "GSNRModel":
        every = settings.get("measure_every", 1)
        return "GSNRModel, at every step" if every == 1 else f"GSNRModel, 1 step in {every}"
    return f"GSNRCallback, {settings.get('cadence')}"


def examples(run: Training):
    """N, None where it is not known."""
    told = run.settings.get("examples") or run.last("examples")
    return int(told) if isinstance(told, (int, float)) and told > 0 else None


def batch_size(run: Training) -> float:
    """Of a training step: as measured, or made up from N and the steps of an epoch; else NaN."""
    measured = run.last("batch_size")
    if measured > 0:
        return math.ceil(measured)  # the last batch of an epoch may be smaller
    steps, n = run.config.get("steps_per_epoch"), examples(run)
    return math.ceil(n / steps) if steps and n else math.nan


def _batch(run):
    size = batch_size(run)
    if math.isnan(size):
        return None
    return _count(size) if run.last("batch_size") > 0 else f"about {number(size)}"


def tiles(run: Training) -> list[Tile]:
    """The numbers of the last measurement."""
    if not run.rows:
        return []
    found = [_gsnr(run), _predicted(run), _measured(run), _gap(run), _noise_scale(run)]
    return [tile for tile in found if tile is not None]


def _gsnr(run):
    value, least = run.column("gsnr/mean")[-1], run.column("gsnr/least")[-1]
    count = run.rows[-1].get("count")
    if not math.isfinite(value):
        return Tile(
            "GSNR",
            "not told",
            "",
            f"too few examples ({_count(count)}) to tell the signal from zero: it is below "
            f"{number(least)}",
            "middling",
        )
    sentence = f"examples agree: the mean parameter's signal is {number(value)} of its variance"
    n = examples(run)
    if n:
        sentence += f", {number(value * n)} times 1/N: " + (
            "a step carries over" if value * n > 1 else "little of a step carries over"
        )
    return Tile("GSNR", number(value), f"told from zero above {number(least)}", sentence)


def _predicted(run):
    value, se = run.column("osgr_predicted")[-1], run.column("osgr_predicted_se")[-1]
    if not math.isfinite(value):
        return Tile("OSGR, predicted", "not told", "", "the signal cannot be told from zero")
    share = f"{100 * value:.0f} %" if value < 0.995 else "nearly all"
    tone = "good" if value > 0.8 else "middling" if value > 0.4 else "bad"
    return Tile(
        "OSGR, predicted",
        f"{value:.3f}",
        _error(se),
        f"{share} of what a step takes off the training loss is expected to show on unseen data",
        tone,
    )


def _measured(run):
    if not run.settings.get("test_examples"):
        return None
    values, errors = run.column("osgr_measured"), run.column("osgr_measured_se")
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return Tile(
            "OSGR, measured", "unknown", "", "no measured step lowered the loss of the probe set"
        )
    value, se = values[known[-1]], errors[known[-1]]
    predicted = run.column("osgr_predicted")[known[-1]]
    if not math.isfinite(se) or se > 0.5:
        sentence = "too noisy to say: measure more steps, or take a larger test set"
    elif not math.isfinite(predicted):
        sentence = "the share of the probe's decrease that the test loss showed"
    elif abs(value - predicted) <= 2 * math.hypot(se, run.last("osgr_predicted_se")):
        sentence = "agrees with the prediction, within two standard errors"
    else:
        side = "below" if value < predicted else "above"
        sentence = f"{side} the prediction by {number(abs(value - predicted))}"
        if side == "below":
            sentence += ": the model has adapted to its training examples"
    return Tile("OSGR, measured", f"{value:.3f}", _error(se), sentence)


def _gap(run):
    values = run.column("gap")
    known = np.flatnonzero(np.isfinite(values))
    predicted = run.last("gap_predicted")
    if not known.size:
        if not math.isfinite(predicted):
            return None
        return Tile(
            "gap, first-order theory",
            f"{predicted:+.3g}",
            "",
            "what (14) adds up to over the steps; what later steps undo is not taken off, so it is "
            "too large, by up to 17 times on MNIST. GSNRCallback with test_data measures the gap "
            "beside it",
        )
    value, se = values[known[-1]], run.column("gap_se")[known[-1]]
    if math.isfinite(se) and abs(value) < 2 * se:
        sentence = "test and training loss have not parted by more than chance"
    else:
        sentence = f"test loss has parted from training loss by {value:+.3g}"
    if predicted > 0 and value > 0 and not abs(value) < 2 * se:
        ratio = predicted / value
        sentence += f"; first-order theory adds up to {number(predicted)}"
        if ratio > 2:
            sentence += f", {number(ratio)} times that: late in training it is too large"
    return Tile("gap", f"{value:+.3g}", _error(se), sentence)


def _noise_scale(run):
    value, size = run.column("noise_scale")[-1], batch_size(run)
    if not math.isfinite(value):
        return Tile(
            "noise scale",
            "not told",
            "",
            "larger than the examples measured can tell: the gradient is mostly noise",
        )
    if math.isnan(size):
        return Tile("noise scale", number(value), "examples", "batches far below it still pay")
    text = f"batch {number(round(size))}"
    if size < value / 2:
        sentence = f"{text}: larger batches still pay"
    elif size > value * 4:
        sentence = f"{text}: larger batches would hardly pay"
    else:
        sentence = f"{text}, about the noise scale: a good size"
    return Tile("noise scale", number(value), "examples", sentence)


def warnings(run: Training) -> list[str]:
    """What is to be said first."""
    found = [_state(run), *_continued(run), *_changes(run)]
    if run.rows:
        found += [_untold(run), _jumps(run), _dead(run), *_layers(run), _interaction(run)]
        found.append(_optimizer(run))
    return [text for text in found if text]


def _state(run):
    if run.state["state"] == "stopped":
        at = f" at step {_count(run.rows[-1]['step'])}" if run.rows else ""
        return f"The training stopped before its end, the last measurement is{at or ' missing'}."
    if not run.rows and run.state["state"] == "running":
        return "Nothing is measured yet: the first row comes with the first measurement."
    if not run.rows:
        return "Nothing was measured."
    return None


def _continued(run):
    steps = [row.get("step", 0) for row in run.rows]
    if any(b <= a for a, b in zip(steps, steps[1:])):
        yield "The records go back in steps: they are of more than one training. Do not trust them."
    if run.state.get("continued"):
        yield (
            f"The training was continued from a saved model at step {run.state['continued']}; what "
            "goes up from the start carries on from the records before."
        )


def _changes(run):
    for step, changed in run.state.get("changes") or []:
        what = ", ".join(f"{name} {new} instead of {old}" for name, (old, new) in changed.items())
        yield f"From step {_count(step)} on with other settings: {what}."


def _untold(run):
    values = run.column("gsnr/mean")
    missing = ~np.isfinite(values)
    if not missing.any():
        return None
    where = "At the last measurement" if missing[-1] else f"In {missing.sum()} of {missing.size}"
    where += "" if missing[-1] else " measurements"
    more = (
        "measure by GSNRCallback on a large probe set"
        if run.settings.get("measured_by") == "GSNRModel"
        else "give a larger probe set"
    )
    return (
        f"{where} the gradient's signal could not be told from zero: what is left to learn is "
        f"drowned in noise. Such numbers are left out; to see more, {more}."
    )


def _jumps(run):
    falls = run.column("step_probe_decrease")
    falls = falls[np.isfinite(falls)]
    if falls.size < 4 or (falls < 0).mean() < JUMPS:
        return None
    return (
        f"{(falls < 0).sum()} of {falls.size} measured steps raised the loss of the probe set: the "
        "steps are too large for OSGR as measured to mean much. A smaller learning rate, or more "
        "measured steps, tell more."
    )


def _dead(run):
    named = []
    for layer in run.config.get("layers") or []:
        dead, size = run.last(f"dead/{layer.get('layer')}"), layer.get("parameters") or 0
        if size and dead / size > MANY_DEAD:
            named.append(f"{layer.get('layer')} ({100 * dead / size:.0f} %)")
    if not named:
        return None
    return (
        f"Most parameters are dead, moved by no example otherwise than by others, in "
        f"{_some(named)}: units that are off for every example, or rows of a table that no "
        "example uses."
    )


def _layers(run):
    unmeasured = run.state.get("unmeasured") or {}
    by_reason = {}
    for path, why in unmeasured.items():
        by_reason.setdefault(str(why), []).append(str(path))
    for why, paths in by_reason.items():
        yield f"Not measured, and left out of the numbers of the whole: {_some(paths)}: {why}."
    layers = run.config.get("layers") or []
    slow = [str(la.get("layer")) for la in layers if "fallback" in str(la.get("route"))]
    if slow:
        yield f"Measured by the general way, for want of a rule; right, and slower: {_some(slow)}."


def _interaction(run):
    what = run.state.get("contributions") or run.config.get("contributions")
    if isinstance(what, str):
        return (
            f"{what} lets the examples of a batch act on each other: what is shown is of each "
            "example's contribution to the batch's gradient."
        )
    return None


def _optimizer(run):
    if run.config.get("optimizer_is_known", True):
        return None
    return (
        f"How a step of {run.settings.get('optimizer')} follows from the gradient is not known: "
        "there is no predicted gap."
    )


def _some(names) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _error(se) -> str:
    return f"± {number(2 * se)} (2 s.e.)" if math.isfinite(se) else ""


def _count(value):
    """
    >>> _count(14554), _count(None)
    ('14,554', None)
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return f"{value:,.0f}"


def number(value) -> str:
    """
    >>> number(0.01347), number(12345.6), number(3.0), number(float("nan"))
    ('0.0135', '12,346', '3', 'unknown')
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "unknown"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def when(seconds) -> str:
    """Local time of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
