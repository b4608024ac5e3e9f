"""A run that was asked for: found to be right, told or gone through, its results written.

`plan` refuses what cannot be before anything is written; `tell` says what a run would take; `go`
runs it and returns its directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tf_gsnr import checks, environment, experiments, plots, progress, records, replay


class Wanted(NamedTuple):
    """What the flags of `tf_gsnr.main` say, under their names; there each has its help.

    Attributes:
      given: what is said of the experiment's settings, None where nothing is.
      command: the command line.
      flags: the flags that are no settings, for config.json.
    """

    experiment: str
    given: dict
    command: list[str]
    flags: dict
    data_dir: str | None
    runs_dir: str
    name: str | None
    overwrite: bool
    engine: str
    jit_compile: bool | str
    replicas: int | None
    strategy: str
    shard: str | None
    on_divergence: str
    deterministic: bool
    replay: str | None
    dry_run: bool


class Plan(NamedTuple):
    """A run that was found to be right, before anything of it is written.

    Attributes:
      wanted: what was asked for.
      experiment: a `framework.experiment.Experiment`.
      settings: its settings.
      configurations: all that they ask for.
      chosen: those of this shard.
      source: the opened data set.
      path: the run directory.
      how: of the `Workbench`.
      worker: the number of this process, of several.
    """

    wanted: Wanted
    experiment: Any
    settings: Any
    configurations: list
    chosen: list
    source: Any
    path: Path
    how: dict
    worker: int

    def left(self) -> list:
        """The configurations that have not all of their records yet."""
        written = records.read_records(self.path)
        epochs = set(self.experiment.epochs(self.settings))
        return [c for c in self.chosen if not epochs <= records.measured_epochs(c, written)]


def plan(wanted: Wanted) -> Plan:
    """What is wanted, checked.

    Raises:
      ValueError: something of it cannot be; the message names the flag.
    """
    import keras

    from tf_gsnr import data  # imports TensorFlow
    from tf_gsnr.descent import devices
    from tf_gsnr.gradients import engines

    experiment = experiments.load(wanted.experiment)
    _quieten_tensorflow()
    settings = experiment.settings(**wanted.given)
    if wanted.deterministic:
        _only_deterministic_operations(settings)
    strategy = _strategy(wanted, experiment)  # before anything else of TensorFlow runs
    engines.check_name(wanted.engine)
    configurations = experiment.configurations(settings)
    part, suffix = _shard(wanted.shard)
    worker = devices.worker(strategy)
    suffix += f"-worker{worker}" if worker else ""
    if not configurations[part]:
        raise ValueError(f"--shard={wanted.shard}: there are {len(configurations)} configurations")
    resplit = settings.seed if getattr(settings, "resplit", False) else None
    source = data.load(
        settings.dataset, wanted.data_dir, not wanted.dry_run, resplit, **_of_toy(settings)
    )
    _check_size(settings, source)
    check = getattr(experiment, "check", None)
    if check is not None:
        check(settings, source)
        keras.utils.clear_session()  # which counts layers without a name from 0 again
    runs = checks.directory("--runs_dir", wanted.runs_dir)
    return Plan(
        wanted,
        experiment,
        settings,
        configurations,
        configurations[part],
        source,
        runs / (_name(wanted, settings.dataset) + suffix),
        dict(
            engine=wanted.engine,
            jit_compile=engines.resolve_jit_compile(wanted.jit_compile),
            replicas=wanted.replicas,
            strategy=strategy,
        ),
        worker,
    )


def _shard(shard):
    """Which configurations to run, and what the run directory's name says of it."""
    if shard is None:
        return slice(None), ""
    try:
        i, k = map(int, shard.split("/"))
    except ValueError:
        i, k = 0, 0
    if not 0 <= i < k:
        raise ValueError(f"--shard={shard}: expected i/k with 0 <= i < k, such as 0/4")
    return slice(i, None, k), f"-{i}of{k}"


def _strategy(wanted, experiment):
    """The strategy of the flag, or None."""
    from tf_gsnr.descent import devices

    if wanted.strategy == "none" or wanted.dry_run:  # which waits for no other process
        return None
    if wanted.replicas is not None:
        raise ValueError(
            f"--replicas={wanted.replicas} with --strategy={wanted.strategy}: there, models train "
            "one after the other, each on all devices; leave one of the two flags out"
        )
    return devices.strategy(wanted.strategy, getattr(experiment, "STRATEGIES", ()))


def _name(wanted, dataset):
    default = f"{wanted.experiment}_{dataset}".replace(":", ".").replace("/", "-")
    name = default if wanted.name is None else wanted.name
    bad = not name.strip() or not name.isprintable() or len(name.encode()) > 200 or name[0] == "-"
    if bad or name in (".", "..") or Path(name).name != name:
        checks.refuse("--name", name, "the name of a directory inside --runs_dir")
    return name


def _of_toy(settings) -> dict:
    names = {"input_scale": "toy_input_scale", "noise_scale": "toy_noise_scale"}
    return {k: getattr(settings, v) for k, v in names.items() if hasattr(settings, v)}


def _check_size(settings, source):
    sizes = getattr(settings, "n", None) or 0
    largest = max(sizes) if isinstance(sizes, list) else sizes
    unseen = bool(getattr(settings, "unseen", False))
    if source.pool is not None and largest * (1 + unseen) > source.pool:
        more = " (and as many others, for --unseen)" if unseen else ""
        raise ValueError(f"--n={largest}{more}: {source.name} has {source.pool} training examples")
    test_size = getattr(settings, "test_size", None)
    if source.pool is not None and test_size is not None:
        source.test(test_size, np.random.default_rng(0))  # raises where there are fewer


def _quieten_tensorflow():
    """Drops its warning of frequent tracing, which takes all networks' functions for one."""
    import tensorflow as tf

    tf.get_logger().addFilter(
        lambda record: "triggered tf.function retracing" not in record.getMessage()
    )


def _only_deterministic_operations(settings):
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(getattr(settings, "seed", 0))  # none may draw without a seed
    tf.config.experimental.enable_op_determinism()


def go(planned: Plan) -> records.RunDirectory:
    """Goes through the configurations, and returns the run directory.

    Raises:
      ValueError: a network or data that cannot be measured; a configuration diverged, and that is
        to end the run.
    """
    from tf_gsnr.experiments.framework import runner
    from tf_gsnr.experiments.framework.experiment import Diverged

    wanted, experiment, settings = planned.wanted, planned.experiment, planned.settings
    how = planned.how
    directory = records.RunDirectory(
        planned.path,
        settings._asdict() | {"experiment": wanted.experiment},
        grown=experiment.GRID,
        overwrite=wanted.overwrite,
    )
    directory.write_config(_environment(planned))
    directory.write_plan(planned.configurations, experiment.epochs(settings), experiment.GRID)
    grid = {"configurations": planned.configurations}
    records.check_grid(directory.path, directory.records(), grid)
    progress.say(_headline(planned))
    how = how | {"skip_diverging": wanted.on_divergence == "skip"}
    try:
        runner.go_through(experiment, settings, planned.chosen, planned.source, directory, **how)
    except Diverged:
        raise
    except ValueError:  # refused: a network that no engine fits, say
        directory.take_back()
        raise
    return _finish(wanted, experiment, directory)


def _environment(planned):
    return {
        "command": planned.wanted.command,
        "flags": planned.wanted.flags,
        **environment.found(),
        "engine": planned.how["engine"],
        "jit_compile": planned.how["jit_compile"],
        "worker": planned.worker,
    }


def _headline(planned) -> str:
    wanted, how, strategy = planned.wanted, planned.how, planned.how["strategy"]
    return (
        f"{wanted.experiment} on {planned.settings.dataset}: {len(planned.chosen)} configurations "
        f"into {planned.path}; engine {how['engine']}, XLA {'on' if how['jit_compile'] else 'off'}"
        + (f", {wanted.strategy} devices: {strategy.num_replicas_in_sync}" if strategy else "")
    )


def tell(planned: Plan):
    """Prints what the run would be and take; nothing is written."""
    from tf_gsnr.experiments.framework import trial

    left = planned.left()
    print(_headline(planned))
    grid = {name: getattr(planned.settings, name) for name in planned.experiment.GRID}
    for name, values in grid.items():
        print(f"  {name}: {', '.join(map(str, values)) if isinstance(values, list) else values}")
    epochs = planned.experiment.epochs(planned.settings)
    print(f"  measured at {len(epochs)} epochs of each, up to {max(epochs)}")
    print(f"  {len(planned.chosen) - len(left)} configurations are complete, {len(left)} are left")
    if not left:
        return
    if planned.wanted.strategy != "none":
        print(f"  on one device; --strategy={planned.wanted.strategy} shares the work out")
    print("a few seconds of the largest one:")
    told = trial.estimate(planned.experiment, planned.settings, left, planned.source, **planned.how)
    print(f"  {', '.join(f'{k}={v}' for k, v in told.configuration.items())}")
    print(
        f"  about {progress.clock(told.seconds)} for what is left, by its pace, and up to "
        f"{progress.clock(told.start)} for each network to be built and traced"
    )
    if told.peak is not None:
        print(f"  {told.peak / 2**30:.1f} GiB of memory at the peak of the trial, all included")
    print("nothing was written (--dry_run)")


def _finish(wanted, experiment, directory):
    """Summary, table and figure of all records of the run."""
    diverged = records.read_diverged(directory.path)
    all_records = records.without(diverged, directory.records())
    note = f"{len(diverged)} configurations diverged and are not shown" if diverged else ""
    summary = experiment.summary(all_records) if all_records else {}
    about = {"experiment": wanted.experiment, **({"diverged": diverged} if diverged else {})}
    directory.write_json("summary.json", about | summary)
    if not all_records:
        print(f"no records: {note}")
        return directory
    file = directory.path / "figures" / f"{wanted.experiment}.png"
    figure = plots.draw(experiment, all_records, file, note)
    print(experiment.table(all_records))
    for one in diverged:
        print(f"diverged: {one['why']}")
    print(f"\nrecords: {directory.path / 'records.jsonl'}\nfigure:  {figure}")
    if wanted.replay:
        found = replay.differences(wanted.replay, directory.path)
        directory.write_json("replay.json", found)
        print(replay.text(found))
    return directory
