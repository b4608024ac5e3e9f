"""tf_gsnr: the gradient signal-to-noise ratio of every parameter of a Keras model.

The names below are imported when first used: records and reports open without TensorFlow.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Moments": "tf_gsnr.moments",
    "gradient_moments": "tf_gsnr.gradients.measure",
    "forget": "tf_gsnr.gradients.stream",
    "check_engine": "tf_gsnr.gradients.diagnosis",
    "explain": "tf_gsnr.gradients.diagnosis",
    "register_rule": "tf_gsnr.gradients.layerwise.rules",
    "gsnr": "tf_gsnr.metrics",
    "same_sign": "tf_gsnr.metrics",
    "noise_scale": "tf_gsnr.metrics",
    "gradient_diversity": "tf_gsnr.metrics",
    "gap_growth": "tf_gsnr.metrics",
    "gap_shares": "tf_gsnr.metrics",
    "summarize": "tf_gsnr.metrics",
    "osgr": "tf_gsnr.metrics",
    "osgr_predicted": "tf_gsnr.metrics",
    "osgr_measured": "tf_gsnr.metrics",
    "GSNRModel": "tf_gsnr.training.model",
    "GSNRCallback": "tf_gsnr.training.callback",
    "write_tensorboard": "tf_gsnr.training.tensorboard",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'tf_gsnr' has no attribute {name!r}; it has: {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
