"""The experiments of the paper, a folder each; `load` finds them, and a user's own.

In a folder are `settings.py` and `figure.py`, which need no TensorFlow, and `run.py`, which does.
What they hold together is a `framework.experiment.Experiment`; a module of the user's own that has
all of it is an experiment, too (docs/your_own_experiment.md).
"""

from __future__ import annotations

import importlib

from tf_gsnr import lookup
from tf_gsnr.experiments.framework.experiment import PARTS

EXPERIMENTS = ("osgr", "dynamics", "jagged", "freezing", "weights", "gap", "ranking")
_FILES = {"run": "run", "check": "run", "STRATEGIES": "run"}
_FILES |= dict.fromkeys(("summary", "table", "figure", "claims"), "figure")  # others: settings


class _Ours:
    """An experiment of this package, of which each file is imported when it is needed."""

    def __init__(self, name):
        self._folder = f"{__name__}.{name}"

    def __getattr__(self, part):
        module = importlib.import_module(f"{self._folder}.{_FILES.get(part, 'settings')}")
        return getattr(module, part)


def load(name: str):
    """The named experiment: one of `EXPERIMENTS`, or a module of the user's.

    Returns:
      A `framework.experiment.Experiment`.

    Raises:
      ValueError: an unknown name, or a module that is no experiment.
    """
    if name in EXPERIMENTS:
        return _Ours(name)
    try:
        if not all(map(str.isidentifier, name.split("."))):
            raise ValueError("no name of a module")
        module = lookup.module("experiment", name)
    except ValueError:
        raise ValueError(
            f"unknown experiment {name!r}{lookup.suggestion(name, EXPERIMENTS)}; available: "
            f"{', '.join(EXPERIMENTS)}, or a module of "
            "your own, of which there is none by this name in the current directory or among the "
            "installed packages"
        ) from None
    lacking = [part for part in PARTS if not hasattr(module, part)]
    if lacking:
        raise ValueError(
            f"--experiment={name}: module {module.__name__!r} is no experiment: it lacks "
            f"{', '.join(lacking)} (docs/your_own_experiment.md)"
        )
    return module
