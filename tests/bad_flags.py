"""A table of bad values of the flags of every experiment, and what comes of each.

Each is parsed and planned as the command does it, in this process, with one flag wrong. Wanted is
the exit code of a wrong call and a line that names the flag: "clear". Made from the settings'
types, so that a new flag is among them.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

import numpy as np
from absl.testing import flagsaver

import tf_gsnr.main as program
from tf_gsnr import experiments
from tf_gsnr.experiments.framework.settings import fields

CLASSES = ["--dataset=bad_flags:blobs", "--n=20"]  # of the others
SMALL = {
    "jagged": ["--dataset=bad_flags:blobs", "--n=40", "--probe=5", "--batch_size=1"],
    "ranking": [*CLASSES, "--batch_size=5"],
    "gap": [*CLASSES, "--model=logistic_regression", "--batch_size=5", "--folds=2"],
    "osgr": ["--dataset=toy", "--n=20", "--width=4", "--training_sets=2", "--test_size=50"],
    "freezing": ["--n=20"],
    "weights": ["--dataset=toy", "--n=20", "--width=4", "--epochs=4"],
}
NUMBERS = ["", "x", "nan", "inf", "-inf", "1e400", "0x", "1,,2", "--", "[]", "None", "true", " "]
BAD = {
    int: [*NUMBERS, "1.5", "-1", "1e3", "99999999999999999999", "1;2", "1 2"],
    float: [*NUMBERS, "-1", "1;2", "0.1 0.2", "1/2"],
    bool: ["", "x", "2", "nan", "yes please", "0.5"],
    str: ["", " ", "no_such_thing", "a:b:c", "../x", "no_module:function", "1"],
}
OTHERS = {
    "experiment": ["", " ", "ogsr", "osgr,weights", "no.such.module", "1", "../x"],
    "engine": ["", "x", "layerwize", "1", "auto,vectorized"],
    "jit_compile": ["", "x", "True?", "2"],
    "replicas": [*BAD[int], "0"],
    "strategy": ["", "x", "mirror", "1"],
    "shard": ["", "x", "1", "1/", "/2", "2/2", "-1/2", "1/0", "0.5/2", "a/b", "1/2/3"],
    "on_divergence": ["", "x", "skip,stop", "1"],
    "name": ["../x", "/abs", ".", "..", "a/b", "x/"],
    "overwrite": BAD[bool],
    "dry_run": BAD[bool],
    "deterministic": BAD[bool],
    "list": BAD[bool],
    "replay": ["", " ", "no/such/run", "1"],
    "data_dir": [],
}


def blobs(data_dir):
    """Classes, for the experiments that need them."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[40, 4, 4, 1]), np.arange(40) % 3
    return (x, y), (x, y)


def cases() -> Iterator[tuple]:
    """`(experiment, flag, value)`."""
    for name in experiments.EXPERIMENTS:
        for field in fields(experiments.load(name).Settings):
            for value in BAD[field.kind]:
                if not _is_right(field, value):
                    yield name, field.flag, value
    for flag, values in OTHERS.items():
        for value in values:
            yield "osgr", flag, value


def _is_right(field, value) -> bool:
    """Whether a value of the table is one that this setting may have."""
    if field.flag in ("dataset", "model") and value == " ":
        return False
    check = field.setting.check
    if field.kind in (int, float) and re.fullmatch(r"-?[0-9.e]+", value):
        try:
            number = field.kind(value)
        except ValueError:
            return False
        return check is None or check.holds(number)
    return False


def outcome(case) -> str:
    """ "clear", or what happened."""
    name, flag, value = case
    argv = ["main.py", f"--experiment={name}", *SMALL.get(name, CLASSES), f"--{flag}={value}"]
    if flag in ("n", "p_random", "width", "at_epochs", "model", "dataset"):
        argv = [a for a in argv if not a.startswith(f"--{flag}=") or a.endswith(f"={value}")]
    said = io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stderr(said):
        try:
            program.plan(program.parse_flags(argv))
            return "silent"
        except SystemExit as error:
            text, code = said.getvalue(), error.code
        except ValueError as error:  # which the program makes exit code 2 and a line
            text, code = str(error), program.USAGE
        except Exception as error:
            return f"foreign: {type(error).__name__}: {str(error)[:100]}"
    if code != program.USAGE:
        return f"exit code {code}: {text[:100]}"
    named = flag in text or flag.replace("_", " ") in text
    return "clear" if named else f"does not name it: {text[:120]}"
