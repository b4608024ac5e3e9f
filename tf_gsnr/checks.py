"""Checks of arguments that many functions share."""

from __future__ import annotations

import numbers

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


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
