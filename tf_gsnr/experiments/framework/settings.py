"""An experiment's settings: what is given, completed by defaults and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Which values a setting may have: a description for the error, and a test."""

    expected: str
    holds: Callable


POSITIVE = Range("a positive number", lambda value: value > 0)
PROBABILITY = Range("a probability, 0 to 1", lambda value: 0 <= value <= 1)


def at_least(low) -> Range:
    return Range(f"at least {low}", lambda value: value >= low)


def complete(settings: Any, given: dict, defaults: dict, **ranges: Range):
    """Fills a NamedTuple of settings.

    Args:
      settings: the NamedTuple's class.
      given: from the flags; None and [] count as not given. A list of one value will do where the
        default is a single value (the flag serves another experiment as a grid).
      defaults: a value for each field that is not given and has no default of its own.
      **ranges: for a field, the values that it, or each entry of its list, may have.

    Raises:
      ValueError: a value out of its range, or several where one is expected; it names the flag.

    Example:

    >>> class Settings(NamedTuple):
    ...     n: int
    ...     steps: int = 10
    >>> complete(Settings, dict(n=[5], steps=None), {}, n=at_least(2))
    Settings(n=5, steps=10)
    """
    given = {name: value for name, value in given.items() if value not in (None, [])}
    defaults = settings._field_defaults | defaults
    for name, value in given.items():
        if isinstance(value, list) and not isinstance(defaults.get(name), list):
            if len(value) != 1:
                raise ValueError(f"--{name}={value}: this experiment takes one value")
            given[name] = value[0]
    chosen = settings(**defaults | given)
    for name, range_ in ranges.items():
        value = getattr(chosen, name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not range_.holds(entry):
                raise ValueError(f"--{name}={entry}: expected {range_.expected}")
    return chosen
