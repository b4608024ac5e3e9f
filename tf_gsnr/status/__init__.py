"""The status page of a training: a run directory -> one HTML file. Never imports TensorFlow."""

from __future__ import annotations

from tf_gsnr.status.page import compact, page, write_page

__all__ = ["compact", "page", "write_page"]
