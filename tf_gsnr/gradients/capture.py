"""One forward and one backward pass, and what each parametrised layer saw in them.

While the pass is traced, the `call` of every layer is replaced by one that notes its arguments and
watches its output; afterwards nothing is left on the layers. Index letters: n example, f rows that
the model folded into one example (n f rows, examples first), i argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_gsnr.gradients import contract, recurrent


@dataclasses.dataclass(frozen=True)
class Unit:
    """A layer whose calls are captured, and the trainable variables it answers for.

    Most units are single layers with variables of their own. A layer that calls other layers where
    they cannot be observed, as a recurrent layer calls its cell in a loop, is one `whole`.
    """

    layer: Any
    variables: tuple
    whole: bool = False
    bare: str | None = None


def units_of(model: keras.Model, whole: Sequence, bare: Callable) -> list[Unit]:
    """The units of a model.

    Args:
      model: the model.
      whole: layers that are units with all that is in them.
      bare: `layer -> ` the attribute of the activation that is to be split off, or None.
    """
    wanted = {id(v) for v in model.trainable_variables}
    units = []
    for layer in contract.sublayers(model):
        variables = layer.trainable_variables
        is_whole = any(layer is one for one in whole)
        if not is_whole:
            inner = layer._flatten_layers(include_self=False)
            theirs = {id(v) for other in inner for v in other.variables}
            variables = [v for v in variables if id(v) not in theirs]
        variables = tuple(v for v in variables if id(v) in wanted)
        if variables:
            units.append(Unit(layer, variables, is_whole, None if is_whole else bare(layer)))
    return units


@dataclasses.dataclass
class Call:
    """One call of one layer: what a rule sees.

    Attributes:
      unit: the layer and its variables.
      args, kwargs: what the layer was called with.
      output: nested tensors; before the activation where the layer's rule asked for that.
      dz: gradient of the summed per-example losses at `output`, nested likewise; None for what the
        losses do not depend on.
      n: number of examples; an int, or a scalar tensor where it is not known when traced.
      fold: rows per example: x and dz have `n * fold` rows, those of an example side by side.
      seeds: `(variable, value before the call)` of the model's random number generators.
      route: the name of the rule that was used, "fallback", or "unused".
      training: mode of the model.
    """

    unit: Unit
    args: tuple
    kwargs: dict
    output: Any
    n: Any
    seeds: list
    dz: Any = None
    fold: int = 1
    route: str = "unused"
    training: bool = False

    @property
    def layer(self):
        return self.unit.layer

    @property
    def x(self):
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def used(self) -> bool:
        """Whether the losses depend on the output at all."""
        return any(g is not None for g in tf.nest.flatten(self.dz))


@dataclasses.dataclass
class Pass:
    """What one forward and backward pass found: see `Call` and `contract.Measured`."""

    calls: list
    losses: Any
    predictions: Any
    updates: list
    unobservable: list


def run(
    model: keras.Model,
    units: Sequence[Unit],
    loss_of: Callable,
    x: Any,
    *,
    seeds: Sequence,
    training: bool,
) -> Pass:
    """Runs the model once forwards and once backwards to the outputs of its units.

    Args:
      model: the model.
      units: what `units_of` returns.
      loss_of: `predictions -> (losses [n], what to differentiate [n])`.
      x: the model's input.
      seeds: a value per `contract.seed_variables(model)`.
      training: mode of the layers.
    """
    generators = contract.seed_variables(model)
    # Of all variables: a scope around this one may give them other values.
    state = [(v, tf.convert_to_tensor(v.value)) for v in model.variables]
    state += list(zip(generators, seeds))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        with keras.StatelessScope(state_mapping=state) as scope:
            recorder = _Recorder(tape, scope, generators, batch_size(x), training)
            with contract.replaced_calls([(u.layer, recorder.wrap(u)) for u in units]):
                predictions = model(x, training=training)
            state = [(v, scope.get_current_value(v)) for v in model.non_trainable_variables]
        losses, target = loss_of(predictions)
    outputs = [z for call in recorder.calls for z in tf.nest.flatten(call.output)]
    differentiable = [z for z in outputs if z.dtype.is_floating]
    gradients = dict(zip(map(id, differentiable), tape.gradient(target, differentiable)))
    for call in recorder.calls:
        call.training = training
        call.dz = tf.nest.map_structure(lambda z: _dense(gradients.get(id(z))), call.output)
    updates = [tf.convert_to_tensor(v.value if new is None else new) for v, new in state]
    return Pass(recorder.calls, losses, predictions, updates, recorder.unobservable)


def batch_size(x):
    """The number of examples: an int where it is known when traced, else a scalar tensor."""
    first = tf.nest.flatten(x)[0]
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def _dense(gradient):
    return None if gradient is None else tf.convert_to_tensor(gradient)


class _Recorder:
    """Makes the calls that take the place of the layers' own while the model is traced."""

    def __init__(self, tape, scope, generators, n, training):
        self.training = training
        self.tape, self.scope, self.generators, self.n = tape, scope, generators, n
        self.calls = []
        self.unobservable = []  # layers that were called inside a loop or branch of the graph
        self.in_whole = False
        self.graph = _graph()

    def wrap(self, unit):
        call = unit.layer.call

        def recorded(*args, **kwargs):
            if self.in_whole:
                return call(*args, **kwargs)
            if _graph() is not self.graph:
                self.unobservable.append(unit.layer)
                return call(*args, **kwargs)
            if unit.whole and recurrent.can_unroll(unit.layer, args[0], self.training):
                with recurrent.unrolled(unit.layer):
                    return call(*args, **kwargs)  # its cells are units of their own
            seeds = [(v, self.scope.get_current_value(v)) for v in self.generators]
            self.in_whole = unit.whole
            try:
                with without_activation(unit.layer, unit.bare) as activation:
                    output = call(*args, **kwargs)
            finally:
                self.in_whole = False
            output = tf.nest.map_structure(self.watch, output)
            self.calls.append(Call(unit, args, kwargs, output, self.n, seeds))
            return output if activation is None else activation(output)

        return recorded

    def watch(self, output):
        """The output as a tensor of its own: a layer may hand out one that others hold too."""
        if not tf.is_tensor(output) or not output.dtype.is_floating:
            return output
        output = tf.identity(output)
        self.tape.watch(output)
        return output


def _graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def without_activation(layer, attribute: str | None):
    """While this is open, `layer` stops short of its activation, which is handed out (or None)."""
    activation = getattr(layer, attribute, None) if attribute else None
    if activation is None or activation is keras.activations.linear:
        yield None
        return
    object.__setattr__(layer, attribute, keras.activations.linear)
    try:
        yield activation
    finally:
        object.__setattr__(layer, attribute, activation)
