"""Records as columns: arrays, a DataFrame, CSV."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import numpy as np

from tf_gsnr import checks, records


def read(run_dir, frame: bool | None = None):
    """The records of a run, or of a training with `run_dir=`, as columns.

    Args:
      run_dir: the directory that holds records.jsonl.
      frame: whether as a pandas DataFrame; default: where pandas is installed.

    Returns:
      A DataFrame with a row per record; or `{name: array}`, `[records]` each: float64, and object
      where there are texts. What a record has not is NaN.

    Raises:
      ValueError: there are no records; the message names the file.
      ImportError: `frame=True` without pandas.

    Example:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run_dir:
    ...     directory = records.RunDirectory(run_dir + "/run", {"experiment": "mine"})
    ...     directory.append({"step": 0, "gsnr/mean": 0.5})
    ...     directory.append({"step": 8, "gsnr/mean": 0.25})
    ...     columns = read(directory.path, frame=False)
    >>> columns["gsnr/mean"].tolist()
    [0.5, 0.25]
    """
    checks.path("run_dir", run_dir)
    if frame is not None:
        checks.boolean("frame", frame)
    rows = records.read_records(run_dir)
    if not rows:
        raise ValueError(
            f"run_dir={str(run_dir)!r}: there is no record in records.jsonl; expected a run"
        )
    table = columns(rows)
    if frame is None:
        frame = importlib.util.find_spec("pandas") is not None
    if not frame:
        return table
    import pandas  # optional

    return pandas.DataFrame(table)


def columns(rows: list[dict]) -> dict:
    """Records as `{name: array}`, in the order in which the names first come."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = {}
    for name in names:
        values = [row.get(name, math.nan) for row in rows]
        plain = all(isinstance(v, (int, float)) for v in values)
        table[name] = np.array(values, np.float64 if plain else object)
    return table


def write_csv(run_dir) -> Path:
    """Writes the records of a run as records.csv beside them; what is not known is empty."""
    table = read(run_dir, frame=False)
    file = Path(run_dir) / "records.csv"
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(table)
        for row in zip(*table.values()):
            writer.writerow(map(_cell, row))
    return file


def _cell(value):
    if value != value:
        return ""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole else value
