"""The run directory of one training: its records, what is known of its layers, its page.

    run_dir/
      config.json       what is trained and measured, on what machine, versions, layers
      records.jsonl     a flat row a measurement; see `rows.py`
      state.json        running, done or stopped; where it is; what there is to be said of it
      histograms.json   per layer the parameters' GSNR, at the first measurement and at the last
      page.html         all of it to look at; replaced as the training goes on
      gsnr/*.npz        with keep="gsnr": the GSNR of every parameter, a file a measurement

Records of two trainings are never mixed: one that starts anew does not touch what it finds, one
that goes on from a saved model takes away the records after its first step. Nothing that fails
here stops the training.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr import environment, metrics, status
from tf_gsnr.gradients import diagnosis
from tf_gsnr.records import RunDirectory, read_config
from tf_gsnr.status import training
from tf_gsnr.training.rows import EDGES

# Between a training and its continuation; Keras counts models that were given no name.
MAY_DIFFER = ("model", "learning_rate", "steps_per_epoch")
PAGE_SHARE = 0.05  # of the time, at most, goes into pages


class Recorder:
    """Writes a training down.

    Args:
      run_dir: the directory.
      overwrite: whether an earlier run there may be thrown away.
    """

    def __init__(self, run_dir, overwrite: bool = False):
        self.path = Path(run_dir)
        self.rows: list[dict] = []  # all that are there
        self._overwrite = overwrite
        self._directory: Any = None  # the RunDirectory, once it is open
        self._state: dict = {}
        self._first_histogram: dict | None = None
        self._settings: dict = {}
        self._begun = self._earlier = 0.0
        self._page_due = 0.0
        self._broken = False

    @property
    def open(self) -> bool:
        return self._directory is not None

    @property
    def running(self) -> bool:
        """Whether it was begun and not ended."""
        return self.open and self._state.get("state") == "running"

    def begin(self, settings: dict, layers: list[dict], step: int, about: dict, since=None):
        """Opens the directory; another call goes on after the last one's rows.

        Where settings have changed between two trainings by one recorder, state.json says which,
        and from which step on.

        Args:
          settings: what the records depend on; another training's directory is not touched.
          layers: of `layers_of`.
          step: how many steps were made before.
          about: what else the page shows.
          since: when training began, of `time.monotonic`; default: now.

        Raises:
          ValueError: the directory holds something else, or a training that this one does not
            continue.
        """
        if self.open:
            self._directory.hold()
            self._note_changes(settings, step)
        else:
            ways_out = ("run_dir", "overwrite=True")
            directory = RunDirectory(
                self.path,
                settings | {"experiment": "training"},
                grown=MAY_DIFFER,
                overwrite=self._overwrite,
                ways_out=ways_out,
            )
            try:
                self.rows = self._continued(directory, step)
            except ValueError:
                directory.release()
                raise
            config = {**environment.found(), "kind": "training", "layers": layers, **about}
            directory.write_config(config)
            self._directory = directory
            self._settings = settings
            self._earlier = self.rows[-1].get("seconds", 0.0) if self.rows else 0.0
            self._begun = time.monotonic() if since is None else since
            self._finalizer = weakref.finalize(self, _mark_stopped, directory, self._state)
        self._state |= {"pid": os.getpid(), "host": socket.gethostname(), "step": step}
        self._write_state("running")
        self._write_page(always=True)

    def _note_changes(self, settings, step):
        before, self._settings = self._settings, settings
        changed = {
            name: [before.get(name), value]
            for name, value in settings.items()
            if name not in MAY_DIFFER and before.get(name) != value
        }
        if changed:
            self._state.setdefault("changes", []).append([step, changed])

    def _continued(self, directory, step) -> list[dict]:
        """The rows that stay, if this training goes on from there."""
        rows = directory.records()
        if not rows:
            return []
        last = rows[-1].get("step", 0)
        if step == 0:
            raise ValueError(
                f"run_dir={str(self.path)!r} holds the records of a training, up to step {last}, "
                "and this one begins at step 0: give another run_dir, or overwrite=True to throw "
                "the earlier one away. (A training that goes on from a saved model, whose "
                "optimizer.iterations says so, continues the records)"
            )
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows):
            logging.warning(
                "%s: %d records after step %d, from which this training goes on, are thrown away",
                self.path,
                len(rows) - len(kept),
                step,
            )
            directory.replace_records(kept)
        self._state["continued"] = step
        self._first_histogram = training.read(self.path).histograms.get("first")
        return kept

    def add(self, row: dict, histograms: dict | None = None, **state):
        """Writes a row, unless the last one is of the same step.

        Args:
          histograms: per layer the counts in the bins of `rows.EDGES`.
          **state: what else is new in state.json.
        """
        if self.rows and row["step"] <= self.rows[-1]["step"]:
            return
        row = {"step": row["step"], "epoch": row["epoch"], "seconds": self.seconds, **row}
        self._state |= {"step": row["step"], **state}
        self.rows.append(row)
        self._try(self._write_row, row, histograms)

    def _write_row(self, row, histograms):
        self._directory.append(row)
        if histograms is not None:
            last = {"step": row["step"], "counts": histograms}
            self._first_histogram = self._first_histogram or last
            both = {"edges": EDGES.tolist(), "first": self._first_histogram, "last": last}
            self._directory.write_text("histograms.json", status.compact(both))
        self._write_state("running")
        self._write_page()

    def keep(self, step: int, arrays: dict):
        """Stores arrays of one measurement, under names that are paths of variables."""
        names = {name.replace("/", "."): value for name, value in arrays.items()}
        self._try(self._directory.write_arrays, f"gsnr/step_{step:08d}.npz", names)

    def end(self, state: str):
        """Says that the training is "done" or "stopped"."""
        if not self.open:
            return
        self._try(self._end, state)
        self._directory.release()

    def _end(self, state):
        self._write_state(state)
        config = read_config(self.path) | {"seconds": self.seconds}
        self._directory.write_json("config.json", config)
        self._write_page(always=True)

    @property
    def seconds(self) -> float:
        """Since the training began, that of what it continues included."""
        return round(self._earlier + time.monotonic() - self._begun, 3)

    def _write_state(self, state):
        self._state |= {"state": state, "written": time.time()}
        self._directory.write_json("state.json", self._state)

    def _write_page(self, always=False):
        begun = time.monotonic()
        if always or begun >= self._page_due:
            status.page(self.path)
            now = time.monotonic()
            self._page_due = now + (now - begun) / PAGE_SHARE

    def _try(self, action, *arguments):
        """Does it; where the disk does not let it, says so once, and the training goes on."""
        try:
            action(*arguments)
        except OSError as error:
            if not self._broken:
                logging.error("%s: nothing more is recorded: %s", self.path, error)
            self._broken = True


def _mark_stopped(directory, state):
    """At the end of the process, or when the training is forgotten, if it was not told to end."""
    if state.get("state") == "running":
        state |= {"state": "stopped", "written": time.time()}
        try:
            directory.write_json("state.json", state)
            status.page(directory.path)
        except OSError:
            pass


def layers_of(model) -> list[dict]:
    """A dict a layer: its path, class, number of trainable parameters, and how it is measured."""
    variables = model.trainable_variables
    routes = diagnosis.routes(model)
    layers = []
    for path, indices in metrics.by_layer([v.path for v in variables]).items():
        mine = [routes.get(id(variables[i]), ("", "unused")) for i in indices]
        classes, ways = (list(dict.fromkeys(column)) for column in zip(*mine))
        sizes = [int(np.prod(variables[i].shape)) for i in indices]
        layers.append(
            {
                "layer": path,
                "class": ", ".join(filter(None, classes)),
                "parameters": sum(sizes),
                "route": ", ".join(ways),
            }
        )
    return layers


def about_training(model, **more) -> dict:
    """What is trained, for `settings`."""
    optimizer = model.optimizer
    loss = model.loss
    return {
        "model": model.name,
        "parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "optimizer": type(optimizer).__name__ if optimizer is not None else None,
        "learning_rate": learning_rate(model),
        "loss": loss if isinstance(loss, str) else getattr(loss, "name", type(loss).__name__),
        **more,
    }


def learning_rate(model) -> float:
    """Of the next step; NaN where the optimiser has none."""
    try:
        return float(tf.convert_to_tensor(model.optimizer.learning_rate))
    except (AttributeError, TypeError, ValueError):
        return float("nan")


def steps_made(model) -> int:
    """By the model's optimiser so far, as it says itself."""
    iterations = getattr(model.optimizer, "iterations", None)
    return int(tf.convert_to_tensor(iterations)) if iterations is not None else 0


def digest(data) -> str:
    """A few letters that differ where the data differ, of their shapes and 32 of their rows."""
    sha = hashlib.sha1(usedforsecurity=False)
    batches = [getattr(leaf, "batches", leaf) for leaf in tf.nest.flatten(data)]
    for leaf in tf.nest.flatten(batches):
        if leaf is None:
            continue
        array = np.asarray(leaf)
        sha.update(f"{array.shape} {array.dtype}".encode())
        some = np.concatenate([array[:16], array[-16:]]) if array.ndim else array
        sha.update(str(some.tolist()).encode() if some.dtype == object else some.tobytes())
    return sha.hexdigest()[:12]
