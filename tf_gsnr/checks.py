"""Checks of arguments that many functions share."""

from __future__ import annotations

import numbers
import os

import numpy as np


def boolean(name: str, value):
    """Raises ValueError unless the value is True or False.

    >>> boolean("training", "False")
    Traceback (most recent call last):
    ValueError: training='False': expected True or False
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r}: expected True or False")


def integer(name: str, value):
    """Raises ValueError unless the value is a whole number.

    >>> integer("seed", 0.5)
    Traceback (most recent call last):
    ValueError: seed=0.5: expected an integer
    """
    if not _is_integer(value):
        raise ValueError(f"{name}={value!r}: expected an integer")


def positive_integer(name: str, value, more: str = ""):
    """Raises ValueError unless the value is a whole number from 1 on.

    Args:
      more: what the message adds.

    >>> positive_integer("every", 0)
    Traceback (most recent call last):
    ValueError: every=0: expected a positive integer
    """
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer{more}")


def number(name: str, value, *, positive: bool = False):
    """Raises ValueError unless the value is a finite number from 0 on, or above 0.

    >>> number("learning_rate", -1)
    Traceback (most recent call last):
    ValueError: learning_rate=-1: expected a number from 0 on
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not (real and (0 < value if positive else 0 <= value) and value < float("inf")):
        expected = "a positive number" if positive else "a number from 0 on"
        raise ValueError(f"{name}={value!r}: expected {expected}")


def path(name: str, value):
    """Raises ValueError unless the value names a file or a directory.

    >>> path("run_dir", 3)
    Traceback (most recent call last):
    ValueError: run_dir=3: expected a path, a text or a pathlib.Path
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError(f"{name}={value!r}: expected a path, a text or a pathlib.Path")


def instance(name: str, value, kind: type, expected: str):
    """Raises ValueError unless the value is of this class.

    >>> instance("moments", 3, list, "a tf_gsnr.Moments")
    Traceback (most recent call last):
    ValueError: moments=3: expected a tf_gsnr.Moments, got int
    """
    if not isinstance(value, kind):
        shown = repr(value) if len(repr(value)) < 60 else "..."
        raise ValueError(f"{name}={shown}: expected {expected}, got {type(value).__name__}")


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
