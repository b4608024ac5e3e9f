"""Run directories -> runs: found, checked, and the shards of one run joined."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tf_gsnr import progress, records, status


class Part(NamedTuple):
    """A directory of a run: its path, its config.json, its number of complete configurations."""

    path: Path
    config: dict
    complete: int


class Run(NamedTuple):
    """What a run measured, in one directory or, by shards, in several.

    Attributes:
      name: of the run.
      experiment: its name, or the user's module.
      settings: all that the records depend on; of joined grids the union.
      records: of all directories, each configuration and epoch once.
      plan: what plan.json says; of joined grids the union.
      parts: the directories.
    """

    name: str
    experiment: str
    settings: dict
    records: list
    plan: dict
    parts: tuple

    @property
    def complete(self) -> int:
        """How many of the configurations planned have all their records."""
        return _complete(self.plan, self.records)

    @property
    def planned(self) -> int:
        return len(self.plan["configurations"])

    @property
    def diverged(self) -> int:
        """How many of them diverged, and will have no more records."""
        return sum(len(records.read_diverged(part.path)) for part in self.parts)


def directories(paths) -> list[Path]:
    """The run directories in those named, each a run or one that holds runs, of either kind.

    Raises:
      ValueError: a path that is no directory, or holds no run.
    """
    return [p for path in paths for p in _looked_into(path) if (p / "config.json").exists()]


def _looked_into(path) -> list[Path]:
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    if (path / "config.json").exists():
        return [path]
    below = [p for p in sorted(path.iterdir()) if p.is_dir()]
    if not any((p / "config.json").exists() for p in below):
        raise ValueError(
            f"{path}: neither a run directory nor one that holds some. A run makes one: "
            "python -m tf_gsnr.main --flagfile=flags/quickstart.flags"
        )
    return below


def trainings(paths) -> list[Path]:
    """Of the run directories in those named, the ones of a user's own trainings."""
    return [path for path in directories(paths) if status.is_training(path)]


def holds_experiments(path) -> bool:
    """Whether a directory is, or holds, a run of an experiment."""
    return not all(map(status.is_training, directories([path])))


def find(paths) -> list[Run]:
    """The experiments' runs in the directories named, each a run or one that holds runs; joined.

    Raises:
      ValueError: a path that is no directory, holds no run, or is named and is no run.
    """
    found = []
    for path in map(Path, paths):
        mine = [p for p in _looked_into(path) if not status.is_training(p)]
        found += [read(path)] if mine == [path] else [r for r in map(_read_or_say, mine) if r]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no run of an experiment can be read there")
    return join(found)


def _read_or_say(path):
    try:
        return read(path)
    except ValueError as error:
        progress.say(f"left out: {error}")
        return None


def read(path) -> Run:
    """The run in a directory.

    Raises:
      ValueError: it is no run of an experiment.
    """
    path = Path(path)
    try:
        config = records.read_config(path)
        settings = dict(config["settings"])
        experiment = settings.pop("experiment")
        found = records.read_records(path)
        worker = config.get("worker", 0)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no run: it has no {Path(error.filename).name}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no run of an experiment: {error!r} in config.json") from None
    if worker:
        raise ValueError(
            f"{path}: process {worker} of a run in several processes wrote it; the chief's "
            "directory, without -worker in its name, has the same records"
        )
    try:
        plan = records.read_plan(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no plan.json: an earlier version wrote this run; the same command again "
            "writes it, and runs nothing that is complete"
        ) from None
    records.check_grid(path, found, plan)
    found = records.without(records.read_diverged(path), found)
    name = re.sub(r"-\d+of\d+$", "", path.resolve().name)  # of a shard, the whole's
    part = Part(path, config, _complete(plan, found))
    return Run(name, experiment, settings, found, plan, (part,))


def _complete(plan, found):
    epochs = set(plan["epochs"])
    return sum(epochs <= records.measured_epochs(c, found) for c in plan["configurations"])


def join(runs: list[Run]) -> list[Run]:
    """Joins runs of one experiment whose settings differ in their grid at most: shards.

    A record of a configuration and an epoch that another directory has already is dropped, with a
    notice.
    """
    joined = {}
    for run in runs:
        fixed = {k: v for k, v in run.settings.items() if k not in run.plan["grid"]}
        key = json.dumps([run.experiment, fixed], sort_keys=True)
        joined[key] = _merge(joined[key], run) if key in joined else run
    return list(_distinct(joined.values()))


def _distinct(runs):
    """Numbers the runs of the same name, which several directories may hold."""
    seen = Counter()
    for run in runs:
        seen[run.name] += 1
        number = seen[run.name]
        yield run if number == 1 else run._replace(name=f"{run.name}-{number}")


def _merge(a: Run, b: Run) -> Run:
    grid = a.plan["grid"]
    settings = {k: _union(v, b.settings[k]) if k in grid else v for k, v in a.settings.items()}
    more = [c for c in b.plan["configurations"] if c not in a.plan["configurations"]]
    configurations = a.plan["configurations"] + more
    epochs = _union(a.plan["epochs"], b.plan["epochs"])
    fields = list(dict.fromkeys(name for c in configurations for name in c))

    def key(record):
        return tuple(record.get(name) for name in [*fields, "epoch"])

    there = {key(record) for record in a.records}
    new = [record for record in b.records if key(record) not in there]
    if len(new) < len(b.records):
        progress.say(
            f"{b.parts[0].path}: {len(b.records) - len(new)} of its {len(b.records)} records are "
            f"in {' or '.join(str(part.path) for part in a.parts)} already, and are left out"
        )
    return a._replace(
        settings=settings,
        records=a.records + new,
        plan={"configurations": configurations, "epochs": epochs, "grid": grid},
        parts=a.parts + b.parts,
    )


def _union(a, b):
    """Of two lists; of two numbers (how many of something the grid has) the larger."""
    if a == b:
        return a
    return sorted({*a, *b}) if isinstance(a, list) else max(a, b)


def command(run: Run) -> str:
    """The command that makes the whole run again, without any directory of the machine it ran on.

    >>> config = {"command": ["main.py", "--flagfile=/a/flags/x.flags", "--data_dir", "/b",
    ...                       "--shard=0/2", "--unseen", "--width=5"]}
    >>> command(Run("x", "osgr", {}, [], {}, (Part(Path("x"), config, 1),)))
    'python -m tf_gsnr.main --flagfile=flags/x.flags --data_dir=DIR --unseen --width=5'
    """
    given, words = [], list(run.parts[0].config["command"][1:])
    while words:
        name, equals, value = words.pop(0).lstrip("-").partition("=")
        if not equals and words and not words[0].startswith("-"):
            equals, value = "=", words.pop(0)
        given.append((name, equals, value))
    shown = [
        f"--{name}{equals}{_public(name, value) if equals else ''}"
        for name, equals, value in given
        if name not in ("shard", "strategy", "runs_dir", "overwrite")
    ]
    return " ".join(["python -m tf_gsnr.main", *shown])


def _public(name, value):
    if name == "data_dir":
        return "DIR"
    path = Path(value)
    if not path.is_absolute() and not value.startswith(("~", "..")):
        return shlex.quote(value)
    return f"flags/{path.name}" if name == "flagfile" else "PATH"
