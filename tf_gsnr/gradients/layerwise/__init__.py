"""The layer-wise engine: one forward pass, one backward, and a rule per layer (`engine.py`)."""

from tf_gsnr.gradients.layerwise import layer_rules  # noqa: F401 (registers those of Keras's layers)
