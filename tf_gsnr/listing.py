"""What there is to run and what has been run: experiments, flagfiles, run directories."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from tf_gsnr import experiments, status
from tf_gsnr.report import runs
from tf_gsnr.status import training


def text(runs_dir="runs", flags_dir="flags") -> str:
    """A list of all of it for a terminal; without TensorFlow."""
    parts = [("experiments", [(name, _first_line(name)) for name in experiments.EXPERIMENTS])]
    files = sorted(Path(flags_dir).glob("*.flags"))
    parts.append((f"flagfiles in {flags_dir}/", [(str(file), _comment(file)) for file in files]))
    parts.append((f"runs in {runs_dir}/", list(map(_of_run, _directories(runs_dir)))))
    lines = []
    for title, rows in parts:
        width = max((len(name) for name, _ in rows), default=0)
        lines += [
            title,
            *(f"  {name.ljust(width)}  {what}" for name, what in rows or [("none", "")]),
        ]
        lines.append("")
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _first_line(experiment) -> str:
    """Of its docstring, which is read and not run: that would import TensorFlow."""
    spec = importlib.util.find_spec(f"{experiments.__name__}.{experiment}.run")
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return (docstring or "").splitlines()[0]


def _comment(flagfile) -> str:
    """The first sentence of the comment that it begins with, or what fits on a line of it."""
    lines = flagfile.read_text(encoding="utf-8").splitlines()
    words = " ".join(line.lstrip("# ") for line in lines[:3] if line.startswith("#"))
    return words if len(words) < 100 else words[:97].rpartition(" ")[0] + "..."


def _directories(runs_dir) -> list[Path]:
    try:
        return runs.directories([runs_dir])
    except ValueError:
        return []


def _of_run(path) -> tuple[str, str]:
    try:
        if status.is_training(path):
            run = training.read(path)
            step = run.rows[-1]["step"] if run.rows else 0
            return str(path), f"training, {run.state['state']}, step {step}"
        found = runs.read(path)
        return str(path), (
            f"{found.experiment}, {found.complete} of {found.planned} configurations"
        )
    except ValueError as error:
        return str(path), str(error).partition(": ")[2]
