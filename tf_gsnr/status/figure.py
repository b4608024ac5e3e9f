"""The charts of the status page as one matplotlib figure, for a notebook or a paper."""

from __future__ import annotations

import io
import os

import numpy as np

from tf_gsnr import checks, shown
from tf_gsnr.status import training as of_training

MOST_LAYERS = 10  # as lines; more are drawn as a heat map


def plot(source, size: tuple = (12.0, 6.5)):
    """Draws what was measured while a model trained.

    Args:
      source: a `run_dir`; a `GSNRCallback`; or what `fit` returned, or its `history`, a dict.
      size: of the figure, in inches.

    Returns:
      A `matplotlib.figure.Figure`: losses, gap, OSGR, GSNR, noise scale, and GSNR by layer where it
      is known. Bands are two standard errors.

    Raises:
      ValueError: there is nothing in it to draw; the message says what was expected.

    Example:

    >>> import keras, numpy as np, tf_gsnr
    >>> model = tf_gsnr.GSNRModel(keras.Sequential([keras.Input([4]), keras.layers.Dense(2)]))
    >>> model.compile("sgd", "mse")
    >>> x = np.random.normal(size=[64, 4])
    >>> figure = tf_gsnr.plot(model.fit(x, x[:, :2], epochs=2, verbose=0))
    >>> len(figure.axes) >= 4
    True
    """
    expected = "two numbers of inches, width and height, 1 to 100"
    inches = checks.array("size", size, expected, lambda v: v.shape == (2,))
    if not ((inches >= 1) & (inches <= 100)).all():
        checks.refuse("size", size, expected)
    numbers, layers, x_name = _numbers(source)
    x = numbers[x_name]
    known = [
        (_losses, {"loss", "test_loss"}),
        (_gap, {"gap", "gap_predicted"}),
        (_osgr, {"osgr_predicted", "osgr_measured"}),
        (_gsnr, {"gsnr/mean", "gsnr/median"}),
        (_noise, {"noise_scale"}),
    ]
    draw = [one for one, names in known if names & set(numbers)]
    if not draw or not len(x):
        raise ValueError(
            f"source={checks.shown(source)}: nothing of a measurement is in it; expected a "
            "run_dir, a GSNRCallback, or what fit returned of a GSNRModel or with a GSNRCallback"
        )
    count = len(draw) + bool(layers)
    columns = min(3, count)
    figure = _figure(size)
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for axis, one in zip(axes, draw):
        one(axis, x, numbers)
        axis.set_xlabel(x_name)
        axis.grid(alpha=0.25)
    if layers:
        _layers(figure, axes[len(draw)], x, layers, x_name)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure


def _figure(size):
    """A figure that belongs to no window, and that a notebook shows once, as a cell's value."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self):
            image = io.BytesIO()
            self.savefig(image, format="png", dpi=110)
            return image.getvalue()

    return Shown(figsize=size, layout="constrained")


def _numbers(source):
    """`({name as in records: [k]}, {layer: [k]}, name of the x axis)`."""
    if isinstance(source, (str, os.PathLike)):
        run = of_training.read(source, "source")
        names = dict.fromkeys(name for row in run.rows for name in row)
        numbers = {name: run.column(name) for name in names}
        paths = [str(layer.get("layer")) for layer in run.config.get("layers") or []]
    else:
        history = getattr(source, "history", source)
        expected = "a run_dir, a GSNRCallback, or what fit returned"
        if not isinstance(history, dict) or not all(isinstance(k, str) for k in history):
            checks.refuse("source", source, expected)
        columns = {_in_records(k): _column(v) for k, v in history.items()}
        numbers = {k: v for k, v in columns.items() if v is not None}
        lengths = {len(v) for k, v in numbers.items() if k in ("step", "gsnr/mean")}
        if len(lengths) > 1:
            raise ValueError(
                f"source: columns of the lengths {sorted(lengths)}; expected {expected}"
            )
        known = {"gsnr/mean", "gsnr/median", "gsnr/p95", "gsnr/least"}
        paths = [name[5:] for name in numbers if name.startswith("gsnr/") and name not in known]
    if "step" not in numbers:
        length = max(map(len, numbers.values()), default=0)
        numbers = {k: v for k, v in numbers.items() if len(v) == length}
        numbers["epoch"] = np.arange(1, length + 1)
    layers = {p: numbers[f"gsnr/{p}"] for p in paths if f"gsnr/{p}" in numbers}
    return numbers, layers, "step" if "step" in numbers else "epoch"


def _column(values):
    """Numbers `[k]`; None for what is none."""
    try:
        column = np.asarray(values)
    except ValueError:
        return None
    return column.astype(float) if column.dtype.kind in "fiub" and column.ndim == 1 else None


def _in_records(name: str) -> str:
    """What records call a column of History."""
    if name in ("val_loss", "gap_growth"):
        return {"val_loss": "test_loss", "gap_growth": "gap_predicted"}[name]
    for in_fit, number in shown.NUMBERS.items():
        there = number.in_records
        if there and name in ((in_fit,) if number.in_fit else ()) + (shown.in_logs(there),):
            return there
    return name


def _line(axis, x, numbers, name, label, colour, error=None, **looks):
    if name not in numbers or not np.isfinite(numbers[name]).any():
        return
    y = numbers[name]
    few = dict(marker="o", markersize=3) if len(x) < 40 else {}
    axis.plot(x, y, color=colour, label=label, **few, **looks)
    if error in numbers:
        se = np.nan_to_num(numbers[error])
        axis.fill_between(x, y - 2 * se, y + 2 * se, color=colour, alpha=0.18, linewidth=0)


def _legend(axis, **looks):
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**looks)


def _losses(axis, x, numbers):
    axis.set_title("loss")
    _line(axis, x, numbers, "loss", "training", "C0")
    _line(axis, x, numbers, "test_loss", "test", "C1")
    _legend(axis)


def _gap(axis, x, numbers):
    axis.set_title("generalisation gap")
    axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    _line(axis, x, numbers, "gap", "measured", "C1", "gap_se")
    _line(axis, x, numbers, "gap_predicted", "first-order theory (14)", "C0", linestyle="--")
    _legend(axis)


def _osgr(axis, x, numbers):
    axis.set_title("OSGR")
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    _line(axis, x, numbers, "osgr_measured", "measured", "C1", "osgr_measured_se")
    _line(axis, x, numbers, "osgr_predicted", "predicted", "C0", "osgr_predicted_se")
    shown_values = [numbers[n] for n in ("osgr_predicted", "osgr_measured") if n in numbers]
    known = np.concatenate(shown_values)
    known = known[np.isfinite(known)]
    if known.size:
        axis.set_ylim(max(-1, min(0, known.min()) - 0.05), min(2, max(1, known.max()) + 0.05))
    _legend(axis)


def _gsnr(axis, x, numbers):
    axis.set_title("GSNR of the parameters")
    _log(axis, [numbers[n] for n in ("gsnr/mean", "gsnr/median", "gsnr/p95") if n in numbers])
    _line(axis, x, numbers, "gsnr/p95", "95th percentile", "C4", linewidth=1)
    _line(axis, x, numbers, "gsnr/mean", "mean", "C0")
    _line(axis, x, numbers, "gsnr/median", "median", "C2", linewidth=1)
    _line(axis, x, numbers, "gsnr/least", "least that can be told", "grey", linestyle=":")
    _legend(axis)


def _noise(axis, x, numbers):
    axis.set_title("noise scale, in examples")
    _log(axis, [numbers["noise_scale"]])
    _line(axis, x, numbers, "noise_scale", "noise scale", "C3")
    _line(axis, x, numbers, "batch_size", "batch size", "grey", linestyle=":")
    _legend(axis)


def _layers(figure, axis, x, layers, x_name):
    axis.set_title("GSNR by layer")
    axis.set_xlabel(x_name)
    if len(layers) <= MOST_LAYERS:
        _log(axis, list(layers.values()))
        for k, (path, values) in enumerate(layers.items()):
            _line(axis, x, {path: values}, path, path.rpartition("/")[2], f"C{k % 10}")
        _legend(axis, fontsize="small")
        axis.grid(alpha=0.25)
        return
    values = np.array(list(layers.values()))
    with np.errstate(divide="ignore", invalid="ignore"):
        image = np.where(values > 0, np.log10(values), np.nan)
    drawn = axis.imshow(image, aspect="auto", interpolation="nearest")
    axis.set_ylabel("layer, from the first")
    places = np.unique(np.linspace(0, len(x) - 1, 5).round().astype(int))
    axis.set_xticks(places, [f"{x[i]:.0f}" for i in places])
    figure.colorbar(drawn, ax=axis, label="log10 GSNR")


def _log(axis, columns):
    """A logarithmic axis, where anything is above zero."""
    values = np.concatenate(columns) if columns else np.zeros(0)
    if (values[np.isfinite(values)] > 0).any():
        axis.set_yscale("log", nonpositive="mask")
