"""The settings of `weights`, and the configurations that they make."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from tf_gsnr.experiments.framework.settings import (
    EXAMPLES,
    STEPS,
    Setting,
    at_least,
    at_most,
    complete,
    grid,
    seeds,
    value_of,
)

GRID = ("repeats",)


MEASUREMENT_WORK = 4  # gradients: before, after the whole step, after the steps below


class Settings(NamedTuple):
    """All that the records depend on; marks as in `osgr`."""

    dataset: str = "mnist"  # [text]
    model: str = "mlp"  # [ours] fully connected, as (26) is
    n: int = 10_000  # [ours]
    width: int = 20  # [ours]
    epochs: int = 200  # [text]
    every: int = 2  # [ours]
    term_every: Annotated[
        int, Setting("Epochs between two evaluations of (28); 0: none.", at_least(0), most=STEPS)
    ] = 20  # [ours]
    learning_rate: float = 0.1  # [ours]
    # [ours] Left out it is all of them, gradient descent as in (5).
    batch_size: Annotated[
        int | None, Setting("Examples of a step of SGD; left out: all.", at_least(1), most=EXAMPLES)
    ] = None
    repeats: int = 3  # [ours]
    toy_input_scale: float = 1.0
    toy_noise_scale: float = 0.01
    seed: int = 0


def settings(**given) -> Settings:
    """The settings given, completed by the defaults.

    Raises:
      ValueError: a value that no run can have.
    """
    defaults = dict(model="toy_mlp", n=200) if value_of(Settings, given, "dataset") == "toy" else {}
    chosen = complete(Settings, given, defaults)
    at_most(chosen, given, "every", "epochs")
    at_most(chosen, given, "batch_size", "n")
    at_most(chosen, given, "term_every", "epochs")
    if chosen.term_every % chosen.every:
        raise ValueError(
            f"--term_every={chosen.term_every}: expected a multiple of --every={chosen.every}"
        )
    return chosen


def configurations(settings: Settings) -> list[dict]:
    """Every seed."""
    return grid(seed=seeds(settings))


def epochs(settings: Settings) -> list[int]:
    return list(range(0, settings.epochs + 1, settings.every))


def work(configuration: dict, settings: Settings) -> float:
    """Gradients of the training set."""
    measurements = len(epochs(settings)) * MEASUREMENT_WORK
    return settings.epochs + measurements + len(term_epochs(settings)) * term_work(settings)


def term_epochs(settings):
    """When (28) is computed."""
    every = settings.term_every
    return range(0, settings.epochs + 1, every) if every else range(0)


def term_work(settings):
    # A backward pass per weight of the upper two layers of the mlp, many at once.
    return 0.3 * settings.width * (settings.width + 10)
