"""Makes docs/api.md and docs/numbers.md of what the code says of itself.

And the README's list of runs of RESULTS.md: `python docs/make_pages.py`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tf_gsnr  # noqa: E402
from tf_gsnr import shown  # noqa: E402

MADE = "<!-- Made by docs/make_pages.py: edit the code, not this page. -->\n\n"
GROUPS = {
    "While a model trains": ["GSNRModel", "GSNRCallback", "ProgressBar", "write_tensorboard"],
    "Looking at it": ["page", "plot", "read"],
    "Measuring": ["gradient_moments", "Moments", "check_engine", "explain", "forget"],
    "What follows from moments": [
        "summarize",
        "gsnr",
        "same_sign",
        "noise_scale",
        "osgr",
        "gap_growth",
        "gap_shares",
        "gradient_diversity",
        "osgr_predicted",
        "osgr_measured",
    ],
    "Adding to it": ["register_rule"],
}


def signature(value) -> str:
    """As a call, a line per argument where it is long."""
    parts, star = [], False
    for one in inspect.signature(value).parameters.values():
        if one.kind is one.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        annotation = getattr(one.annotation, "__forward_arg__", one.annotation)
        name = f"*{one.name}" if one.kind is one.VAR_POSITIONAL else one.name
        star = star or one.kind is one.VAR_POSITIONAL
        text = name if annotation is one.empty else f"{name}: {annotation}"
        if one.default is not one.empty:
            text += f"={one.default!r}" if text == one.name else f" = {one.default!r}"
        parts.append(text)
    if len(", ".join(parts)) < 60:
        return f"({', '.join(parts)})"
    return "(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def entry(name) -> str:
    value = getattr(tf_gsnr, name)
    doc = inspect.getdoc(value)
    head, _, rest = doc.partition("\n\n")
    text = f"### `{name}`\n\n```python\ntf_gsnr.{name}{signature(value)}\n```\n\n{head}\n"
    return text + (f"\n```text\n{rest.rstrip()}\n```\n" if rest.strip() else "")


def api() -> str:
    parts = [MADE + "# The public names\n\nEach is `tf_gsnr.NAME`; what they say of themselves:\n"]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [entry(name) for name in names]
    return "\n".join(parts)


def numbers() -> str:
    rows = [
        MADE + "# The numbers\n\nWhat `GSNRModel` shows in `fit`, and `GSNRCallback` in the logs: "
        "what each is, what is usual, what to do. All are NaN where they cannot be told from zero; "
        "why is logged.\n",
        "| in `fit` | in the callback's logs | what it is | what is usual, what to do | needs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, number in shown.NUMBERS.items():
        fit = f"`{name}`" if number.in_fit else ""
        logs = f"`{shown.in_logs(number.in_records)}`" if number.in_records else ""
        cells = (text.replace("|", "\\|") for text in (number.meaning, number.advice))
        needs = "; ".join(shown.COSTS[need] for need in number.needs) or shown.COSTS[None]
        rows.append(f"| {fit} | {logs} | {' | '.join(cells)} | {needs} |")
    rows.append(
        "\nWhat `fit` takes with all of them, and without one, in times of a plain step: "
        "`python benchmarks/shown_numbers.py`. Leaving numbers out by `shown=` saves little: on "
        "two cores, at every step, `same_sign` is 0 to 11 % of a plain step, `gap_growth` 1 to "
        "9 %, `gsnr` and `gsnr_median` 0 to 2 %, most on a recommender whose step takes 2 ms."
    )
    return "\n".join(rows) + "\n"


def results() -> str:
    """The README, with the list of runs and their verdicts that stands in RESULTS.md."""
    root = HERE.parent
    lines = (root / "RESULTS.md").read_text("utf-8").splitlines()
    listed = [line for line in lines if re.match(r"- \[\w+\]\(#\w+\): ", line)]
    listed = [line.replace("](#", "](RESULTS.md#") for line in listed]
    text = (root / "README.md").read_text("utf-8")
    begin = text.index("-->", text.index("<!-- results:")) + 4
    end = text.index("<!-- /results -->")
    return text[:begin] + "\n" + "\n".join(listed) + "\n\n" + text[end:]


PAGES = {"docs/api.md": api, "docs/numbers.md": numbers, "README.md": results}

if __name__ == "__main__":
    for file, make in PAGES.items():
        (HERE.parent / file).write_text(make(), encoding="utf-8")
        print(file)
