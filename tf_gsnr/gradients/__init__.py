"""Per-example gradients of a Keras model -> `Moments`. `measure.py` is where to start.

What a rule of a user's own needs, `forms` and `rules`, is found here, too.
"""

import importlib

_HOMES = {
    "gradient_moments": "tf_gsnr.gradients.measure",
    "forms": "tf_gsnr.gradients.layerwise",
    "rules": "tf_gsnr.gradients.layerwise",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return getattr(home, name, None) or importlib.import_module(f"{home.__name__}.{name}")
