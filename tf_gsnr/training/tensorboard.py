"""Moments to TensorBoard by an explicit writer: scalars, per-layer scalars, histograms.

The ordinary `keras.callbacks.TensorBoard` needs none of this: it writes what is in the logs.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr import metrics
from tf_gsnr.moments import Moments


def open_writer(log_dir):
    """A `tf.summary` writer for this directory.

    Raises:
      ImportError: TensorBoard is not installed.
    """
    try:
        import tensorboard  # noqa: F401 (tf.summary fails late and obscurely without it)
    except ImportError as error:
        raise ImportError(
            "log_dir needs TensorBoard: pip install 'tf_gsnr[tensorboard]'"
        ) from error
    return tf.summary.create_file_writer(str(log_dir))


def write_tensorboard(writer, moments: Moments, model, step: int, *, record: dict | None = None):
    """Writes what `moments` say of a model.

    Scalars: every number of `metrics.summarize`, with the mean GSNR of each variable among them.
    Histograms `gsnr_log10/<variable path>`: log10 of the GSNR of each parameter that has one
    (ratios spread over many powers of ten).

    Args:
      writer: of `tf.summary.create_file_writer`.
      moments: numpy arrays, as from `gradient_moments`.
      model: for the names.
      step: the step to file it under.
      record: the `summarize` of the moments, if it is known.

    Example:

    >>> import keras, numpy as np, tempfile, tf_gsnr
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> x = np.random.normal(size=[32, 4])
    >>> moments = tf_gsnr.gradient_moments(model, x, x[:, :2], "mse")
    >>> with tempfile.TemporaryDirectory() as log_dir:
    ...     write_tensorboard(tf.summary.create_file_writer(log_dir), moments, model, step=0)
    """
    record = metrics.summarize(moments, model) if record is None else record
    with writer.as_default(step=step):
        for name, value in record.items():
            tf.summary.scalar(name, value)
        for variable, ratio in zip(model.trainable_variables, metrics.gsnr(moments)):
            alive = np.asarray(ratio, np.float64)
            alive = alive[np.isfinite(alive) & (alive > 0)]
            if alive.size:
                tf.summary.histogram(f"gsnr_log10/{variable.path}", np.log10(alive))
    writer.flush()
