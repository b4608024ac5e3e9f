"""Writes an HTML page from run directories.

Of the experiments' runs report.html, in the first directory that holds some:

  python -m tf_gsnr.report                                  # all of runs/: runs/report.html
  python -m tf_gsnr.report runs/mnist_small                 # one: runs/mnist_small/report.html
  python -m tf_gsnr.report machine0/runs machine1/runs      # machine0/runs/report.html
  python -m tf_gsnr.report --output=RESULTS.md              # Markdown, PNG figures, RESULTS.html

Of a training of one's own, by run_dir=, page.html in it; of several also a page that compares them:

  python -m tf_gsnr.report runs/my_training
  python -m tf_gsnr.report runs/with_dropout runs/without   # and runs/compare.html

And records.csv in each directory by --format=csv.

An argument is a run directory or one that holds some. The shards of one run (--shard=i/k) are
joined, wherever they are. An unfinished run is shown as far as it is.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # figures go into files

from absl import app, flags  # noqa: E402

from tf_gsnr import checks, columns, experiments, progress, status  # noqa: E402
from tf_gsnr.report import document, results, runs  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "A Markdown file to write too, such as RESULTS.md.")
flags.DEFINE_string("figures", None, "Where its figures go. Default: docs/results beside it.")
flags.DEFINE_string(
    "html", None, "The HTML page. Default: report.html beside the runs; of --output, beside it."
)


flags.DEFINE_multi_string(
    "experiments", [], "A module of your own whose runs are to be shown; it is imported."
)
flags.DEFINE_enum(
    "format", "html", ["html", "csv"], "html: pages to look at; csv: the records as records.csv."
)


def write_all(directories, *arguments) -> list[Path]:
    """The pages of all that is in these directories: of trainings, and of the experiments' runs.

    Args and errors as of `write`.

    Returns:
      The files.
    """
    files = [status.page(path) for path in runs.trainings(directories)]
    named = [path for path in directories if status.is_training(path)]
    if len(named) > 1:
        files.append(status.page(*named))
    others = [path for path in directories if runs.holds_experiments(path)]
    if others or not files:
        files += write(others or directories, *arguments)
    return files


def write_csv(directories) -> list[Path]:
    """records.csv in each run directory; returns these files."""
    return [columns.write_csv(path) for path in runs.directories(directories)]


def write(directories, output=None, figures=None, html=None, modules=()) -> list[Path]:
    """Reads the experiments' run directories and writes what is found there.

    Args:
      directories: of runs, or such as hold some.
      output: a Markdown file, with PNG figures; None: only the page is written.
      figures: the directory of those figures; default: docs/results beside `output`.
      html: the page; default: as `output`, ending in .html; without it `page_of(directories)`.
      modules: experiments of one's own, which may be imported to show their runs.

    Returns:
      The files: of Markdown, if there is one, and the page.

    Raises:
      ValueError: no run to be shown, or files that cannot be; the message says why.
    """
    if figures and not output:
        raise ValueError(f"--figures={figures}: PNG figures are those of --output=RESULTS.md")
    page = Path(html or (Path(output).with_suffix(".html") if output else page_of(directories)))
    if output and page == Path(output):
        raise ValueError(f"--output={output}: it is Markdown; the page beside it ends in .html")
    shown_runs = [run for run in runs.find(directories) if _is_shown(run, modules)]
    if not shown_runs:
        raise ValueError(f"no run in {', '.join(map(str, directories))} has a record to show")
    if output and not figures:
        figures = Path(output).parent / "docs" / "results"
    blocks = results.document(shown_runs, figures)
    texts = {Path(output): document.markdown(blocks, Path(output).parent)} if output else {}
    texts[page] = document.html(blocks, "tf_gsnr: results")
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(texts)


def page_of(directories) -> Path:
    """Where the page of these directories goes: the first that holds runs; else around the runs.

    >>> str(page_of(["runs/a"])), Path(page_of(["runs/a", "runs/b"])).parent.name
    ('runs/a/report.html', 'runs')
    """
    paths = [Path(directory) for directory in directories]
    holders = [path for path in paths if not (path / "config.json").exists()]
    if holders or len(paths) == 1:
        return (holders or paths)[0] / "report.html"
    return Path(os.path.commonpath([path.resolve() for path in paths])) / "report.html"


def _is_shown(run, modules):
    """Says what there is to say of a run; whether there is something to show of it."""
    if not run.records:
        progress.say(f"left out: {run.name} has no records yet")
        return False
    if run.experiment not in (*experiments.EXPERIMENTS, *modules):
        progress.say(
            f"left out: {run.name}: its experiment is {run.experiment!r}, a module of somebody's "
            "own, and is not imported unless it is named: --experiments=" + run.experiment
        )
        return False
    try:
        experiments.load(run.experiment)
    except ValueError as error:
        progress.say(f"left out: {run.name}: {error}")
        return False
    if run.complete + run.diverged < run.planned:
        progress.say(
            f"{run.name} is unfinished: {run.complete} of {run.planned} configurations; the same "
            f"command goes on from there: {runs.command(run)}"
        )
    return True


def check_flags():
    """Raises ValueError for a flag that is none; the message names it."""
    for flag, value in (("--output", FLAGS.output), ("--html", FLAGS.html)):
        if value is not None:
            checks.file(flag, value)
    if FLAGS.output is not None and Path(FLAGS.output).suffix == ".html":
        checks.refuse("--output", FLAGS.output, "a Markdown file; the page beside it ends in .html")
    if FLAGS.figures is not None:
        checks.directory("--figures", FLAGS.figures)
        if FLAGS.output is None:
            expected = "--output=RESULTS.md, too, whose PNG figures they are"
            checks.refuse("--figures", FLAGS.figures, expected)
    for name in FLAGS.experiments:
        if not all(map(str.isidentifier, name.split("."))) or not _is_there(name):
            checks.refuse("--experiments", name, "a module that Python finds")


def _is_there(module) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it would be in
        return False


def main(argv):
    directories = list(dict.fromkeys(argv[1:])) or ["runs"]
    try:
        check_flags()
        for directory in directories:
            checks.path("RUN", directory, "a run directory, or of one that holds some")
    except ValueError as error:
        progress.stop(f"error: {error}\nSee python -m tf_gsnr.report --help", 2)
    try:
        if FLAGS.format == "csv":
            files = write_csv(directories)
        else:
            given = FLAGS.output, FLAGS.figures, FLAGS.html, FLAGS.experiments
            files = write_all(directories, *given)
        for file in files:
            print(file)
    except ValueError as error:
        progress.stop(f"error: {error}")
    except OSError as error:
        flags_of = "--output, --figures and --html say where to write"
        progress.stop(f"error: {error.filename}: {error.strerror}; {flags_of}")


def parse_flags(argv):
    """absl's parser; a flag that it does not know ends the program with what may be meant."""
    try:
        return FLAGS(argv)
    except flags.Error as error:
        progress.stop(f"{error}\nSee python -m tf_gsnr.report --help", 2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
