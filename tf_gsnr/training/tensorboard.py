"""Moments to TensorBoard by an explicit writer: scalars, per-layer scalars, histograms.

The ordinary `keras.callbacks.TensorBoard` needs none of this: it writes what is in the logs.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr import checks, metrics
from tf_gsnr import moments as of_gradients
from tf_gsnr.moments import Moments


def open_writer(log_dir):
    """A `tf.summary` writer for this directory.

    Raises:
      ImportError: TensorBoard is not installed.
      ValueError: it is no path of a directory.
    """
    checks.directory("log_dir", log_dir)
    try:
        import tensorboard  # noqa: F401 (tf.summary fails late and obscurely without it)
    except ImportError as error:
        raise ImportError(
            "log_dir needs TensorBoard: pip install 'tf_gsnr[tensorboard]'"
        ) from error
    writer = tf.summary.create_file_writer(str(log_dir))
    with writer.as_default(step=0):
        tf.summary.experimental.write_raw_pb(_layout())
    return writer


# What stands together in the tab "Custom Scalars": title -> tags.
CHARTS: dict[str, dict[str, tuple]] = {
    "generalisation": {
        "OSGR, predicted and measured": ("osgr_predicted", "osgr_measured"),
        "gap, measured and by first-order theory": ("gap", "gap_predicted"),
        "loss": ("loss", "test_loss"),
    },
    "gradients": {
        "GSNR of the parameters": ("gsnr/mean", "gsnr/median", "gsnr/p95", "gsnr/least"),
        "noise scale": ("noise_scale",),
        "agreement of signs": ("same_sign/mean",),
    },
}
NO_CURVES = ("step", "epoch", "seconds", "count", "parameters")  # of a row


def _layout() -> bytes:
    """The charts of `CHARTS`, as the plug-in for custom scalars reads them."""
    from tensorboard.plugins.custom_scalar import layout_pb2, summary

    def chart(title, tags):
        lines = layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags])
        return layout_pb2.Chart(title=title, multiline=lines)

    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=[chart(*one) for one in charts.items()])
            for title, charts in CHARTS.items()
        ]
    )
    return summary.pb(layout).SerializeToString()


def write_tensorboard(writer, moments: Moments, model, step: int, *, record: dict | None = None):
    """Writes what `moments` say of a model.

    Scalars: every number of the record that is no constant; by default of `metrics.summarize`, with
    the mean GSNR of each variable among them. Those of `CHARTS` stand together in the tab "Custom
    Scalars" where `open_writer` made the writer.
    Histograms `gsnr_log10/<variable path>`: log10 of the GSNR of each parameter that has one
    (ratios spread over many powers of ten).

    Args:
      writer: of `tf.summary.create_file_writer`.
      moments: numpy arrays, as from `gradient_moments`.
      model: that they are of, for the names.
      step: the step to file it under.
      record: the flat record to write, instead of the `summarize` of the moments.

    Raises:
      ValueError: an argument is not usable; the message names it.

    Example:

    >>> import keras, numpy as np, tempfile, tf_gsnr
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> x = np.random.normal(size=[32, 4])
    >>> moments = tf_gsnr.gradient_moments(model, x, x[:, :2], "mse")
    >>> with tempfile.TemporaryDirectory() as log_dir:
    ...     write_tensorboard(tf.summary.create_file_writer(log_dir), moments, model, step=0)
    """
    checks.instance(
        "writer", writer, tf.summary.SummaryWriter, "what tf.summary.create_file_writer returns"
    )
    of_gradients.check_of_model(moments, model)
    step = checks.integer("step", step, 0, expected="an integer from 0 on")
    record = metrics.summarize(moments, model) if record is None else record
    expected = "a flat dict of numbers, as summarize returns"
    checks.instance("record", record, dict, expected)
    for name, value in record.items():
        if not isinstance(name, str) or not isinstance(checks.plain(value), (int, float)):
            checks.refuse("record", {name: value}, expected)
    with writer.as_default(step=step):
        for name, value in record.items():
            if name not in NO_CURVES:
                tf.summary.scalar(name, value)
        for variable, ratio in zip(model.trainable_variables, metrics.gsnr(moments)):
            alive = np.asarray(ratio, np.float64)
            alive = alive[np.isfinite(alive) & (alive > 0)]
            if alive.size:
                tf.summary.histogram(f"gsnr_log10/{variable.path}", np.log10(alive))
    writer.flush()
