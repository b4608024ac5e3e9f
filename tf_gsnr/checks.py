"""Checks of arguments that many functions share: one for each kind.

Each raises ValueError, one line that names the argument, its value and what is expected, and
returns the value as a plain Python one. Numbers of numpy, 0-d arrays and scalar tensors count as
numbers.
"""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import Any

import numpy as np

from tf_gsnr import lookup

LARGEST = 2**63 - 1  # that an integer of numpy or TensorFlow can be


def shown(value) -> str:
    """The value in a message: on one line, and not longer than one wants to read.

    >>> shown("9" * 100), shown(np.zeros([3, 4]))
    ("'999999999999999999999999999999...99999999'", 'array [3, 4] of float64')
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape and hasattr(value, "dtype"):
        return f"array {list(shape)} of {value.dtype}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a repr of the user's raises
        text = f"a {type(value).__name__}"
    return text if len(text) < 81 else f"{text[:31]}...{text[-9:]}"


def refuse(name: str, value, expected: str):
    """Raises the ValueError that all of these raise."""
    raise ValueError(f"{name}={shown(value)}: expected {expected}")


def boolean(name: str, value) -> bool:
    """True or False.

    >>> boolean("training", "False")
    Traceback (most recent call last):
    ValueError: training='False': expected True or False
    """
    value, given = plain(value), value
    if not isinstance(value, bool):
        refuse(name, given, "True or False")
    return value


def integer(
    name: str, value, least: int | None = None, most: int = LARGEST, expected: str = "an integer"
) -> int:
    """A whole number.

    Args:
      least, most: its range; without a least one, also that below zero.
      expected: what the message calls it.

    >>> integer("seed", 0.5)
    Traceback (most recent call last):
    ValueError: seed=0.5: expected an integer
    """
    value, given = plain(value), value
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        refuse(name, given, expected)
    if not (-most if least is None else least) <= value <= most:
        above = "" if value <= most else f" of at most {most:,}"
        below = f" from {least} on" if least is not None and str(least) not in expected else ""
        positive = "positive" in expected
        refuse(name, given, expected + (above or ("" if positive else below)))
    return int(value)


def positive_integer(name: str, value, more: str = "", most: int = LARGEST) -> int:
    """A whole number from 1 on.

    Args:
      more: what the message adds.

    >>> positive_integer("every", 0)
    Traceback (most recent call last):
    ValueError: every=0: expected a positive integer
    """
    return integer(name, value, 1, most, f"a positive integer{more}")


def number(name: str, value, expected: str = "a number", holds=lambda value: True) -> float:
    """A finite real number.

    Args:
      expected: what the message calls it.
      holds: whether it is in range.

    >>> number("learning_rate", -1, "a positive number", lambda value: value > 0)
    Traceback (most recent call last):
    ValueError: learning_rate=-1: expected a positive number
    """
    value, given = plain(value), value
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not _is_finite(value) or not holds(value):
        refuse(name, given, expected)
    return float(value)


def _is_finite(value) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def plain(value) -> Any:
    """The Python value of a numpy scalar, a 0-d array or a scalar tensor; others as they are."""
    if isinstance(value, (bool, int, float, str)) or isinstance(value, type):
        return value
    if isinstance(value, np.generic):
        return value.item()
    shape = getattr(value, "shape", None)
    if shape is None or callable(shape) or not hasattr(value, "__array__"):
        return value
    try:
        return np.asarray(value).item() if len(shape) == 0 else value
    except Exception:  # a tensor of a graph has no value yet
        return value


def choice(name: str, value, known) -> Any:
    """One of some names.

    >>> choice("pool", "epoc", ["epoch", "batch"])
    Traceback (most recent call last):
    ValueError: unknown pool 'epoc' (did you mean 'epoch'?); available: epoch, batch
    """
    if not isinstance(value, str) or value not in known:
        meant = lookup.suggestion(value, known) if isinstance(value, str) else ""
        raise ValueError(f"unknown {name} {shown(value)}{meant}; available: {', '.join(known)}")
    return value


def one_of(name: str, value, known: tuple) -> Any:
    """One of some constants, such as "float32", True or None.

    >>> one_of("keep", "all", ("gsnr", None))
    Traceback (most recent call last):
    ValueError: keep='all': expected 'gsnr' or None
    """
    value, given = plain(value), value
    if not any(type(value) is type(one) and value == one for one in known):
        *most, last = map(repr, known)
        refuse(name, given, f"{', '.join(most)} or {last}")
    return value


def names(name: str, value, known, expected: str) -> tuple:
    """A list or tuple of names, each once.

    Args:
      known: `name -> bool`, whether it is one.
      expected: what the message says of them.

    >>> names("shown", "gsnr", lambda one: True, "names of numbers")
    Traceback (most recent call last):
    ValueError: shown='gsnr': expected names of numbers
    """
    if not isinstance(value, (list, tuple, set, frozenset)):
        refuse(name, value, expected)
    for one in value:
        if not isinstance(one, str) or not known(one):
            raise ValueError(f"{name}={shown(value)}: unknown {shown(one)}; expected {expected}")
    if len(set(value)) < len(value):
        raise ValueError(f"{name}={shown(value)}: a name stands there twice; expected {expected}")
    return tuple(value)


def path(name: str, value, what: str = "a directory") -> Path:
    """The path of a file or directory.

    >>> path("run_dir", "")
    Traceback (most recent call last):
    ValueError: run_dir='': expected the path of a directory
    """
    text: Any = os.fspath(value) if isinstance(value, (str, os.PathLike)) else b""
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        refuse(name, value, f"the path of {what}")
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in Path(text).parts):
        refuse(name, value, f"the path of {what}; a name may have 255 bytes")
    return Path(text)


def file(name: str, value, what: str = "a file") -> Path:
    """The path of a file that can be written: no directory, and below no file."""
    found = path(name, value, what)
    if found.is_dir():
        refuse(name, value, f"the path of {what}; it is a directory")
    return below_no_file(name, found, what)


def directory(name: str, value, what: str = "a directory") -> Path:
    """The path of a directory that is there or can be made."""
    return below_no_file(name, path(name, value, what), what)


def below_no_file(name: str, found: Path, what: str) -> Path:
    """The path, if what it is to be in is no file."""
    inside = (found, *found.parents) if "directory" in what else found.parents
    for one in inside:
        if one.exists():
            if not one.is_dir():
                refuse(name, str(found), f"the path of {what}; {str(one)!r} is a file")
            break
    return found


def instance(name: str, value, kind, expected: str) -> Any:
    """An object of a class, or of one of several.

    >>> instance("logs", 5, dict, "a dict of numbers, or None")
    Traceback (most recent call last):
    ValueError: logs=5: expected a dict of numbers, or None
    """
    if not isinstance(value, kind):
        refuse(name, value, expected)
    return value


def function(name: str, value, arguments: int, expected: str) -> Any:
    """Something that can be called with so many arguments.

    >>> function("rule", len, 1, "a function of one call") is len
    True
    """
    import inspect

    if not callable(value):
        refuse(name, value, expected)
    try:
        inspect.signature(value).bind(*[None] * arguments)
    except TypeError as error:
        raise ValueError(f"{name}={shown(value)}: expected {expected}; {error}") from None
    except ValueError:
        pass  # written in C, it does not tell what it takes
    return value


def keras_model(value, name: str = "model") -> Any:
    """A Keras model, built or not."""
    import keras

    if not isinstance(value, keras.Model):
        kind = f"got {type(value).__name__}"
        raise ValueError(f"{name}={shown(value)}: expected a keras.Model, {kind}")
    return value


def array(name: str, value, expected: str, holds=lambda array: True, finite: bool = True) -> Any:
    """Numbers as a float64 array.

    Args:
      expected: what the message says of them.
      holds: whether the array has the right shape.
      finite: whether NaN and infinity are refused.

    >>> array("losses", [1.0, float("nan")], "[n] numbers")
    Traceback (most recent call last):
    ValueError: losses: expected [n] numbers, got NaN or infinity among them
    """
    try:
        found = np.asarray(value)
    except Exception:  # ragged lists, tensors of a graph, whatever an __array__ raises
        refuse(name, value, expected)
    if found.dtype.kind not in "iuf" or found.size == 0:
        refuse(name, value, expected)
    found = found.astype(np.float64)
    if not holds(found):
        raise ValueError(f"{name} has shape {found.shape}; expected {expected}")
    if finite and not np.isfinite(found).all():
        raise ValueError(f"{name}: expected {expected}, got NaN or infinity among them")
    return found


def floating(name: str, dtype) -> Any:
    """The `tf.DType` of floating-point numbers that this names."""
    import tensorflow as tf

    try:
        found = tf.as_dtype(dtype) if isinstance(dtype, (str, type, tf.DType, np.dtype)) else None
    except TypeError:
        found = None
    if found is None or not found.is_floating:
        refuse(name, dtype, "a dtype of floating-point numbers, such as 'float32'")
    return found
