"""What figures share: their style, claims and their verdicts, and how a figure becomes a file.

Never imports TensorFlow: a report opens in a second.
"""

from __future__ import annotations

import io
from pathlib import Path

from tf_gsnr.plots.style import plt


def draw(experiment, records: list[dict], path, note: str = "") -> Path:
    """Draws the figure of an experiment's records into the file `path` and returns it.

    Args:
      experiment: a `tf_gsnr.experiments.framework.experiment.Figure`.
      note: what stands below it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = experiment.figure(records)
    if note:
        figure.supxlabel(note, fontsize="small", color="#98301b", wrap=True)
    partial = path.with_suffix(f".partial{path.suffix}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    partial.replace(path)
    return path


def svg(experiment, records: list[dict]) -> str:
    """The same figure as the text of an SVG drawing; equal records make an equal text."""
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "tf_gsnr"}):  # else the ids in it are random
        figure = experiment.figure(records)
        figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()
