"""From records to figures and summaries. Never imports TensorFlow: a report opens in a second.

To each experiment belongs a module here with
    summary(records) -> dict, what the records add up to
    table(records) -> str, the same for a terminal
    figure(records) -> matplotlib figure
    claims(records) -> list of `claims.Claim`, the rows of RESULTS.md
and a line in `FIGURES`.
"""

from __future__ import annotations

from pathlib import Path

from tf_gsnr.plots import dynamics, freezing, osgr
from tf_gsnr.plots.style import plt

FIGURES = {"osgr": osgr, "dynamics": dynamics, "freezing": freezing}


def draw(experiment: str, records: list[dict], directory) -> Path:
    """Draws the figure of an experiment's records into `directory` and returns its path."""
    path = Path(directory) / f"{experiment}.png"
    figure = FIGURES[experiment].figure(records)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.replace(path)
    return path
