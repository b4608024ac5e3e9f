"""The engines: by which name, and what each of them gives.

An engine is a function of a model and a loss that makes a `measure`; the contract is in
`contract.py`. Whether the layer-wise one is right for a model is seen on data only: see `measure`.
"""

from __future__ import annotations

import tensorflow as tf
from absl import logging

from tf_gsnr import checks
from tf_gsnr.gradients import contract, losses, network
from tf_gsnr.gradients.layerwise import engine as layerwise
from tf_gsnr.gradients.vectorized import engine as vectorized

ENGINES: dict[str, contract.Engine] = {"layerwise": layerwise.build, "vectorized": vectorized.build}


def build(model, loss=None, *, engine: str = "auto", **options) -> contract.Measure:
    """Returns the `measure` function (see `contract`) of the named engine.

    Args:
      model: a built Keras model.
      loss: see `gradient_moments`.
      engine: a key of `ENGINES`, or "auto" for the layer-wise one. Whether that is right for this
        model is seen on data only: see `chosen_engine`.
      **options: `sign_counts`, `training`, `batch_norm`, ..., as in `gradient_moments`.

    Raises:
      ValueError: unknown engine; a model or loss that cannot be measured.
    """
    check_name(engine)
    network.check(model)
    make = ENGINES["layerwise" if engine == "auto" else engine]
    return make(model, losses.of_batch(model, loss), **options)


def check_name(engine: str):
    checks.choice("engine", engine, ["auto", *sorted(ENGINES)])


def tried(engine: str) -> list[str]:
    """The names of the engines that are tried in turn until one measures the model right."""
    check_name(engine)
    return ["layerwise", "vectorized"] if engine == "auto" else [engine]


def resolve_jit_compile(jit_compile: bool | str) -> bool:
    """Whether to compile by XLA: "auto" means on an accelerator and not on a CPU.

    XLA makes convolutions 2.5 to 4.7 times slower on a CPU, the plain step included.
    """
    checks.one_of("jit_compile", jit_compile, (True, False, "auto"))
    if jit_compile != "auto":
        return bool(jit_compile)
    accelerators = tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU")
    chosen = bool(accelerators)
    device = accelerators[0].device_type if chosen else "CPU"
    logging.log_first_n(logging.INFO, "jit_compile='auto': %s on %s", 1, chosen, device)
    return chosen
