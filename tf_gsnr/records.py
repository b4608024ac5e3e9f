"""A run directory: its configuration, its records, its checkpoint. Opens without TensorFlow.

    runs/<name>/
      config.json       every flag, the seed, versions, device, engine, XLA or not, seconds taken
      plan.json         the configurations that the whole grid has, and the epochs of each
      records.jsonl     a flat dict of numbers and names a line, appended and flushed one by one
      summary.json      what the records add up to
      checkpoint.npz    the configuration in progress; gone when it is complete
      figures/

A killed run leaves a valid directory: a half-written last record is cut off when the run goes on,
every other file is replaced by renaming.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tf_gsnr import progress


class RunDirectory:
    """Opens `path` for a run with these settings, new or to be continued.

    Args:
      path: the directory; made if it is not there.
      settings: what the run's records depend on, values of JSON. A directory that holds records
        of a run with other settings is not touched.
      grown: the settings that may differ from the earlier run's: lists that the run goes through,
        so that a grid can be extended.
      overwrite: whether to throw away what an earlier run left there.

    Raises:
      ValueError: the directory holds something else; the message says what and what to do.
    """

    def __init__(self, path, settings: dict, grown=(), overwrite: bool = False):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))  # as they will be read back
        if overwrite and (self.path / "config.json").exists():
            shutil.rmtree(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another --name or --runs_dir")
        if self.path.exists() and any(self.path.iterdir()):
            self._check_same_run(set(grown))
        (self.path / "figures").mkdir(parents=True, exist_ok=True)
        self._cut_half_record()

    def _check_same_run(self, grown):
        try:
            before = read_config(self.path)["settings"]
        except (OSError, KeyError, json.JSONDecodeError):
            raise ValueError(
                f"{self.path} is not empty and holds no run of this program; choose another --name"
            ) from None
        if not self.records() and not self.load_checkpoint():
            return  # nothing was measured with those settings: a mistyped flag, say
        names = sorted(set(before) | set(self.settings))
        differing = [
            f"{name} was {before.get(name)!r} and is now {self.settings.get(name)!r}"
            for name in names
            if name not in grown and before.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Choose "
                "another --name, or throw the earlier run away with --overwrite"
            )

    def _cut_half_record(self):
        file = self.path / "records.jsonl"
        if file.exists():
            text = file.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]
            if complete != text:
                _replace(file, complete)

    def write_config(self, environment: dict):
        """Writes config.json: the settings and what they ran on; the time taken so far is kept."""
        try:
            seconds = read_config(self.path).get("seconds", 0)
        except FileNotFoundError:
            seconds = 0
        config = {"settings": self.settings, **environment, "seconds": seconds}
        self.write_json("config.json", config)

    def add_seconds(self, seconds: float):
        """Adds to the time that the run has taken, in config.json."""
        config = read_config(self.path)
        self.write_json("config.json", config | {"seconds": config["seconds"] + seconds})

    def write_plan(self, configurations: list[dict], epochs: list, grid=()):
        """Writes plan.json: what the run will have when it is complete.

        Args:
          configurations: of the whole grid, whichever of them are run here.
          epochs: of each configuration's records.
          grid: the settings that are lists the run goes through.
        """
        plan = {"configurations": configurations, "epochs": list(epochs), "grid": list(grid)}
        _replace(self.path / "plan.json", (json.dumps(_jsonable(plan)) + "\n").encode())

    def append(self, record: dict):
        """Appends one record to records.jsonl and flushes it to the disk."""
        with open(self.path / "records.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_jsonable(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict]:
        return read_records(self.path)

    def write_json(self, name: str, value):
        """Replaces a file of the directory by this value, all at once."""
        text = json.dumps(_jsonable(value), indent=2) + "\n"
        _replace(self.path / name, text.encode())

    def save_checkpoint(self, state: dict):
        """Replaces the checkpoint by this state: arrays, lists of arrays, and values of JSON."""
        arrays: dict[str, Any] = {}
        rest = {}
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                arrays[name] = value
            elif isinstance(value, list) and value and isinstance(value[0], np.ndarray):
                arrays |= {f"{name}[{i:06d}]": v for i, v in enumerate(value)}
            else:
                rest[name] = value
        arrays[_REST] = np.array(json.dumps(rest, default=lambda v: v.item()))
        partial = self.path / "checkpoint.partial.npz"
        np.savez(partial, **arrays)
        _sync(partial)
        os.replace(partial, self.path / "checkpoint.npz")

    def load_checkpoint(self) -> dict:
        """The state last saved; empty if there is none.

        One that cannot be read costs time only: it is said, set aside, and the configuration in
        progress begins anew.
        """
        file = self.path / "checkpoint.npz"
        if not file.exists():
            return {}
        try:
            with np.load(file, allow_pickle=False) as saved:
                arrays = dict(saved)
            state = json.loads(str(arrays.pop(_REST)))
            for name in sorted(arrays):
                of_list = name.partition("[")[0]
                if of_list == name:
                    state[name] = arrays[name]
                else:
                    state.setdefault(of_list, []).append(arrays[name])
            return state
        except Exception as error:  # whatever a damaged file makes of numpy, zip and JSON
            aside = file.with_name("checkpoint.damaged.npz")
            os.replace(file, aside)
            progress.say(
                f"{file} cannot be read ({type(error).__name__}): it is {aside.name} now, and the "
                "configuration in progress begins anew"
            )
            return {}

    def clear_checkpoint(self):
        (self.path / "checkpoint.npz").unlink(missing_ok=True)


def read_config(path) -> dict:
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))


def read_plan(path) -> dict:
    return json.loads((Path(path) / "plan.json").read_text(encoding="utf-8"))


def measured_epochs(configuration: dict, records: list[dict]) -> set:
    """The epochs of the records that a configuration has.

    >>> found = [{"n": 5, "epoch": 0}, {"n": 5, "epoch": 20}, {"n": 9, "epoch": 0}]
    >>> sorted(measured_epochs({"n": 5}, found))
    [0, 20]
    """
    fields = configuration.items()
    return {r["epoch"] for r in records if all(r.get(k) == v for k, v in fields)}


def read_records(path) -> list[dict]:
    """All whole records of a run directory, in the order in which they were written.

    Numbers that JSON lacks (NaN, infinity) come back as NaN.
    """
    file = Path(path) / "records.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [
        {k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines
    ]


_REST = "values"  # of a checkpoint, what is no array


def _replace(file: Path, content: bytes):
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    _sync(partial)
    os.replace(partial, file)


def _sync(file: Path):
    """Has it on the disk, so that what takes another's place by renaming is whole."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _jsonable(value):
    """Plain numbers, with null for those that JSON has not."""
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
