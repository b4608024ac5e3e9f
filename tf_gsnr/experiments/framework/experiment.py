"""What an experiment is, and what it is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np


class Figure(Protocol):
    """From an experiment's records to what is shown of them; without TensorFlow.

    Also, where the report is to have verdicts: `claims(records)`, a list of `plots.claims.Claim`.
    """

    def summary(self, records: list[dict]) -> dict:
        """What the records add up to."""
        ...

    def table(self, records: list[dict]) -> str:
        """The same for a terminal."""
        ...

    def figure(self, records: list[dict]) -> Any:
        """A matplotlib figure. The first line of the module's docstring is its caption."""
        ...


class Experiment(Figure, Protocol):
    """A list of configurations, each of which can be run, skipped, resumed or moved alone.

    Also, where it can use several devices for one configuration: `STRATEGIES`, those of
    `descent.devices.STRATEGIES` that it runs under. And `check(settings, source)`, which raises
    ValueError for a network or data that it cannot work with, before anything is written.
    """

    Settings: type  # a NamedTuple of all that its records depend on; flags are made from it
    GRID: tuple  # the names of the settings that are lists it goes through, and that may grow

    def settings(self, **given) -> Any:
        """`Settings` of what is given, completed and checked."""
        ...

    def configurations(self, settings) -> list[dict]:
        """All that the settings ask for."""
        ...

    def epochs(self, settings) -> list[int]:
        """The epochs of a configuration's records, one record each."""
        ...

    def work(self, configuration: dict, settings) -> float:
        """Proportional to the time that a configuration takes."""
        ...

    def run(self, configuration: dict, settings, workbench: Workbench) -> Iterator[dict]:
        """The flat records of a configuration."""
        ...


class Diverged(ValueError):
    """A configuration's training diverged; the message says where. It ends, the others run."""


PARTS = tuple(
    dict.fromkeys(
        name
        for protocol in (Experiment, Figure)
        for name in [*protocol.__annotations__, *vars(protocol)]
        if not name.startswith("_")
    )
)


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

    def once(self, key, make: Callable) -> Any:
        """What `make()` returns: made for the first configuration that asks, then kept."""
        if key not in self.traced:
            self.traced[key] = make()
        return self.traced[key]

    def engine_for(self, model, loss) -> str:
        """The engine that measures this network right, tried on a few examples of the source.

        Raises:
          ValueError: the engine that was asked for does not.
        """
        from tf_gsnr.gradients import measure

        x, y = self.source.draw(16, np.random.default_rng(0))
        return measure.chosen_engine(model, x, y, loss, self.engine)
