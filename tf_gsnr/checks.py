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
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected an integer")


def positive_integer(name: str, value, more: str = ""):
    """Raises ValueError unless the value is a whole number from 1 on.

    Args:
      more: what the message adds.

    >>> positive_integer("every", 0)
    Traceback (most recent call last):
    ValueError: every=0: expected a positive integer
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer{more}")
