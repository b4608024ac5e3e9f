"""The experiments of the paper, one file each.

An experiment is a module with
    Settings         a NamedTuple of all that its records depend on
    GRID             the names of the settings that are lists it goes through
    settings(**given) -> Settings
    configurations(settings) -> list of dict, each of which can be run, skipped or moved alone
    epochs(settings) -> the epochs of a configuration's records, one record each
    work(configuration, settings) -> float, proportional to its time
    run(configuration, settings, workbench) -> iterator of flat records
and, where it can use several devices for one configuration,
    STRATEGIES       those of `data_parallel.STRATEGIES` that it runs under
and a line in `EXPERIMENTS`; its figure and its summary are in `plots.FIGURES`. A module of the
user's own that has all of it is an experiment, too (docs/your_own_experiment.md).
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np

from tf_gsnr import lookup

EXPERIMENTS = {
    "osgr": "tf_gsnr.experiments.osgr.run",
    "dynamics": "tf_gsnr.experiments.dynamics.run",
    "freezing": "tf_gsnr.experiments.freezing.run",
    "weights": "tf_gsnr.experiments.weights.run",
}


class Workbench(NamedTuple):
    """What an experiment is given to work with, besides its settings.

    Attributes:
      source: the opened data set, `data.Source`.
      directory: the `records.RunDirectory`, for its checkpoint.
      progress: `progress.Progress`, told of work in the units of the experiment's `work`.
      engine: the name of the engine.
      jit_compile: whether XLA compiles.
      replicas: how many training sets' models train as one program; None for the best number.
      strategy: the `tf.distribute.Strategy` of the devices; None for one device.
      traced: what an experiment keeps between configurations, so as to trace each network once.
    """

    source: Any
    directory: Any
    progress: Any
    engine: str = "auto"
    jit_compile: bool = False
    replicas: int | None = None
    strategy: Any = None
    traced: dict = {}

    def engine_for(self, model, loss) -> str:
        """The engine that measures this network right, tried on a few examples of the source.

        Raises:
          ValueError: the engine that was asked for does not.
        """
        from tf_gsnr.gradients import measure

        x, y = self.source.draw(16, np.random.default_rng(0))
        return measure.chosen_engine(model, x, y, loss, self.engine)


CONTRACT = ("Settings", "GRID", "settings", "configurations", "epochs", "work", "run")
OF_ITS_FIGURE = ("figure", "summary", "table")


def load(name: str):
    """The module of the named experiment: a key of `EXPERIMENTS`, or a module of the user's.

    Raises:
      ValueError: an unknown name, or a module that is no experiment.
    """
    if name in EXPERIMENTS:
        return importlib.import_module(EXPERIMENTS[name])
    try:
        module = lookup.module("experiment", name)
    except ValueError:
        raise ValueError(
            f"unknown experiment {name!r}; available: {', '.join(EXPERIMENTS)}, or a module of "
            "your own, of which there is none by this name in the current directory or among the "
            "installed packages"
        ) from None
    lacking = [part for part in CONTRACT + OF_ITS_FIGURE if not hasattr(module, part)]
    if lacking:
        raise ValueError(
            f"--experiment={name}: module {module.__name__!r} is no experiment: it lacks "
            f"{', '.join(lacking)} (docs/your_own_experiment.md)"
        )
    return module
