"""The settings of `jagged`, and the configurations that they make."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from tf_gsnr.experiments.framework.settings import (
    EXAMPLES,
    POSITIVE,
    SHARED,
    Range,
    Setting,
    at_least,
    complete,
    seeds,
)

GRID = ("variant", "repeats")

AS_IT_IS = "as_it_is"
VARIANTS = {
    AS_IT_IS: "as in figure 5",
    "half_rate": "half the learning rate",
    "decayed": "learning rate falling to 0, linearly",
    "momentum": "momentum 0.9, a tenth of the rate",
    "large_batch": "batches of four times as many",
}
VARIANT = Setting(
    "What is changed in the training: " + "; ".join(f"{k}, {v}" for k, v in VARIANTS.items()) + ".",
    Range(f"one of {', '.join(VARIANTS)}", VARIANTS.__contains__),
)
LARGER = 4  # the large batch over the usual one
MOMENTUM = 0.9
BEFORE = (1, 2, 4, 8)  # steps before the end of an epoch at which is measured, too
AVERAGED = (8, 32)  # steps, the last of an epoch, over which weights are averaged

STEP, GRADIENT = 3, 4  # of an example, in forward passes


class Settings(NamedTuple):
    """All that the records depend on; those of `dynamics_small`, so [ours]."""

    dataset: str = "cifar10"
    model: str = "simple_cnn"
    variant: Annotated[list[str], VARIANT] = list(VARIANTS)
    n: Annotated[int, SHARED["n"]] = 4000
    width: Annotated[int, SHARED["width"]] = 8
    epochs: Annotated[int, SHARED["epochs"]] = 15
    probe: Annotated[
        int,
        Setting(
            "Training examples measured on; the other probe has as many.",
            at_least(2),
            most=EXAMPLES,
        ),
    ] = 1000
    learning_rate: float = 0.02
    initial_scale: Annotated[
        float, Setting("Factor of the last layer's initial weights.", POSITIVE)
    ] = 0.1
    batch_size: int = 32
    repeats: int = 5
    seed: int = 0


def settings(**given) -> Settings:
    """The settings given, completed by the defaults.

    Raises:
      ValueError: a value that no run can have.
    """
    chosen = complete(Settings, given)
    if 2 * chosen.probe > chosen.n:
        raise ValueError(
            f"--probe={chosen.probe}: expected at most half of n = {chosen.n}, for two probes"
        )
    steps = chosen.n // (LARGER * chosen.batch_size)
    if steps <= max(BEFORE):
        raise ValueError(
            f"--batch_size={chosen.batch_size}: an epoch has {steps} steps of the large batch; "
            f"expected more than {max(BEFORE)}"
        )
    return chosen


def configurations(settings: Settings) -> list[dict]:
    """Every seed and variant of the training."""
    return [
        dict(variant=variant, seed=seed) for seed in seeds(settings) for variant in settings.variant
    ]


def epochs(settings: Settings) -> list[int]:
    """All of them, 0 before training."""
    return list(range(settings.epochs + 1))


def probes(variant: str) -> int:
    """How often a probe is measured after an epoch."""
    return 7 + len(BEFORE) if variant == AS_IT_IS else 3


def work(configuration: dict, settings: Settings) -> float:
    """Forward passes of an example."""
    measured = GRADIENT * settings.probe * probes(configuration["variant"])
    return settings.epochs * (STEP * settings.n + measured) + GRADIENT * settings.probe
