"""Writes RESULTS.md and one HTML page from run directories.

  python -m tf_gsnr.report                                  # all of runs/
  python -m tf_gsnr.report runs/mnist_small runs/freezing   # these
  python -m tf_gsnr.report --output=DIR/RESULTS.md machine0/runs machine1/runs

An argument is a run directory or one that holds some. The shards of one run (--shard=i/k) are
joined, wherever they are. An unfinished run is shown as far as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from tf_gsnr import experiments, progress
from tf_gsnr.report import document, results, runs

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "RESULTS.md", "The Markdown file to write.")
flags.DEFINE_string("figures", None, "Where its figures go. Default: docs/results beside it.")
flags.DEFINE_string("html", None, "The HTML page to write. Default: as --output, ending in .html.")


def write(directories, output, figures=None, html=None) -> list[Path]:
    """Reads run directories and writes what is found there.

    Args:
      directories: of runs, or such as hold some.
      output: the Markdown file.
      figures: the directory of its figures; default: docs/results beside `output`.
      html: the page; default: as `output`, ending in .html.

    Returns:
      The two files.

    Raises:
      ValueError: no run to be shown; the message says why.
    """
    output = Path(output)
    html = Path(html) if html else output.with_suffix(".html")
    if html == output:
        raise ValueError(f"--output={output}: it is Markdown; the page beside it ends in .html")
    shown_runs = [run for run in runs.find(directories) if _is_shown(run)]
    if not shown_runs:
        raise ValueError(f"no run in {', '.join(map(str, directories))} has a record to show")
    blocks = results.document(shown_runs, figures or output.parent / "docs" / "results")
    for file, text in (
        (output, document.markdown(blocks, output.parent)),
        (html, document.html(blocks, "tf_gsnr: results")),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return [output, html]


def _is_shown(run):
    """Says what there is to say of a run; whether there is something to show of it."""
    if not run.records:
        progress.say(f"left out: {run.name} has no records yet")
        return False
    try:
        experiments.load(run.experiment)
    except ValueError as error:
        progress.say(f"left out: {run.name}: {error}")
        return False
    if run.complete < run.planned:
        progress.say(
            f"{run.name} is unfinished: {run.complete} of {run.planned} configurations; the same "
            f"command goes on from there: {runs.command(run)}"
        )
    return True


def main(argv):
    try:
        for file in write(argv[1:] or ["runs"], FLAGS.output, FLAGS.figures, FLAGS.html):
            print(file)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
