"""The settings of `gap`, and the configurations that they make."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from tf_gsnr.experiments.framework.settings import (
    EXAMPLES,
    POSITIVE,
    PROBABILITY,
    SHARED,
    Range,
    Setting,
    at_least,
    at_most,
    complete,
    grid,
    seeds,
)

GRID = ("n", "p_random", "optimizer", "batch_size", "repeats")
OPTIMIZERS = ("sgd", "momentum", "adam")
STEP, MEASUREMENT, CURVATURE = 3, 4, 100  # of an example, in forward passes


class Settings(NamedTuple):
    """All that the records depend on; all [ours]."""

    dataset: str = "mnist"
    model: str = "mnist_cnn"
    n: list[int] = [1000]
    p_random: list[float] = [0.0]
    width: int = 6
    optimizer: Annotated[
        list[str],
        Setting(
            "How the models train: sgd; momentum, 0.9 with a tenth of the rate; adam.",
            Range(f"one of {', '.join(OPTIMIZERS)}", OPTIMIZERS.__contains__),
        ),
    ] = ["sgd"]
    learning_rate: float = 0.05
    adam_rate: Annotated[float, Setting("The learning rate of adam.", POSITIVE)] = 0.001
    batch_size: Annotated[
        list[int],
        Setting("Examples of a step; 0: all, full-batch descent.", at_least(0), most=EXAMPLES),
    ] = [50]
    epochs: int = 20
    every: int = 1
    training_sets: Annotated[
        int,
        Setting(
            "M training sets of n examples each, by which the gap is measured: the loss of a "
            "set's model against that of the others' models, on that set.",
            at_least(2),
            most=100,
        ),
    ] = 4
    folds: Annotated[
        int,
        Setting(
            "K, the parts of which each model of the cross-validation lacks one.",
            at_least(2),
            most=100,
        ),
    ] = 5
    twins: Annotated[int, Setting("How many pairs of twins.", at_least(2), most=100)] = 4
    eta: Annotated[
        float, Setting("By how much the weights of the twins' examples differ from 1.", PROBABILITY)
    ] = 0.1
    curvature: Annotated[
        bool,
        Setting(
            "Follow the influence of each example by the Hessian, and the covariance of the "
            "weights by the Gauss-Newton matrix, too: full-batch sgd, up to 500 parameters."
        ),
    ] = False
    probe: Annotated[
        int,
        Setting(
            "Training examples whose gradients are measured, at most.", at_least(2), most=EXAMPLES
        ),
    ] = 1000
    test_size: int | None = None
    resplit: bool = False
    toy_input_scale: float = 1.0
    toy_noise_scale: Annotated[float, SHARED["toy_noise_scale"]] = 0.01
    repeats: int = 3
    seed: int = 0


def settings(**given) -> Settings:
    """The settings given, completed by the defaults.

    Raises:
      ValueError: a value that no run can have.
    """
    chosen = complete(Settings, given)
    at_most(chosen, given, "every", "epochs")
    if chosen.eta == 0:
        raise ValueError("--eta=0: expected more than 0, or twins are the same")
    for size in chosen.batch_size:
        if size > min(chosen.n):
            raise ValueError(f"--batch_size={size}: expected at most --n={min(chosen.n)}")
    if chosen.folds > min(chosen.n) // 2:
        raise ValueError(f"--folds={chosen.folds}: expected at most half of n = {min(chosen.n)}")
    if chosen.curvature and (set(chosen.optimizer) != {"sgd"} or set(chosen.batch_size) != {0}):
        raise ValueError("--curvature=True: expected --optimizer=sgd and --batch_size=0")
    return chosen


def configurations(settings: Settings) -> list[dict]:
    """Every size, label noise, optimiser, batch size and seed."""
    return grid(
        n=settings.n,
        p_random=settings.p_random,
        optimizer=settings.optimizer,
        batch_size=settings.batch_size,
        seed=seeds(settings),
    )


def epochs(settings: Settings) -> list[int]:
    """Those measured, 0 before training."""
    return list(range(0, settings.epochs + 1, settings.every))


def work(configuration: dict, settings: Settings) -> float:
    """Forward passes of an example."""
    n, test = configuration["n"], settings.test_size or 10_000
    sets, others = settings.training_sets, settings.folds + 2 * settings.twins
    measured = settings.epochs // settings.every + 1
    evaluated = sets * (sets * n + test) + others * n
    trained = ((sets + others) * STEP + settings.curvature * CURVATURE) * n * settings.epochs
    return trained + measured * (evaluated + MEASUREMENT * min(n, settings.probe))
