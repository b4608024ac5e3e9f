"""tf_gsnr: the gradient signal-to-noise ratio of every parameter of a Keras model.

The names below are imported when first used: records and reports open without TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what an editor and a type checker see
    from tf_gsnr.columns import read as read
    from tf_gsnr.gradients.diagnosis import check_engine as check_engine
    from tf_gsnr.gradients.diagnosis import explain as explain
    from tf_gsnr.gradients.layerwise.rules import register_rule as register_rule
    from tf_gsnr.gradients.measure import gradient_moments as gradient_moments
    from tf_gsnr.gradients.stream import forget as forget
    from tf_gsnr.metrics import gap_growth as gap_growth
    from tf_gsnr.metrics import gap_shares as gap_shares
    from tf_gsnr.metrics import gradient_diversity as gradient_diversity
    from tf_gsnr.metrics import gsnr as gsnr
    from tf_gsnr.metrics import noise_scale as noise_scale
    from tf_gsnr.metrics import osgr as osgr
    from tf_gsnr.metrics import osgr_measured as osgr_measured
    from tf_gsnr.metrics import osgr_predicted as osgr_predicted
    from tf_gsnr.metrics import same_sign as same_sign
    from tf_gsnr.metrics import summarize as summarize
    from tf_gsnr.moments import Moments as Moments
    from tf_gsnr.status.figure import plot as plot
    from tf_gsnr.status.page import page as page
    from tf_gsnr.training.bar import ProgressBar as ProgressBar
    from tf_gsnr.training.callback import GSNRCallback as GSNRCallback
    from tf_gsnr.training.model import GSNRModel as GSNRModel
    from tf_gsnr.training.tensorboard import write_tensorboard as write_tensorboard

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
    "ProgressBar": "tf_gsnr.training.bar",
    "page": "tf_gsnr.status.page",
    "plot": "tf_gsnr.status.figure",
    "read": "tf_gsnr.columns",
    "write_tensorboard": "tf_gsnr.training.tensorboard",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'tf_gsnr' has no attribute {name!r}; it has: {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
