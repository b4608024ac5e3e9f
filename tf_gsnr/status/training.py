"""A training as its run directory has it, and as the page takes it: columns, layers, histograms."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tf_gsnr import checks, records

MOST_ROWS = 400  # on a page; of more every so many-th is shown, and the last
DIGITS = 4
KINDS = ("gsnr", "same_sign", "dead", "gap_share")  # what a row has of each layer


class Training(NamedTuple):
    """What a run directory says of a training.

    Attributes:
      path: the directory.
      config: config.json; `settings` in it are what the records depend on.
      state: state.json: "state" is running, done or stopped, where it can be told.
      rows: the records; of all of them, in order.
      histograms: histograms.json, {} without one.
    """

    path: Path
    config: dict
    state: dict
    rows: list
    histograms: dict

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def settings(self) -> dict:
        return self.config["settings"]

    def column(self, name) -> np.ndarray:
        """A number of all rows, NaN where it is not; float64 `[rows]`."""
        return np.array([_number(row.get(name)) for row in self.rows], np.float64)

    def last(self, name) -> float:
        """The last one that is known, NaN if none is."""
        known = self.column(name)
        known = known[np.isfinite(known)]
        return float(known[-1]) if known.size else math.nan


def is_training(path) -> bool:
    """Whether a training's `run_dir` it is."""
    try:
        return records.read_config(path).get("kind") == "training"
    except (OSError, AttributeError, json.JSONDecodeError):
        return False


def read(path, name: str = "run_dir") -> Training:
    """Reads a run directory.

    Args:
      path: of it.
      name: of the argument, for the error.

    Raises:
      ValueError: it is none of a training; the message says why.
    """
    path = checks.path(name, path)
    if not path.is_dir():
        raise ValueError(f"{name}={str(path)!r}: no such directory; expected that of a training")
    if not is_training(path):
        raise ValueError(
            f"{name}={str(path)!r}: no training was recorded there; expected what "
            "GSNRModel(..., run_dir=) or GSNRCallback(..., run_dir=) makes. The experiments' runs "
            "are shown by python -m tf_gsnr.report"
        )
    config = records.read_config(path)
    state = _json(path / "state.json")
    return Training(
        path,
        config | {"settings": dict(config.get("settings") or {})},
        state | {"state": _told_state(state)},
        records.read_records(path),
        _json(path / "histograms.json"),
    )


def _json(file) -> dict:
    """What the file holds; {} where it cannot be read, since it only adds to the page."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _told_state(state) -> str:
    """A killed process could not say that it has stopped."""
    told = state.get("state", "stopped")
    here = state.get("host") == socket.gethostname()
    if told == "running" and here and not _is_alive(state.get("pid")):
        return "stopped"
    return told


def _is_alive(pid) -> bool:
    if not isinstance(pid, int) or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def series(training: Training) -> dict:
    """The columns of the whole model, of at most `MOST_ROWS` rows; null for what is not known."""
    kept = _kept(len(training.rows))
    names = dict.fromkeys(name for row in training.rows for name in row)
    whole = [n for n in names if not _is_of_layer(n, _layers(training))]
    return {name: [_rounded(v) for v in training.column(name)[kept]] for name in whole}


def layers(training: Training) -> list[dict]:
    """A dict a layer: what config.json says of it, its numbers over time, and the last ones."""
    kept = _kept(len(training.rows))
    unmeasured = training.state.get("unmeasured") or {}
    found = []
    for layer in training.config.get("layers") or []:
        path = str(layer.get("layer"))
        numbers: dict[str, Any] = {
            kind: [_rounded(v) for v in training.column(f"{kind}/{path}")[kept]] for kind in KINDS
        }
        last = {kind: _rounded(training.last(f"{kind}/{path}")) for kind in KINDS}
        found.append(
            {
                "layer": path,
                "class": str(layer.get("class", "")),
                "parameters": layer.get("parameters"),
                "route": unmeasured.get(path) or str(layer.get("route", "")),
                "measured": path not in unmeasured,
                "gsnr": numbers["gsnr"],
                "gap_share": numbers["gap_share"],
                "last": last,
            }
        )
    return found


def histograms(training: Training) -> dict | None:
    """Edges, and the counts of each layer at the first and the last measurement."""
    found = training.histograms
    try:
        paths = list(found["last"]["counts"])
        return {
            "edges": found["edges"],
            "layers": paths,
            "first": [found["first"]["counts"].get(path) for path in paths],
            "last": [found["last"]["counts"][path] for path in paths],
            "steps": [found["first"]["step"], found["last"]["step"]],
        }
    except (KeyError, TypeError, AttributeError):
        return None


def _layers(training):
    return {str(layer.get("layer")) for layer in training.config.get("layers") or []}


def _is_of_layer(name, paths) -> bool:
    kind, slash, path = name.partition("/")
    return bool(slash) and kind in KINDS and path in paths


def _kept(count) -> np.ndarray:
    """The indices of the rows that are shown."""
    if count <= MOST_ROWS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, MOST_ROWS).round().astype(int))


def _number(value) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _rounded(value):
    """To so many digits as a page can show, None for what JSON has not."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}") if abs(value) < 1e6 else float(round(value))
    return int(short) if short == int(short) else short
