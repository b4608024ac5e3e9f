"""A run directory: its configuration, its records, its checkpoint. Opens without TensorFlow.

    runs/<name>/
      config.json       every flag, the seed, versions, device, engine, XLA or not, seconds taken
      plan.json         the configurations that the whole grid has, and the epochs of each
      records.jsonl     a flat dict of numbers and names a line, appended and flushed one by one
      diverged.json     configurations whose training diverged, and where
      summary.json      what the records add up to
      checkpoint.npz    the configuration in progress; gone when it is complete
      figures/

and where it is of a training of one's own, by `run_dir=`: config.json, records.jsonl, and
`training/recorder.py`'s state.json, histograms.json, page.html, gsnr/*.npz.

A killed run leaves a valid directory: a half-written last record is cut off when the run goes on,
every other file is replaced by renaming.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tf_gsnr import lock, progress


class RunDirectory:
    """Opens `path` for a run with these settings, new or to be continued.

    Args:
      path: the directory; made if it is not there.
      settings: what the run's records depend on, values of JSON. A directory that holds records
        of a run with other settings is not touched.
      grown: the settings that may differ from the earlier run's: lists that the run goes through,
        so that a grid can be extended.
      overwrite: whether to throw away what an earlier run left there. It is set aside until
        something of this run is recorded: see `take_back`.
      ways_out: what the user calls another directory, and to throw the earlier run away.

    Raises:
      ValueError: the directory holds something else; the message says what and what to do.
    """

    def __init__(
        self,
        path,
        settings: dict,
        grown=(),
        overwrite: bool = False,
        ways_out: tuple = ("--name", "--overwrite"),
    ):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(_jsonable(settings)))  # as they will be read back
        self._another, self._overwrite = ways_out
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another {self._another}")
        self._check_ours()
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock.hold(self.path)
        try:
            self._restore()
            if overwrite:
                self._set_aside()
            elif (self.path / "config.json").exists():
                self._check_same_run(set(grown))
            self._cut_half_record()
        except BaseException:
            self.release()
            raise

    def release(self):
        """Lets another process write into the directory."""
        self._lock.release()

    def hold(self):
        """Keeps other processes from writing into it, after `release`."""
        self._lock.hold()

    def _check_ours(self):
        """Refuses a directory that no run made; one that was stopped while it was made will do."""
        there = [p.name for p in self.path.iterdir()] if self.path.exists() else []
        made = [name in UNFINISHED or name.endswith(".partial") for name in there]
        if not all(made) and not _is_ours(self.path):
            raise ValueError(
                f"{self.path} is not empty and holds no run of this program; choose another "
                f"{self._another}"
            )

    def take_back(self):
        """Leaves the directory as it was before this run, which was refused: nothing is recorded.

        A new directory goes, an earlier run comes back. Does nothing once there is a record, a
        checkpoint or a divergence.
        """
        if self._has_records():
            return
        self._restore()
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def _set_aside(self):
        """Moves what an earlier run left into `EARLIER`, until something of this one is there.

        A process can be killed between any two lines of this: `EARLIER` has that name only while it
        is whole, and nothing of the new run is written before.
        """
        moving = self.path / MOVING
        moving.mkdir()
        for entry in list(self.path.iterdir()):
            if entry.name not in (lock.NAME, MOVING):
                os.replace(entry, moving / entry.name)
        os.replace(moving, self.path / EARLIER)

    def _restore(self):
        """Moves it back; nothing to do if it was not set aside, or is gone for good."""
        earlier, moving = self.path / EARLIER, self.path / MOVING
        if earlier.exists() and self._has_records():  # of the run that came after it
            os.replace(earlier, self.path / GONE)
        _remove(self.path / GONE)
        if earlier.exists():
            os.replace(earlier, moving)
        if moving.exists():
            for entry in list(moving.iterdir()):
                _remove(self.path / entry.name)
                os.replace(entry, self.path / entry.name)
            moving.rmdir()

    def _has_records(self):
        return any((self.path / name).exists() for name in RECORDED)

    def _recorded(self):
        """Something of this run was recorded: what was set aside goes."""
        if (self.path / EARLIER).exists():
            os.replace(self.path / EARLIER, self.path / GONE)
            _remove(self.path / GONE)

    def _check_same_run(self, grown):
        before = read_config(self.path)["settings"]
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
                f"another {self._another}, or throw the earlier run away with {self._overwrite}"
            )

    def _cut_half_record(self):
        file = self.path / "records.jsonl"
        if file.exists():
            text = file.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]
            if complete != text:
                replace(file, complete)

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
        replace(self.path / "plan.json", (json.dumps(_jsonable(plan)) + "\n").encode())

    def append(self, record: dict):
        """Appends one record to records.jsonl and flushes it to the disk."""
        with open(self.path / "records.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_jsonable(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._recorded()

    def records(self) -> list[dict]:
        return read_records(self.path)

    def replace_records(self, rows: list[dict]):
        """Has these records and no others."""
        text = "".join(json.dumps(_jsonable(row)) + "\n" for row in rows)
        replace(self.path / "records.jsonl", text.encode())

    def note_divergence(self, configuration: dict, why: str):
        """Adds a configuration to diverged.json, which says what is not tried again."""
        noted = [*read_diverged(self.path), {"configuration": configuration, "why": why}]
        self.write_json("diverged.json", noted)
        self._recorded()

    def write_json(self, name: str, value):
        """Replaces a file of the directory by this value, all at once."""
        self.write_text(name, json.dumps(_jsonable(value), indent=2) + "\n")

    def write_text(self, name: str, text: str):
        """Replaces a file of the directory by this text, all at once."""
        replace(self.path / name, text.encode("utf-8", "replace"))

    def write_arrays(self, name: str, arrays: dict):
        """Replaces an .npz file of the directory, all at once."""
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f"{file.stem}.partial.npz")
        np.savez_compressed(partial, **arrays)
        _sync(partial)
        os.replace(partial, file)

    def save_checkpoint(self, state: dict):
        """Replaces the checkpoint by this state: arrays, lists of arrays, and values of JSON."""
        arrays: dict[str, Any] = {}
        rest: dict[str, Any] = {_RECORDED: self._recorded_bytes()}
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                arrays[name] = value
            elif isinstance(value, list) and value and isinstance(value[0], np.ndarray):
                arrays |= {f"{name}[{i:06d}]": v for i, v in enumerate(value)}
            else:
                rest[name] = value
        arrays[_REST] = np.array(json.dumps(rest, default=lambda v: v.item()))
        arrays[_DIGEST] = np.array(_digest(arrays))
        partial = self.path / "checkpoint.partial.npz"
        np.savez(partial, **arrays)
        _sync(partial)
        os.replace(partial, self.path / "checkpoint.npz")
        self._recorded()

    def load_checkpoint(self) -> dict:
        """The state last saved; empty if there is none.

        One that cannot be read, or is further than the records are, costs time only: it is said,
        set aside, and the configuration in progress begins anew.
        """
        file = self.path / "checkpoint.npz"
        if not file.exists():
            return {}
        try:
            with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as saved:
                arrays = dict(saved)
            if str(arrays.pop(_DIGEST)) != _digest(arrays):
                raise ValueError("its content is not what was saved")
            state = json.loads(str(arrays.pop(_REST)))
            if state.pop(_RECORDED, 0) > self._recorded_bytes():
                raise ValueError("it is further than the records, of which some were lost")
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
                f"{file} cannot be used ({type(error).__name__}: {error}): it is {aside.name} now, "
                "and the configuration in progress begins anew"
            )
            return {}

    def _recorded_bytes(self) -> int:
        file = self.path / "records.jsonl"
        return file.stat().st_size if file.exists() else 0

    def clear_checkpoint(self):
        (self.path / "checkpoint.npz").unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether a run of this program made the directory."""
    try:
        return {"settings", "seconds"} <= set(read_config(path))
    except (OSError, TypeError, ValueError):
        return False


def read_config(path) -> dict:
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))


def read_plan(path) -> dict:
    return json.loads((Path(path) / "plan.json").read_text(encoding="utf-8"))


def read_diverged(path) -> list[dict]:
    """What diverged in a run: dicts of `configuration` and `why`."""
    file = Path(path) / "diverged.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def check_grid(path, rows: list[dict], plan: dict):
    """Raises ValueError unless each row is of a configuration and epoch of its own.

    Args:
      path: the run directory, for the message.
      rows: all its records, in order.
      plan: what plan.json says.
    """
    fields = dict.fromkeys(name for c in plan["configurations"] for name in c)
    seen: dict = {}
    for number, row in enumerate(rows, 1):
        place = f"{Path(path) / 'records.jsonl'}, line {number}"
        lacking = [name for name in (*fields, "epoch") if name not in row]
        if lacking:
            raise ValueError(f"{place} is no record of this run: it has no {', '.join(lacking)}")
        key = tuple(row[name] for name in (*fields, "epoch"))
        if key in seen:
            raise ValueError(
                f"{place} is of the same configuration and epoch as line {seen[key]}: remove one"
            )
        seen[key] = number


def without(diverged: list[dict], rows: list[dict]) -> list[dict]:
    """The records that are not of a configuration that diverged."""
    gone = [d["configuration"].items() for d in diverged]
    return [row for row in rows if not any(items <= row.items() for items in gone)]


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

    Raises:
      ValueError: a line is damaged; the message names file and line.
    """
    file = Path(path) / "records.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [_read_line(file, number, line) for number, line in enumerate(lines, 1)]


def _read_line(file, number, line) -> dict:
    try:
        record = json.loads(line.decode("utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is no record")
        wrong = [k for k, v in record.items() if not isinstance(v, (int, float, str, type(None)))]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is neither a number nor a text")
    except ValueError as error:
        raise ValueError(
            f"{file}, line {number} is damaged ({error}). Without that line the same command "
            "measures again what was in it"
        ) from None
    return {k: math.nan if v is None else v for k, v in record.items()}


EARLIER = ".earlier"  # what an earlier run left, until this one has recorded something
MOVING, GONE = f"{EARLIER}.moving", f"{EARLIER}.gone"  # on its way there or back; being deleted
RECORDED = ("records.jsonl", "checkpoint.npz", "diverged.json")
UNFINISHED = {
    lock.NAME,
    EARLIER,
    MOVING,
    GONE,
    "figures",
}  # of a run that was stopped before it had a configuration
_RECORDED = "recorded bytes"  # of the records when a checkpoint was saved
_REST, _DIGEST = "values", "digest"  # of a checkpoint: what is no array; of all the rest


def _digest(arrays: dict) -> str:
    """Of names, shapes, types and bytes of arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        found.update(value.tobytes())
    return found.hexdigest()


def replace(file: Path, content: bytes):
    """Puts a file in the place of another, all at once, so that a reader sees one or the other."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    _sync(partial)
    os.replace(partial, file)


def _remove(path: Path):
    """Removes a file, or a directory with all that is in it, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


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
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
