"""An experiment's settings: types, defaults, checks and help, from which the flags are made."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Which values a setting may have: a description for the error, and a test."""

    expected: str
    holds: Callable


POSITIVE = Range("a positive number", lambda value: 0 < value < float("inf"))
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
    """

    help: str = ""
    check: Range | None = None
    flag: str | None = None
    before: str | None = None


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
    "seed": Setting("Of the initial weights, training sets and label noise.", at_least(0)),
    "n": Setting("Training examples.", at_least(2)),
    "width": Setting(
        "Width of the network: p of tables 2 and 3, hidden units on toy data.", at_least(1)
    ),
    "p_random": Setting("Share of the labels that are replaced by random ones.", PROBABILITY),
    "learning_rate": Setting("lambda, the step of gradient descent.", POSITIVE),
    "test_size": Setting("Test examples; left out: the whole test set.", at_least(1)),
    "epochs": Setting("How many epochs to train.", at_least(1)),
    "every": Setting("Epochs between two measurements.", at_least(1)),
    "batch_size": Setting("Examples of a step of SGD.", at_least(1)),
    "repeats": Setting("How many seeds, from --seed on.", at_least(1)),
    "toy_input_scale": Setting("Toy data: inputs are uniform on +- this [ours].", POSITIVE),
    "toy_noise_scale": Setting("Toy data: noise is uniform on +- this [ours].", at_least(0)),
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


def complete(settings: Any, given: dict, defaults: dict | None = None, **checks: Range):
    """Fills a NamedTuple of settings.

    Args:
      settings: the NamedTuple's class.
      given: from the flags; None and [] count as not given. A list of one value will do where the
        field is a single value. What stands in a list twice is taken once.
      defaults: a value for each field that is not given and has no default of its own.
      **checks: for a field, the values that it, or each entry of its list, may have, where its
        `Setting` does not say it.

    Raises:
      ValueError: a value out of its range, or several where one is expected; it names the flag.

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
    given = {name: value for name, value in given.items() if value not in (None, [])}
    defaults = settings._field_defaults | (defaults or {})
    known = {field.name: field for field in fields(settings)}
    for name, value in given.items():
        if not isinstance(value, list):
            continue
        if known[name].is_list:
            given[name] = list(dict.fromkeys(value))
        elif len(value) == 1:
            given[name] = value[0]
        else:
            raise ValueError(f"--{known[name].flag}={value}: this experiment takes one value")
    chosen = settings(**defaults | given)
    for name, field in known.items():
        check, value = checks.get(name, field.setting.check), getattr(chosen, name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and check is not None and not check.holds(entry):
                raise ValueError(f"--{field.flag}={entry}: expected {check.expected}")
    return chosen
