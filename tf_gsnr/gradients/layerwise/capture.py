"""What each parametrised layer sees in a forward pass, and the gradient at what it gives.

While the pass is made, the `call` of every such layer is replaced by one that notes its arguments
and watches its output; the pass itself is Keras's, and afterwards nothing is left on the layers.
Index letters: n example, f rows that the model folded into one example (n f rows, examples first).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.gradients import network


@dataclasses.dataclass(frozen=True)
class Unit:
    """A layer whose calls are captured, and the trainable variables it answers for.

    Most units are single layers with variables of their own. A layer that calls other layers where
    they cannot be observed, as a recurrent layer calls its cell in a loop, is one `whole`.
    """

    layer: Any
    variables: tuple
    whole: bool = False
    activation: str | None = None  # the attribute of the one that is to be split off


def units_of(model: keras.Model, whole: Sequence, activation_of: Callable) -> list[Unit]:
    """The units of a model.

    Args:
      model: the model.
      whole: layers that are units with all that is in them.
      activation_of: `layer -> ` the attribute of the activation to be split off, or None.
    """
    wanted = {id(v) for v in model.trainable_variables}
    units = []
    for layer in network.layers(model):
        variables = layer.trainable_variables
        is_whole = any(layer is one for one in whole)
        if not is_whole:
            inner = keras_internals.layers_in(layer, include_self=False)
            theirs = {id(v) for other in inner for v in other.variables}
            variables = [v for v in variables if id(v) not in theirs]
        variables = tuple(v for v in variables if id(v) in wanted)
        if variables:
            opaque = is_whole or keras_internals.is_rematerialised(layer)
            units.append(Unit(layer, variables, is_whole, None if opaque else activation_of(layer)))
    return units


@dataclasses.dataclass
class Call:
    """One call of one layer: what a rule sees.

    Attributes:
      unit: the layer and its variables.
      args, kwargs: what the layer was called with.
      output: nested tensors; before the activation where the layer's rule asked for that.
      dz: gradient of the loss at `output`, nested likewise; None for what it does not depend on.
      n: number of examples; an int, or a scalar tensor where it is not known when traced.
      fold: rows per example: x and dz have `n * fold` rows, those of an example side by side. An
        int, or a scalar tensor where it is not known when traced.
      state: `(variable, value before the call)` of what the call may read and assign: the layer's
        seeds and statistics, and what a scope around gives other values.
      route: the name of the rule that was used, "fallback", or "unused".
      training: mode of the model.
    """

    unit: Unit
    args: tuple
    kwargs: dict
    output: Any
    n: Any
    state: list
    dz: Any = None
    fold: Any = 1
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
        """Whether the loss depends on the output at all."""
        return any(g is not None for g in tf.nest.flatten(self.dz))

    @property
    def folded(self) -> bool:
        """Whether an example has, or may have, other than one row."""
        return not (isinstance(self.fold, int) and self.fold == 1)


@dataclasses.dataclass
class Pass:
    """What was seen of a forward pass.

    Attributes:
      calls: of the units, in order.
      outputs: `(layer, output)` of every layer without layers inside, in order; if asked for, and
        before them `(model, input)` of what it is called with.
      hidden: layers that were called where they cannot be observed: in a loop, a branch or a
        function of the graph.
    """

    calls: list = dataclasses.field(default_factory=list)
    outputs: list = dataclasses.field(default_factory=list)
    hidden: list = dataclasses.field(default_factory=list)

    def watched(self) -> list:
        """All differentiable outputs of the calls."""
        return [z for call in self.calls for z in tf.nest.flatten(call.output) if _is_real(z)]

    def set_gradients(self, gradients: Sequence):
        """Puts the gradients at `watched()` into the calls."""
        found = {id(z): g for z, g in zip(self.watched(), gradients)}

        def of(z):
            gradient = found.get(id(z))
            return None if gradient is None else tf.convert_to_tensor(gradient)

        for call in self.calls:
            call.dz = tf.nest.map_structure(of, call.output)


@contextlib.contextmanager
def watching(
    model, units: Sequence[Unit], tape, n, *, training: bool, all_outputs: bool = False, inputs=()
):
    """While this is open, calls of the units' layers are noted in the `Pass` that it hands out.

    Args:
      tape: the open `tf.GradientTape` that is to differentiate to the layers' outputs.
      n: the number of examples.
      training: mode of the model.
      all_outputs: whether `Pass.outputs` is wanted.
      inputs: what the model is to be called with, nested, where that is to be among them.
    """
    watcher = _Watcher(tape, n, training)
    replacements = []
    for unit in units:
        if keras_internals.is_rematerialised(unit.layer):
            around = functools.partial(watcher.around, unit)
            replacements.append((unit.layer, "rematerialized_call", around))
        else:
            replacements.append((unit.layer, "call", functools.partial(watcher.call, unit)))
    if all_outputs:
        watcher.inputs(model, inputs)
        taken = {id(unit.layer) for unit in units}
        for layer in network.layers(model):
            if (
                layer is not model
                and not keras_internals.layers_directly_in(layer)
                and id(layer) not in taken
            ):
                replacements.append((layer, "call", functools.partial(watcher.output, layer)))
    with keras_internals.replaced(replacements):
        yield watcher.found


class _Watcher:
    """Makes the calls that take the place of the layers' own."""

    def __init__(self, tape, n, training):
        self.tape, self.n, self.training = tape, n, training
        self.found = Pass()
        self.inside_whole = False
        self.graph = _graph()
        self.held = {}  # tensors that others hold, too, by id

    def call(self, unit, call):
        def recorded(*args, **kwargs):
            if self.inside_whole:
                return call(*args, **kwargs)
            if _graph() is not self.graph:
                self.found.hidden.append(unit.layer)
                return call(*args, **kwargs)
            self._hold((args, kwargs))
            layer = unit.layer
            state = [(v, tf.convert_to_tensor(v.value)) for v in layer.non_trainable_variables]
            state += network.values_given(layer.trainable_variables)
            self.inside_whole = unit.whole
            try:
                with without_activation(unit.layer, unit.activation) as activation:
                    output = call(*args, **kwargs)
            finally:
                self.inside_whole = False
            output = self._watched(output)
            self.found.calls.append(
                Call(unit, args, kwargs, output, self.n, state, training=self.training)
            )
            if activation is not None:
                output = activation(output)
            self._note(unit.layer, output)
            return output

        return recorded

    def around(self, unit, original):
        """For a layer that Keras recomputes: watched around the recomputation, not inside of it."""

        def rematerialized_call(layer_call, *args, **kwargs):
            return self.call(unit, original(layer_call, *args, **kwargs))

        return rematerialized_call

    def inputs(self, model, values):
        for v in filter(_is_real, tf.nest.flatten(values)):
            self.tape.watch(v)
            self._note(model, v)

    def output(self, layer, call):
        def noted(*args, **kwargs):
            self._hold((args, kwargs))
            output = call(*args, **kwargs)
            if _graph() is self.graph and not self.inside_whole:
                output = self._watched(output)
                self._note(layer, output)
            return output

        return noted

    def _note(self, layer, output):
        self.found.outputs += [(layer, z) for z in tf.nest.flatten(output) if _is_real(z)]

    def _hold(self, values):
        for v in tf.nest.flatten(values):
            if _is_real(v):
                self.held[id(v)] = v

    def _watched(self, outputs):
        """Outputs as tensors of their own.

        A layer may hand out one that others hold too, or one that another output is computed from,
        of which the gradient would be in both.
        """
        several = len(tf.nest.flatten(outputs)) > 1
        return tf.nest.map_structure(lambda z: self._watch(z, several), outputs)

    def _watch(self, output, copy):
        if not _is_real(output):
            return output
        if copy or id(output) in self.held:
            output = keras_internals.attached(tf.identity(output), output, lambda v: v)
        self.held[id(output)] = output
        self.tape.watch(output)
        return output


def batch_size(x):
    """The number of examples: an int where it is known when traced, else a scalar tensor."""
    first = next(v for v in tf.nest.flatten(x) if v is not None)
    if first.shape.rank and first.shape[0] is not None:
        return first.shape[0]
    if isinstance(first, tf.SparseTensor):
        return tf.cast(first.dense_shape[0], tf.int32)
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.shape(first)[0]


def _is_real(value):
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def without_activation(layer, attribute: str | None):
    """While this is open, `layer` stops short of its activation, which is handed out (or None)."""
    activation = keras_internals.function_of(layer, attribute) if attribute else None
    if activation is None or activation is keras.activations.linear:
        yield None
        return
    with keras_internals.replaced([(layer, attribute, lambda _: keras.activations.linear)]):
        yield activation
