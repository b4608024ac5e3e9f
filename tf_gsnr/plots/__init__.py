"""From records to figures and summaries. Never imports TensorFlow: a report opens in a second.

To each experiment belongs a module here with
    summary(records) -> dict, what the records add up to
    table(records) -> str, the same for a terminal
    figure(records) -> matplotlib figure
    claims(records) -> list of `claims.Claim`, the rows of RESULTS.md
and a line in `FIGURES`. An experiment of your own has them in its own module; the first line of the
module's docstring is the figure's caption.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from tf_gsnr import lookup
from tf_gsnr.experiments.dynamics import figure as dynamics
from tf_gsnr.experiments.freezing import figure as freezing
from tf_gsnr.experiments.osgr import figure as osgr
from tf_gsnr.experiments.weights import figure as weights
from tf_gsnr.plots.style import plt

FIGURES = {"osgr": osgr, "dynamics": dynamics, "freezing": freezing, "weights": weights}


def load(experiment: str) -> ModuleType:
    """The module of an experiment's figure: ours, or the user's own experiment itself.

    Raises:
      ValueError: neither.
    """
    if experiment in FIGURES:
        return FIGURES[experiment]
    return lookup.module("experiment", experiment)


def draw(experiment: str, records: list[dict], path) -> Path:
    """Draws the figure of an experiment's records into the file `path` and returns it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = load(experiment).figure(records)
    partial = path.with_suffix(f".partial{path.suffix}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.replace(path)
    return path
