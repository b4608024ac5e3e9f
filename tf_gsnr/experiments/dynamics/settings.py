"""The settings of `dynamics`, and the configurations that they make."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from tf_gsnr.experiments.framework.settings import (
    EXAMPLES,
    POSITIVE,
    SHARED,
    Setting,
    at_least,
    at_most,
    complete,
    grid,
    seeds,
)

GRID = ("model", "p_random", "repeats")


STEP, STATISTICS, GRADIENT, EVALUATION = 3, 1, 4, 1  # of an example, in forward passes


class Settings(NamedTuple):
    """All that the records depend on; marks as in `osgr`."""

    dataset: str = "cifar10"  # [text]
    model: Annotated[list[str], SHARED["model"]] = ["simple_cnn"]  # [reported], its layers [ours]
    n: int = 50_000  # [ours] the whole training set
    p_random: list[float] = [0.0, 1.0]  # [reported]
    width: int = 32  # [ours]
    epochs: int = 100  # [ours]
    every: int = 1  # [text]
    probe: Annotated[
        int | None,
        Setting("Training examples measured on; left out: all n.", at_least(2), most=EXAMPLES),
    ] = None
    learning_rate: float = 0.02  # [ours]
    initial_scale: Annotated[
        float, Setting("Factor of the last layer's initial weights.", POSITIVE)
    ] = 0.1  # [ours]
    batch_size: int = 128  # [ours]
    test_size: int | None = None
    repeats: int = 3  # [ours]
    seed: int = 0


def settings(**given) -> Settings:
    """The settings given, completed by the defaults.

    Raises:
      ValueError: a value that no run can have.
    """
    chosen = complete(Settings, given)
    at_most(chosen, given, "every", "epochs")
    at_most(chosen, given, "batch_size", "n")
    at_most(chosen, given, "probe", "n")
    return chosen


def configurations(settings: Settings) -> list[dict]:
    """Every network, seed and share of random labels."""
    return grid(model=settings.model, seed=seeds(settings), p_random=settings.p_random)


def epochs(settings: Settings) -> list[int]:
    """Those measured, 0 before training."""
    return list(range(0, settings.epochs + 1, settings.every))


def work(configuration: dict, settings: Settings) -> float:
    """Forward passes of an example; all networks of a run count alike."""
    return work_until(settings.epochs, settings)


def work_until(epoch, settings):
    probe, test = settings.probe or settings.n, settings.test_size or 10_000
    measurement = (STATISTICS + GRADIENT + EVALUATION) * probe + EVALUATION * test
    return STEP * settings.n * epoch + measurement * (epoch // settings.every + 1)
