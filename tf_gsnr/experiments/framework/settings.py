"""An experiment's settings: types, defaults, checks and help, from which the flags are made."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tf_gsnr import checks, lookup


class Range(NamedTuple):
    """Which values a setting may have: a description for the error, and a test."""

    expected: str
    holds: Callable


# float32 holds the squares, nearly, of what is between these two.
POSITIVE = Range("a positive number, 1e-20 to 1e20", lambda value: 1e-20 <= value <= 1e20)
NOT_NEGATIVE = Range("a number from 0 to 1e20", lambda value: 0 <= value <= 1e20)
PROBABILITY = Range("a probability, 0 to 1", lambda value: 0 <= value <= 1)


def at_least(low) -> Range:
    return Range(f"at least {low}", lambda value: value >= low)


class Setting(NamedTuple):
    """What a field of `Settings` is: `name: Annotated[int, Setting("what it is", at_least(1))]`.

    Attributes:
      help: of its flag, one sentence.
      check: which values it, or each entry of its list, may have.
      flag: the flag's name, where it is not the field's.
      before: an earlier name of the flag, which is still taken.
      most: the largest that an integer may be: more would only fill the memory.
    """

    help: str = ""
    check: Range | None = None
    flag: str | None = None
    before: str | None = None
    most: int = checks.LARGEST


EXAMPLES, STEPS, SEEDS = 10**8, 10**6, 10**5  # the most that can be asked for

# What means one thing in all experiments: a field of such a name needs no more.
SHARED = {
    "dataset": Setting(
        "toy (generated), mnist, cifar10 or another image-classification data set of TensorFlow "
        "Datasets; or module:function, a function of your own, (data_dir) -> ((x_train, y_train), "
        "(x_test, y_test))."
    ),
    "model": Setting(
        "Which network: a name in tf_gsnr/models.py, or module:function, a function of your own, "
        "(input_shape, outputs, width) -> keras.Model."
    ),
    "seed": Setting(
        "Of the initial weights, training sets and label noise.", at_least(0), most=2**31 - 1
    ),
    "n": Setting("Training examples.", at_least(2), most=EXAMPLES),
    "width": Setting(
        "Width of the network: p of tables 2 and 3, hidden units on toy data.",
        at_least(1),
        most=10_000,
    ),
    "p_random": Setting("Share of the labels that are replaced by random ones.", PROBABILITY),
    "learning_rate": Setting("lambda, the step of gradient descent.", POSITIVE),
    "test_size": Setting(
        "Test examples; left out: the whole test set.", at_least(1), most=EXAMPLES
    ),
    "resplit": Setting(
        "Mix the data set's training and test examples and split them anew at random, by --seed: "
        "is the test set drawn as the training set is?"
    ),
    "epochs": Setting("How many epochs to train.", at_least(1), most=STEPS),
    "every": Setting("Epochs between two measurements.", at_least(1), most=STEPS),
    "batch_size": Setting("Examples of a step of SGD.", at_least(1), most=EXAMPLES),
    "repeats": Setting("How many seeds, from --seed on.", at_least(1), most=SEEDS),
    "toy_input_scale": Setting("Toy data: inputs are uniform on +- this [ours].", POSITIVE),
    "toy_noise_scale": Setting("Toy data: noise is uniform on +- this [ours].", NOT_NEGATIVE),
}


class Field(NamedTuple):
    """A field of `Settings`, as its flag needs it.

    Attributes:
      name: of the field.
      kind: int, float, str or bool: of the value, or of the entries of its list.
      is_list: whether it is a list, through which a grid goes.
      default: as it stands in the class; None without one.
      setting: its `Setting`.
    """

    name: str
    kind: type
    is_list: bool
    default: Any
    setting: Setting

    @property
    def flag(self) -> str:
        return self.setting.flag or self.name


def fields(settings: Any) -> list[Field]:
    """The fields of a NamedTuple of settings.

    Example:

    >>> class Settings(NamedTuple):
    ...     n: list = [10, 20]
    ...     rate: typing.Annotated[float, Setting("a rate", POSITIVE)] = 0.1
    >>> [(f.flag, f.kind.__name__, f.is_list, f.setting.help) for f in fields(Settings)]
    [('n', 'int', True, 'Training examples.'), ('rate', 'float', False, 'a rate')]
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    return [_field(name, hints[name], settings) for name in settings._fields]


def _field(name, hint, settings):
    default, setting = settings._field_defaults.get(name), SHARED.get(name, Setting())
    for extra in getattr(hint, "__metadata__", ()):
        setting = extra if isinstance(extra, Setting) else setting
    hint = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    is_list = (typing.get_origin(hint) or hint) is list
    if is_list:
        entries = typing.get_args(hint) or [type(v) for v in default or [""]]
        hint = entries[0]
    return Field(name, hint if hint in (int, float, str, bool) else str, is_list, default, setting)


def complete(settings: Any, given: dict, defaults: dict | None = None):
    """Fills a NamedTuple of settings.

    Args:
      settings: the NamedTuple's class.
      given: from the flags; None counts as not given. A list of one value will do where the
        field is a single value, and a single value where it is a list. What stands in a list twice
        is taken once.
      defaults: a value for each field that is not given and has no default of its own.

    Raises:
      ValueError: a value of another type or out of its range, none or several where one is
        expected, or a name that no field has; it names the flag.

    Example:

    >>> class Settings(NamedTuple):
    ...     n: int
    ...     steps: int = 10
    >>> complete(Settings, dict(n=[5], steps=None))
    Settings(n=5, steps=10)
    >>> complete(Settings, dict(n=1))
    Traceback (most recent call last):
    ValueError: --n=1: expected at least 2
    """
    known = {field.name: field for field in fields(settings)}
    for name, value in given.items():
        if name not in known:
            meant = lookup.suggestion(name, known)
            raise ValueError(
                f"{name}={checks.shown(value)}: there is no such setting{meant}; expected one of "
                f"{', '.join(known)}"
            )
    values = settings._field_defaults | (defaults or {})
    values |= {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if value is not None and name in known:
            values[name] = _checked(known[name], value)
    return settings(**values)


def value_of(settings: Any, given: dict, name: str) -> Any:
    """One of the values given, checked; None where it is not given."""
    field = next(field for field in fields(settings) if field.name == name)
    return None if given.get(name) is None else _checked(field, given[name])


def at_most(settings: Any, given: dict, name: str, other: str):
    """Raises ValueError where the first of two settings is given and larger than the other."""
    flags = {field.name: f"--{field.flag}" for field in fields(settings)}
    value, most = getattr(settings, name), getattr(settings, other)
    if given.get(name) is not None and value > most:
        raise ValueError(f"{flags[name]}={value}: expected at most {flags[other]}={most}")


def grid(**axes) -> list[dict]:
    """Every configuration of these values, the last axis running fastest.

    >>> grid(n=[10, 20], seed=range(2))[1:3]
    [{'n': 10, 'seed': 1}, {'n': 20, 'seed': 0}]
    """
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def seeds(settings: Any) -> range:
    """Those of a run: --repeats of them, from --seed on."""
    return range(settings.seed, settings.seed + settings.repeats)


def _checked(field, value):
    """The value of a field, or a list of them, of its type and in its range."""
    flag, check = f"--{field.flag}", field.setting.check
    several = isinstance(value, (list, tuple, range)) or np.ndim(value) == 1
    if isinstance(value, str) and field.is_list:
        value, several = value.split(","), True
    values = list(value) if several else [value]
    if not values or len(values) > 1 and not field.is_list:
        count = "several" if field.is_list else "this experiment takes one value"
        checks.refuse(flag, value, f"{count}, at least one" if field.is_list else count)
    entries = [_entry(flag, field, entry, check) for entry in values]
    return list(dict.fromkeys(entries)) if field.is_list else entries[0]


def _entry(flag, field, value, check):
    if field.kind is bool:
        return checks.boolean(flag, value)
    if field.kind is str:
        value, given = checks.plain(value), value
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            checks.refuse(flag, given, "a name")
        expected = "a name"
    elif field.kind is int:
        expected = f"an integer, {check.expected}" if check else "an integer"
        value = checks.integer(flag, value, most=field.setting.most, expected=expected)
    else:
        expected = check.expected if check else "a finite number"
        value = checks.number(flag, value, expected)
    if check is not None and not check.holds(value):
        raise ValueError(f"{flag}={checks.shown(value)}: expected {check.expected}")
    return value
