"""What a run was made on: versions, devices, processor."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from tf_gsnr import __version__


def found() -> dict:
    """For config.json; imports TensorFlow."""
    import keras
    import numpy
    import tensorflow as tf

    details = tf.config.experimental.get_device_details
    devices = tf.config.list_physical_devices()
    return {
        "versions": {
            "tf_gsnr": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "devices": [details(d).get("device_name", d.device_type) for d in devices],
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _processor():
    """The processor's name, as Linux tells it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
