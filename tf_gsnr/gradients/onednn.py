"""Whether convolutions run as fast on this CPU as TensorFlow has them."""

from __future__ import annotations

import platform

import keras
import tensorflow as tf
from absl import logging

from tf_gsnr import keras_internals
from tf_gsnr.gradients import network

ADVICE = (
    "TensorFlow's oneDNN is off, and without it convolutions take 3 to 15 times as long on many "
    "CPUs, measured or not: set the environment variable TF_ENABLE_ONEDNN_OPTS=1 before TensorFlow "
    "is imported"
)


_CONVOLUTIONS = tuple(
    layer
    for name, layer in vars(keras.layers).items()
    if isinstance(layer, type) and "Conv" in name  # and what is derived from them
)


def warn_if_off(model: keras.Model):
    """Says so once, where it is off and the model would gain by it: convolutions on an x86 CPU."""
    if (
        platform.machine().lower() not in ("x86_64", "amd64")
        or keras_internals.onednn_is_on() is not False
    ):
        return
    if tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"):
        return
    if any(isinstance(layer, _CONVOLUTIONS) for layer in network.layers(model)):
        logging.log_first_n(logging.WARNING, ADVICE, 1)
