"""The settings of `osgr`, and the configurations that they make."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from tf_gsnr.experiments.framework.settings import (
    EXAMPLES,
    SEEDS,
    STEPS,
    Setting,
    at_least,
    complete,
    grid,
    value_of,
)

GRID = ("n", "p_random", "width", "epochs")


class Settings(NamedTuple):
    """All that the records depend on."""

    dataset: str
    model: str
    n: list[int]
    p_random: list[float]
    width: list[int]
    epochs: Annotated[
        list[int],
        Setting(
            "Iterations of gradient descent at which both sides of the ratio are measured.",
            at_least(0),
            "at_epochs",
            before="epochs",
            most=10 * STEPS,
        ),
    ]
    training_sets: Annotated[
        int, Setting("M, the training sets that a configuration has.", at_least(1), most=SEEDS)
    ]
    learning_rate: float
    test_size: int | None
    batch_size: Annotated[
        int,
        Setting(
            "Examples of a micro-batch: speed and memory only.",
            at_least(1),
            "microbatch_size",
            before="batch_size",
            most=EXAMPLES,
        ),
    ]
    toy_input_scale: float
    toy_noise_scale: float
    unseen: Annotated[
        bool,
        Setting(
            "Estimate both sides of the ratio once more, from the same weights, by training sets "
            "that the models have not seen: is it their adaptation that parts the two sides? "
            "Measurements then take half as long again, and more."
        ),
    ]
    resplit: bool
    seed: int


# The paper's settings, for what is not given: [text] stands in its prose, [derived] follows from
# it, [reported] stands in other public write-ups of it, [ours] is our choice.
PAPER = {
    "mnist": dict(
        model="mnist_cnn",  # table 2 [derived]
        n=[1000, 2000, 4000, 6000, 8000, 10000, 15000],  # [reported]
        p_random=[0.0, 0.1, 0.2, 0.3, 0.5],  # [reported]
        width=[6, 8, 10, 12, 14, 16, 18, 20],  # [reported]
        epochs=[0, 20, 100, 500, 1000, 2500],  # up to 2,500 [text], the others [ours]
        training_sets=10,  # [text]
        learning_rate=0.001,  # [reported]
    ),
    "cifar10": dict(
        model="cifar_cnn",  # table 3 [derived]
        n=[2000, 4000, 6000, 8000, 10000],  # [ours]
        p_random=[0.0, 0.1, 0.2, 0.3, 0.5],  # as for MNIST [ours]
        width=[4, 6, 8, 12, 16],  # [ours]
        epochs=[0, 20, 100, 500, 1000, 2500],  # [ours]
        training_sets=10,  # as for MNIST [ours]
        learning_rate=0.001,  # [reported]
    ),
    "toy": dict(
        model="toy_mlp",  # [text]
        n=[100, 200, 500, 1000],  # [ours]
        p_random=[0.0, 0.1, 0.2, 0.3],  # [ours]
        width=[10, 20, 50],  # [ours]
        epochs=[0, 100, 500, 1000, 2500, 5000],  # [ours]
        training_sets=100,  # [text]
        learning_rate=0.001,  # [text]
    ),
}


def settings(**given) -> Settings:
    """The settings given, completed by the paper's for the data set.

    Raises:
      ValueError: a value that no run can have.
    """
    # The default test_size None is the whole test set: 10,000 on MNIST, 20,000 on toy data [text].
    ours = dict(test_size=None, batch_size=500, toy_input_scale=1.0, toy_noise_scale=0.01)
    ours |= dict(unseen=False, resplit=False, seed=0)
    dataset = value_of(Settings, given, "dataset") or "mnist"
    paper = PAPER.get(dataset, PAPER["mnist"])
    chosen = complete(Settings, given, {**paper, **ours, "dataset": dataset})
    return chosen._replace(epochs=sorted(set(chosen.epochs)))


def configurations(settings: Settings) -> list[dict]:
    """Every (n, p_random, width), the smallest first."""
    return grid(
        n=sorted(settings.n), p_random=sorted(settings.p_random), width=sorted(settings.width)
    )


def epochs(settings: Settings) -> list[int]:
    return settings.epochs


def work(configuration: dict, settings: Settings) -> float:
    """Proportional to the time that a configuration takes: forward passes of an example."""
    return settings.training_sets * sum(set_work(configuration, settings))


def set_work(configuration, settings) -> tuple[float, float]:
    """The work of one training set's descent, and of its measurements."""
    cost = configuration["width"] + 4
    test_size = settings.test_size or 10_000
    steps = settings.epochs[-1] - len(settings.epochs) + 1
    measurement = 6 * configuration["n"] * (1 + settings.unseen) + test_size * (2 + settings.unseen)
    return cost * 3 * configuration["n"] * max(steps, 0), cost * measurement * len(settings.epochs)
