"""A table of bad values for every flag of the binaries; see `bad_arguments.py`.

What is wanted of each is exit code 2 and a line that names the flag, before anything is written.
All is tried in this process: flags are parsed, and a run is planned, which does not run it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl.testing import flagsaver
from bad_arguments import Fine

import tf_gsnr.main as program
from tf_gsnr import __main__ as door
from tf_gsnr import experiments
from tf_gsnr.experiments.framework.settings import fields
from tf_gsnr.report import __main__ as report

HUGE = "1" + "0" * 30
# Flags with which each experiment can be planned at once.
GOOD = {
    "osgr": "--dataset=toy --width=4 --training_sets=2 --n=20 --at_epochs=0,2 --p_random=0",
    "dynamics": "--dataset=bad_flags:classes --model=logistic_regression --n=20 --epochs=2",
    "freezing": "--n=20 --steps=4 --every_steps=2 --repeats=1 --test_size=40",
    "gap": "--dataset=toy --model=toy_mlp --n=20 --width=4 --batch_size=5 --epochs=2 --twins=2",
    "jagged": "--dataset=bad_flags:classes --model=logistic_regression --n=40 --batch_size=1 "
    "--probe=20 --epochs=2",
    "ranking": "--dataset=bad_flags:classes --model=logistic_regression --n=20 --batch_size=5 "
    "--epochs=2 --early_epochs=1",
    "weights": "--dataset=toy --n=20 --width=4 --epochs=4 --every=2 --term_every=2 --repeats=1",
}
INT = ["", " ", "x", "1.5", "nan", "inf", "-inf", "-1", "1e3", HUGE, "-" + HUGE, "True", "None"]
INT += ["0b11", "½", "1;2", "[1]", "--3", "9" * 5000, "12345678901", "1 2", "=5", "'5'"]
FLOAT = ["", " ", "x", "nan", "inf", "-inf", "-1", "1e400", "1e300", "True", "None"]
FLOAT += ["0.1.2", "0,1x", "½", "[0.1]", "1/2", "10%", "-0.001", "0x1p3", "1e"]
LIST = [",", "1,,2", "1,x", "1,", ",1", "1 2,x", "1,nan", "1,inf", "1,-1", f"1,{HUGE}"]
BOOL = ["", "x", "2", "nan", "Fals", "0.0", "None", "-1", "[True]"]
NAME = ["", " ", "nonsense", "no.such:function", "math:nothing", "math:sqrt", "../x", "a:b:c", ":"]
NAME += ["a\0b", "5", "x" * 300, "os:", ":sqrt", "a\nb"]
DIRECTORY = ["", " ", "a\0b"]


class Attempt(NamedTuple):
    """Arguments, one of them bad.

    Attributes:
      binary: which, "osgr" and so on for an experiment.
      flag: the bad one.
      arguments: all.
      fine: why it is no error, if it is none.
    """

    binary: str
    flag: str
    arguments: tuple
    fine: str = ""

    def __str__(self):
        return f"{self.binary} {self.arguments[-1]!r:.60}"


def classes(data_dir):
    """A small data set with classes."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[40, 4, 4, 1]), np.arange(40) % 3
    return (x, y), (x, y)


def outcome(attempt: Attempt) -> tuple[str, str]:
    """`(verdict, message)`: as in `bad_arguments`."""
    run = {"report": _report, "page": _door, "list": _door}.get(attempt.binary, _plan)
    said, code, threw = io.StringIO(), 0, ""
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            with flagsaver.flagsaver():
                run(attempt)
        except SystemExit as error:
            code = error.code
        except Exception:  # a traceback, which no bad flag may end in
            threw = traceback.format_exc().splitlines()[-1]
    text = threw or said.getvalue().strip()
    if not threw and not code:
        return ("accepted" if attempt.fine else "silent"), ""
    line = any(attempt.flag in line for line in text.splitlines())
    clear = not threw and code == program.USAGE and line and len(text) < 1500
    return ("clear" if clear else "foreign"), f"{code} {text}"


def _plan(attempt):
    argv = ["main.py", *attempt.arguments]
    with flagsaver.flagsaver():
        try:
            program.plan(program.parse_flags(argv))
        except (ValueError, OSError) as error:  # as `main` does
            usage = isinstance(error, ValueError) and program.USAGE
            program.progress.stop(f"error: {error}", usage or 1)


def _report(attempt):
    report.main(report.parse_flags(["report", *attempt.arguments]))


def _door(attempt):
    door.main(list(attempt.arguments))


@functools.cache
def all_attempts() -> tuple[Attempt, ...]:
    """The table, made once."""
    attempts = []
    for name in experiments.EXPERIMENTS:
        good = [f"--experiment={name}", *GOOD[name].split()]
        for field in fields(experiments.load(name).Settings):
            attempts += tries(name, good, field.flag, values_of(field, good))
    return (*attempts, *of_program(), *of_report(), *of_door())


def tries(binary, good, flag, values) -> list[Attempt]:
    """`--flag=value` after good flags, for each value."""
    attempts = []
    for given in values:
        value, fine = given if isinstance(given, Fine) else (given, "")
        attempts.append(Attempt(binary, flag, (*good, f"--{flag}={value}"), fine))
    return attempts


def values_of(field, good) -> list:
    """Bad values of a setting's flag; and, in other words, the good one that it has there."""
    fine = dict(flag[2:].split("=") for flag in good).get(field.flag, "5" if field.is_list else "2")
    kinds = {int: INT, float: FLOAT, bool: BOOL, str: NAME}
    values = list(kinds[field.kind])
    if field.kind is int and field.name not in ("seed", "epochs", "term_every"):
        descent = field.name == "batch_size" and field.is_list and "--experiment=gap" in good
        values.append(Fine("0", "full-batch descent") if descent else "0")
    if field.is_list:
        values += LIST
        values += (
            []
            if field.kind is str
            else [Fine("0.5,0.5" if field.kind is float else f"{fine},{fine}", "once")]
        )
    elif field.kind in (int, float):
        values += ["1,2", "0.1,0.2"]
    if field.kind is str and field.name == "model":
        values += ["mlp,nonsense", "keras.models:Sequential", "bad_flags:classes"]
    if field.kind is int:
        values.append(Fine(f"+{fine}", "as Python reads it"))
    if field.name == "batch_size" and field.flag == "batch_size":
        values.append("21")  # more than there are
    if field.name in ("every", "term_every"):
        values.append("1000")  # no measurement but the first
    return values


def of_program() -> list[Attempt]:
    good = ["--experiment=osgr", *GOOD["osgr"].split()]
    name = ["", ".", "..", "a/b", "/abs", "../x", "a\0b", "x" * 300, " ", "a\nb", "~/x", "-", "a/"]
    of_flag = {
        "experiment": [*NAME, "OSGR", "osgr,weights", "math"],
        "data_dir": [*DIRECTORY, "/etc/passwd", "/etc/passwd/x"],
        "runs_dir": [*DIRECTORY, "/etc/passwd", "/etc/passwd/x"],
        "name": name,
        "overwrite": [*BOOL],
        "dry_run": BOOL,
        "list": BOOL,
        "engine": ["", " ", "AUTO", "auto,layerwise", "nan", "1", "None", "layerwize"],
        "jit_compile": ["", "x", "True ", "1", "None", "nan", "yes"],
        "strategy": ["", "x", "None", "1", "mirrored,none", "nan"],
        "on_divergence": ["", "x", "None", "1", "nan"],
        "replicas": [v for v in INT if v != ""] + ["", "0"],
        "shard": ["", "x", "1", "0/0", "1/1", "-1/2", "0/-2", "0.5/2", "0/x", "1/2/3", f"0/{HUGE}x"]
        + ["nan/2", "/", "0/", "/2", "5/9", f"{HUGE}/{HUGE}0", "inf/inf"],
        "flagfile": ["", "nowhere.flags", "/", "/etc", "/etc/shadow/x", "/dev/zero", "/dev/null"]
        + [" ", sys.executable],
        "widht": ["3"],
    }
    attempts = [
        one for flag, values in of_flag.items() for one in tries("main", good, flag, values)
    ]
    strays = ["stray", "", "n=5", "-", "toy"]
    attempts += [Attempt("main", "unexpected arguments", (*good, value)) for value in strays]
    return attempts + [Attempt("main", "learning_rate", (*good, "--learning_rate"))]


def of_report() -> list[Attempt]:
    runs = tempfile.mkdtemp()
    Path(runs, "file").write_text("x")
    good = [runs]
    of_flag = {
        "output": ["", " ", "a\0b", runs, f"{runs}/file/x.md", "x.html", "/"],
        "figures": ["", "a\0b", "docs"],
        "html": ["", " ", "a\0b", runs, f"{runs}/file/x.html", "/"],
        "experiments": ["", " ", "nonsense", "no.such.module", "a\0b", "5", "a b", "math:sqrt"],
        "format": ["", "x", "HTML", "1", "html,csv", "None"],
        "otput": ["x"],
    }
    return [one for flag, values in of_flag.items() for one in tries("report", good, flag, values)]


def of_door() -> list[Attempt]:
    return [
        Attempt("page", "page", ("page", "")),
        Attempt("page", "page", ("page",)),
        Attempt("page", "page", ("page", "--otput=x")),
        Attempt("page", "page", ("page", "a\0b")),
        Attempt("page", "", ("pgae",)),
        Attempt("list", "list", ("list", "")),
        Attempt("list", "list", ("list", "/etc/passwd")),
        Attempt("list", "list", ("list", "nowhere")),
        Attempt("list", "list", ("list", "--otput=x")),
        Attempt("list", "list", ("list", "a", "b")),
        Attempt("list", "help", ("help", "x")),
    ]
