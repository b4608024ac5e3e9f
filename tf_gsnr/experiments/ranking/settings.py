"""The settings of `ranking`, and the configurations that they make."""

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

GRID = ("width", "learning_rate", "batch_size", "p_random", "repeats")


class Settings(NamedTuple):
    """All that the records depend on; all of it [ours]."""

    dataset: str = "mnist"
    model: str = "mlp"
    n: int = 500
    width: list[int] = [20, 100]
    learning_rate: list[float] = [0.02, 0.06, 0.2]
    batch_size: list[int] = [8, 32]
    p_random: list[float] = [0.0, 0.2, 0.4]
    epochs: int = 30
    early_epochs: Annotated[
        int,
        Setting("Epochs after which all trainings are measured early.", at_least(1), most=STEPS),
    ] = 2
    early_loss: Annotated[
        float, Setting("Training loss at which all trainings are measured early.", POSITIVE)
    ] = 1.8
    final_loss: Annotated[
        float, Setting("Training loss at which all trainings are compared at the end.", POSITIVE)
    ] = 0.2
    most_steps: Annotated[
        int, Setting("Steps after which --final_loss is given up.", at_least(1), most=STEPS)
    ] = 6000
    probe: Annotated[
        int | None,
        Setting("Training examples measured on; left out: all n.", at_least(2), most=EXAMPLES),
    ] = None
    test_size: int | None = None
    repeats: int = 3
    toy_input_scale: float = 1.0
    toy_noise_scale: float = 0.01
    seed: int = 0


def settings(**given) -> Settings:
    """The settings given, completed by the defaults.

    Raises:
      ValueError: a value that no run can have.
    """
    chosen = complete(Settings, given)
    at_most(chosen, given, "probe", "n")
    if max(chosen.batch_size) > chosen.n:
        raise ValueError(f"--batch_size={max(chosen.batch_size)}: expected at most --n={chosen.n}")
    if chosen.early_epochs >= chosen.epochs:
        raise ValueError(
            f"--early_epochs={chosen.early_epochs}: expected less than --epochs={chosen.epochs}"
        )
    if chosen.early_loss <= chosen.final_loss:
        raise ValueError(
            f"--early_loss={chosen.early_loss}: expected more than --final_loss={chosen.final_loss}"
        )
    return chosen


def configurations(settings: Settings) -> list[dict]:
    """Every width, learning rate, batch size, share of random labels and seed."""
    return grid(
        width=settings.width,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        p_random=settings.p_random,
        seed=seeds(settings),
    )


def epochs(settings: Settings) -> list[int]:
    """One record for each training, of its early and its late measurements."""
    return [settings.epochs]


def steps_per_epoch(batch_size: int, settings: Settings) -> int:
    """Whole batches: what is left over of a shuffled epoch is not trained on."""
    return settings.n // batch_size


def work(configuration: dict, settings: Settings) -> float:
    """Steps, at most: a training ends where it reaches --final_loss, after --epochs."""
    epoch = steps_per_epoch(configuration["batch_size"], settings)
    return max(settings.epochs * epoch, settings.most_steps)
