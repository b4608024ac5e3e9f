"""The registry of rules: from a layer's input and output gradient to its per-example gradients.

A rule is a function of one `capture.Call`. Rules are only about speed: a layer without one falls
back on its own vector-Jacobian product for each example (`fallback`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import keras

from tf_gsnr import checks


class Rule(NamedTuple):
    """A rule and what it needs.

    Attributes:
      function: `Call -> [(variable, form), ...]`, or None where it does not apply to this call.
      activation: the layer's attribute that holds an activation which its `call` applies last;
        `call.dz` is then the gradient before it.
    """

    function: Callable
    activation: str | None = None


_RULES: dict[type, Rule] = {}
_version = 0


def version() -> int:
    """A number that is another after each registration: what was traced before does not know it."""
    return _version


def register_rule(layer_class: type, *, activation: str | None = None) -> Callable:
    """Decorator that registers a function as the rule of a layer class.

    The rule holds for subclasses too, unless they override `call`. A later registration replaces
    an earlier one.

    Args:
      layer_class: a subclass of `keras.layers.Layer`.
      activation: name of the attribute that holds the layer's activation function, if its `call`
        ends by applying it; the rule is then given the gradient at the activation's input.

    The rule takes a `call` with
      call.layer: the layer,
      call.x: its input (`call.args`, `call.kwargs`: all that it was called with),
      call.dz: the gradient of the summed losses at its output; both have `call.n * call.fold`
        rows, the rows of an example side by side,
    and returns a list of `(variable, form)` with a form of `tf_gsnr.gradients.forms`, or None if
    it does not apply, whereupon the layer is measured without a rule.

    Raises:
      TypeError: `layer_class` is not a Keras layer class.
      ValueError: `activation` is no name; what is decorated is no function of one argument.

    Example: a layer that multiplies each feature by a weight.

    >>> import keras, tensorflow as tf
    >>> from tf_gsnr.gradients import forms, rules
    >>> class Scale(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.scale = self.add_weight(shape=[shape[-1]], initializer="ones")
    ...     def call(self, x):
    ...         return x * self.scale
    >>> @rules.register_rule(Scale)
    ... def scale(call):
    ...     g = forms.per_example(call, call.x * call.dz)  # [n, ..., features]
    ...     return [(call.layer.scale, forms.elementwise(g, call.layer.scale))]
    >>> rules.rule_of(Scale()).function is scale
    True
    """
    if not (inspect.isclass(layer_class) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(
            f"register_rule(layer_class={checks.shown(layer_class)}): expected a subclass of "
            "keras.layers.Layer"
        )
    if activation is not None and not (isinstance(activation, str) and activation.isidentifier()):
        checks.refuse("activation", activation, "the name of an attribute of the layer, or None")

    def register(function):
        global _version
        checks.function("function", function, 1, "a function of one call, which returns forms")
        _RULES[layer_class] = Rule(function, activation)
        _version += 1
        return function

    return register


def rule_of(layer) -> Rule | None:
    """The rule for a layer: that of its class, or of the class its `call` comes from."""
    for cls in type(layer).__mro__:
        if cls in _RULES:
            return _RULES[cls]
        if "call" in vars(cls):
            return None
    return None


def activation_of(layer) -> str | None:
    """The attribute of the activation that the layer's rule wants split off."""
    rule = rule_of(layer)
    return rule.activation if rule else None
