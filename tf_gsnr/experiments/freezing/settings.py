"""The settings of `freezing`, and the configurations that they make."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from tf_gsnr.experiments.framework.settings import (
    EXAMPLES,
    POSITIVE,
    STEPS,
    Setting,
    at_least,
    at_most,
    complete,
    grid,
    seeds,
)

GRID = ("repeats",)


class Settings(NamedTuple):
    """All that the records depend on; marks as in `osgr`."""

    dataset: str = "toy"
    n: int = 200  # [text]
    test_size: Annotated[int, Setting("Test examples.", at_least(2), most=EXAMPLES)] = (
        10_000  # [text]
    )
    width: int = 20  # [text]
    steps: Annotated[int, Setting("Steps of gradient descent.", at_least(1), most=STEPS)] = (
        1000  # [ours]
    )
    every: Annotated[
        int, Setting("Steps between two measurements.", at_least(1), "every_steps", "every", STEPS)
    ] = 10  # [ours]
    learning_rate: float = 0.1  # [ours]
    # [ours] it decides the result: see the flagfile.
    initial_scale: Annotated[
        float, Setting("Standard deviation of the initial weights.", POSITIVE)
    ] = 0.05
    repeats: int = 6  # [ours]
    toy_input_scale: float = 1.0
    toy_noise_scale: float = 0.01
    seed: int = 0


def settings(**given) -> Settings:
    """The settings given, completed by the defaults.

    Raises:
      ValueError: a value that no run can have.
    """
    chosen = complete(Settings, given)
    at_most(chosen, given, "every", "steps")
    if chosen.dataset != "toy":
        raise ValueError(f"--dataset={chosen.dataset}: freezing runs on toy data")
    return chosen


def configurations(settings: Settings) -> list[dict]:
    """Every seed, whole and frozen."""
    return grid(seed=seeds(settings), frozen=[False, True])


def epochs(settings: Settings) -> list[int]:
    return list(range(0, settings.steps + 1, settings.every))


def work(configuration: dict, settings: Settings) -> float:
    return float(settings.steps)
