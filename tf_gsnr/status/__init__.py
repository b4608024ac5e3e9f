"""The status page of a training: a run directory -> one HTML file. Never imports TensorFlow."""

from __future__ import annotations

from tf_gsnr.status.page import compact, page
from tf_gsnr.status.training import is_training

__all__ = ["compact", "is_training", "page"]
