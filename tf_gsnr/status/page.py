"""Run directories of trainings -> one HTML page that needs nothing beside it.

The page holds its data as JSON and draws its charts itself (page.js, page.css in this folder), so
that it can be hovered, sorted, printed, and saved as CSV and PNG; it works offline.
"""

from __future__ import annotations

import functools
import html
import json
import time
from importlib import resources
from pathlib import Path

from tf_gsnr import checks, records
from tf_gsnr.status import training as of_training
from tf_gsnr.status import words

REFRESH = (4, 60)  # seconds between two looks of an open page, the least and the most


def page(run_dir, *more, output=None) -> Path:
    """Writes the page of a training, or of several side by side.

    Args:
      run_dir: the `run_dir` of a `GSNRModel` or `GSNRCallback`.
      *more: those of other trainings, to be drawn over the first.
      output: the file; default: page.html in the run directory, or compare.html beside the first
        one where there are several.

    Returns:
      The file.

    Raises:
      ValueError: a directory holds no training; or `output` is no file that can be.

    Example:

    >>> import keras, numpy as np, tempfile, tf_gsnr
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> x = np.random.normal(size=[64, 4])
    >>> with tempfile.TemporaryDirectory() as runs:
    ...     model = tf_gsnr.GSNRModel(model, run_dir=runs + "/first")
    ...     model.compile("sgd", "mse")
    ...     _ = model.fit(x, x[:, :2], epochs=2, verbose=0)
    ...     tf_gsnr.page(runs + "/first").name
    'page.html'
    """
    runs = [of_training.read(path) for path in (run_dir, *more)]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise ValueError(
            f"run_dir: {', '.join(str(run.path) for run in runs)}; expected each directory once"
        )
    if output is None:
        first = runs[0].path
        output = first / "page.html" if len(runs) == 1 else first.resolve().parent / "compare.html"
    output = checks.file("output", output)
    output.parent.mkdir(parents=True, exist_ok=True)
    records.replace(output, text_of(runs).encode())
    return output


def text_of(runs: list) -> str:
    """The page's HTML."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} trainings"
    data = {
        "title": title,
        "made": words.when(time.time()),
        "refresh": _refresh(runs),
        "runs": [_run(run) for run in runs],
        "differing": _differing(runs),
    }
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}: GSNR</title>\n<style>\n{_asset('page.css')}</style>\n"
        "</head>\n<body>\n<main></main>\n"
        f"<noscript>{_plain(runs)}</noscript>\n"
        f'<script type="application/json" id="data">{_for_script(data)}</script>\n'
        f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def compact(value) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _for_script(value) -> str:
    """JSON that ends no script, whatever names are in it."""
    return compact(value).replace("<", "\\u003c").replace("\u2028", "").replace("\u2029", "")


@functools.cache
def _asset(name) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _run(run) -> dict:
    return {
        "name": run.name,
        "state": run.state["state"],
        "written": run.state.get("written"),
        "head": words.head(run),
        "tiles": [tile._asdict() for tile in words.tiles(run)],
        "warnings": words.warnings(run),
        "byCallback": run.settings.get("measured_by") == "GSNRCallback",
        "hasTest": bool(run.settings.get("test_examples")),
        "batch": _finite(words.batch_size(run)),
        "epochs": run.config.get("epochs"),
        "series": of_training.series(run),
        "layers": of_training.layers(run),
        "histograms": of_training.histograms(run),
    }


def _finite(value):
    return value if value == value else None


def _differing(runs) -> list[dict]:
    """The settings in which several trainings differ, a row each."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append({"setting": name, "values": ["" if v is None else str(v) for v in values]})
    return rows


def _refresh(runs) -> int | None:
    """Seconds until an open page looks again; None once nothing runs any more."""
    if all(run.state["state"] != "running" for run in runs):
        return None
    steps = [run.column("seconds") for run in runs if len(run.rows) > 1]
    waits = [(s[-1] - s[0]) / (len(s) - 1) for s in steps]
    low, high = REFRESH
    return int(min(max(low, min(waits, default=low)), high))


def _plain(runs) -> str:
    """What can be read without scripts."""
    lines = []
    for run in runs:
        lines.append(f"<h1>{html.escape(run.name)}</h1>")
        for tile in words.tiles(run):
            text = f"{tile.label}: {tile.value} {tile.error}. {tile.sentence}"
            lines.append(f"<p>{html.escape(text)}</p>")
    return "".join(lines) + "<p>The charts need JavaScript.</p>"
