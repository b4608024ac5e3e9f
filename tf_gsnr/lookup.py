"""A flag's value -> the user's own code that it names: a module, or `module:function`.

Modules are found as Python finds them: `python -m` looks in the current directory, too.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType


def is_reference(value: str) -> bool:
    """Whether a value reads `module:function`.

    >>> is_reference("my_package.nets:small_cnn"), is_reference("mnist:3.0.1")
    (True, False)
    """
    module, _, function = value.partition(":")
    return all(map(str.isidentifier, [*module.split("."), function]))


def suggestion(name: str, known) -> str:
    """What a mistyped name may have been meant to be, to be put into an error; or nothing.

    >>> suggestion("ogsr", ["osgr", "weights"]), suggestion("x", ["osgr"])
    (" (did you mean 'osgr'?)", '')
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def module(flag: str, name: str, value: str | None = None) -> ModuleType:
    """Imports the module that a flag names.

    Args:
      flag: the flag's name, for the error.
      name: of the module.
      value: the flag's whole value, if it is more than the module's name.

    Raises:
      ValueError: there is no such module. What the module itself raises comes through as it is.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and imports something that is not
        raise ValueError(
            f"--{flag}={value or name}: there is no module {error.name!r}, neither in the current "
            "directory nor among the installed packages; expected one that Python finds"
        ) from None


def function(flag: str, value: str, parameters: tuple[str, ...]) -> Callable:
    """The function that `module:function` names.

    Args:
      flag: the flag's name, for the error.
      value: its value.
      parameters: what the function is called with, in order.

    Raises:
      ValueError: no such module, no such function, or one that takes something else.

    Example:

    >>> function("model", "math:hypot", ("x", "y"))(3, 4)
    5.0
    """
    name, _, attribute = value.partition(":")
    home = module(flag, name, value)
    call = f"{attribute}({', '.join(parameters)})"
    found = getattr(home, attribute, None)
    if not callable(found):
        there = [k for k, v in vars(home).items() if inspect.isfunction(v) and v.__module__ == name]
        raise ValueError(
            f"--{flag}={value}: module {name!r} has no function {attribute!r}; it has: "
            f"{', '.join(there) or 'none'}. Expected a function to be called as {call}"
        )
    try:
        inspect.signature(found).bind(*parameters)
    except TypeError as error:
        raise ValueError(f"--{flag}={value}: cannot be called as {call}: {error}") from None
    except ValueError:
        pass  # written in C, it does not tell what it takes
    return found
