"""Recurrent layers: what each step of their cells saw, in a loop and never laid out in the graph.

The layer's own `call` is run again from the state that it had, with a loop of this file in the
place of Keras's. Forwards the loop keeps the states that each step began with. Backwards it runs
the cell once more at each step, carries the gradient to the step before and notes it at the cell's
outputs. The steps are then positions of one layer, as those of a dense layer over a sequence are.
Index letters: n example, f row of an example, r = n f rows, t step in the order in which the layer
takes them, i in, o out, g gate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.gradients import network
from tf_gsnr.gradients.layerwise import cell_rules, forms
from tf_gsnr.gradients.vectorized import example_map

_OWN_LOOPS = [
    layer.inner_loop
    for layer in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)
]
# Where the cells of Keras draw their masks, once a sequence: a class that has no public name.
_DROPOUT = next(c for c in keras.layers.LSTMCell.__mro__ if "get_dropout_mask" in vars(c))


def products(call) -> list | None:
    """`[(variable, form), ...]` of a call of a recurrent layer.

    `G[n] = sum_ft` of what step t of row f leaves behind: an outer product for the kernels of
    Keras's own cells, and for any other cell its vector-Jacobian product, vectorised over n.

    Args:
      call: of a `keras.layers.RNN`, with `args`, `kwargs`, `dz`, `n`, `fold` and `state`.

    Returns:
      None where the layer has a loop, or weights outside of its cell, that this file does not
      know: its class overrides `inner_loop`, or its cell is not a layer.

    Raises:
      NotImplementedError: the cell draws random numbers, or assigns a variable, at every step.
    """
    layer = call.layer
    if not _is_known(layer, call.unit.variables):
        return None
    runs = []
    state = [*call.state, *network.values_given(layer.trainable_variables)]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        with keras.StatelessScope(state_mapping=state) as scope:
            loop = functools.partial(_forwards, layer, state, scope, tape, runs)
            with keras_internals.replaced([(layer, "inner_loop", lambda _: loop)]):
                output = layer.call(*call.args, **call.kwargs)
    if len(runs) != 1:
        return None
    run = runs[0]
    pairs = zip(tf.nest.flatten(output), tf.nest.flatten(call.dz))
    used = [(z, tf.cast(g, z.dtype)) for z, g in pairs if g is not None]
    gradients = tape.gradient(
        [z for z, _ in used],
        [run.outputs, *run.last],
        output_gradients=[g for _, g in used],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    wanted = {id(v) for v in call.unit.variables}
    found = []
    for steps in _backwards(layer.cell, state, run, gradients):
        variables = [v for v in steps.cell.trainable_variables if id(v) in wanted]
        if variables:
            found += cell_rules.products(call, steps) or _by_example(call, state, steps, variables)
    return found


def _is_known(layer, variables) -> bool:
    """Whether the loop is Keras's own and all these variables are read in it, by the cell."""
    if type(layer).inner_loop not in _OWN_LOOPS or not isinstance(layer.cell, keras.layers.Layer):
        return False
    inside = {id(v) for v in layer.cell.trainable_variables}
    return all(id(v) in inside for v in variables)


@dataclasses.dataclass
class _Run:
    """What the loop forwards leaves to the loop backwards.

    Attributes:
      x: `[t, r, ...]`, the input of each step.
      mask: `[t, r]` bool, False where the states stay as they are; or None.
      initial: nested `[r, ...]`, the states that the loop began with.
      states: flat list of `[t, r, ...]`, the states that each step began with.
      outputs: `[t, r, ...]`, the cell's outputs, those of masked steps included.
      last: flat list of `[r, ...]`, the states in the end.
      masks: `id(cell) -> (dropout mask, recurrent dropout mask)`, each as Keras has it.
      kwargs: `{"training": ...}` where the cell's `call` takes it.
      training: mode of the cell.
    """

    x: Any
    mask: Any
    initial: Any
    states: list
    outputs: Any
    last: list
    masks: dict
    kwargs: dict
    training: Any

    def step(self, cell, x, states):
        """`(output, flat list of new states)` of the cell, called as Keras's loop calls it."""
        states = tuple(tf.nest.pack_sequence_as(self.initial, states))
        output, new = cell(x, states, **self.kwargs)
        return output, tf.nest.flatten(new)


def _forwards(layer, state, scope, tape, runs, sequences, initial_state, mask, training=False):
    """Takes the place of `RNN.inner_loop`, and answers as it does; appends a `_Run` to `runs`."""
    cell = layer.cell
    initial = initial_state if isinstance(initial_state, (list, tuple)) else [initial_state]
    x = _ordered(sequences, layer)
    mask = tf.nest.flatten(mask)[0]
    if mask is not None:
        mask = tf.cast(mask, tf.bool)
        unordered = tf.transpose(tf.reshape(mask, tf.shape(sequences)[:2]))  # [t, r]
        mask = tf.reverse(unordered, [0]) if layer.go_backwards else unordered
    masks = {id(one): _masks(one) for one, _ in _leaves(cell, initial)}
    takes = inspect.signature(cell.call).parameters
    kwargs = {"training": training} if "training" in takes else {}
    run = _Run(x, mask, list(initial), [], None, [], masks, kwargs, training)
    length = tf.shape(x)[0]
    flat = tf.nest.flatten(initial)
    before = [scope.get_current_value(v) for v, _ in state]
    arrays = [_array(length, s.dtype) for s in flat]
    array = _array(length, cell.compute_dtype)

    def body(t, states, arrays, array):
        output, new = run.step(cell, x[t], states)
        _refuse_changes(layer, state, scope, before)
        if mask is not None:
            new = [_where(mask[t], a, b) for a, b in zip(new, states)]
        arrays = [a.write(t, s) for a, s in zip(arrays, states)]
        array = array.write(t, tf.cast(output, cell.compute_dtype))
        return t + 1, _shaped(new, states), arrays, array

    _, last, arrays, array = tf.while_loop(
        lambda t, *_: t < length, body, (tf.constant(0), flat, arrays, array)
    )
    run.states = [_stacked(a, x.shape[0], s) for a, s in zip(arrays, flat)]
    run.outputs = array.stack()
    run.last = last
    tape.watch([run.outputs, *run.last])
    runs.append(run)
    outputs = run.outputs
    if mask is not None:
        outputs = _carried(outputs, mask)
    final = outputs[-1]
    if mask is not None:
        cudnn = _ran_on_cudnn(layer)
        if layer.zero_output_for_mask and not cudnn:
            final = _where(mask[-1], final, tf.zeros_like(final))
        if layer.zero_output_for_mask or cudnn:
            # Keras's unrolled loop takes the mask in the order of the sequence, even backwards.
            kept = unordered if layer.unroll else mask
            outputs = _where(kept, outputs, tf.zeros_like(outputs))
    return final, _rows_first(outputs), tf.nest.pack_sequence_as(run.initial, run.last)


def _ran_on_cudnn(layer) -> bool:
    """Whether the layer's own loop is cuDNN's, which gives 0 for masked steps of a sequence."""
    if not getattr(layer, "use_cudnn", False) or layer.supports_jit:
        return False
    return not layer.recurrent_dropout


def _ordered(sequences, layer):
    """`[r, t, ...]` as `[t, r, ...]`, in the order in which the layer takes the steps."""
    x = _rows_first(sequences)
    return tf.reverse(x, [0]) if layer.go_backwards else x


def _rows_first(v):
    """`[t, r, ...]` as `[r, t, ...]`, and back."""
    return tf.transpose(v, [1, 0, *range(2, v.shape.rank)])


def _where(mask, a, b):
    """`a` where the mask is True, else `b`; the mask has the first axes of both."""
    axes = a.shape.rank - mask.shape.rank
    return tf.where(tf.reshape(mask, tf.concat([tf.shape(mask), [1] * axes], 0)), a, b)


def _carried(outputs, mask):
    """`[t, r, ...]`: where a step is masked, the output of the last one that was not; else 0."""
    valid = tf.cast(tf.transpose(mask), tf.int32)  # [r, t]
    count = tf.cumsum(valid, 1)
    in_turn = tf.argsort(1 - valid, stable=True)  # the steps that are not masked come first
    source = tf.gather(in_turn, tf.maximum(count - 1, 0), batch_dims=1)
    carried = tf.gather(_rows_first(outputs), source, batch_dims=1)
    return _rows_first(_where(count > 0, carried, tf.zeros_like(carried)))


def _array(length, dtype):
    return tf.TensorArray(dtype, size=length, clear_after_read=False)


def _stacked(array, steps, like):
    """What was written at each of the steps (an int or None), `[t, *like.shape]`."""
    return tf.ensure_shape(array.stack(), [steps, *like.shape])


def _shaped(values, like):
    """The values with the static shapes and dtypes that a loop's variables have."""
    return [tf.ensure_shape(tf.cast(v, s.dtype), s.shape) for v, s in zip(values, like)]


def _refuse_changes(layer, state, scope, before):
    for (variable, _), value in zip(state, before):
        if scope.get_current_value(variable) is not value:
            raise NotImplementedError(
                f"layer {layer.name!r}: its cell changes {variable.path!r} at every step (it draws "
                "random numbers or keeps a statistic), which cannot be repeated for all steps at "
                "once. Put a Dropout layer before the recurrent layer, or derive the cell from one "
                "of Keras's and use its dropout and recurrent_dropout"
            )


def _leaves(cell, states) -> list:
    """`(cell, number of its states)` of the cells in a stack, or of the cell itself."""
    if type(cell) is keras.layers.StackedRNNCells:
        return [leaf for one, s in zip(cell.cells, states) for leaf in _leaves(one, s)]
    return [(cell, len(tf.nest.flatten(states)))]


def _masks(cell):
    """The dropout masks that Keras has drawn for the whole sequence, or None."""
    if not isinstance(cell, _DROPOUT):
        return None, None
    return cell.get_dropout_mask(None), cell.get_recurrent_dropout_mask(None)


def _with_masks(cells_and_masks):
    """While this is open, these cells have these dropout masks."""
    names = ("get_dropout_mask", "get_recurrent_dropout_mask")
    return keras_internals.replaced(
        [
            (cell, name, lambda _, mask=mask: lambda _: mask)
            for cell, masks in cells_and_masks
            if isinstance(cell, _DROPOUT)
            for name, mask in zip(names, masks)
        ]
    )


@dataclasses.dataclass
class Steps:
    """All steps of one cell.

    Attributes:
      cell: the cell.
      x: `[r, t, ...]`, its inputs.
      states: flat list of `[r, t, ...]`, the states before each step.
      d_output: `[r, t, ...]`, gradient at its output.
      d_states: flat list of `[r, t, ...]`, gradient at the states after each step.
      dropout, recurrent_dropout: masks `[r, ...]`, one for each gate where it is a list, or None.
      call: `(x, flat states) -> (output, flat new states)`, a step as it was called.
      training: mode of the cell.
    """

    cell: Any
    x: Any
    states: list
    d_output: Any
    d_states: list
    dropout: Any
    recurrent_dropout: Any
    call: Callable
    training: Any


def _backwards(cell, state, run, gradients) -> list[Steps]:
    """From the gradients at the outputs `[t, r, ...]` and the last states, those at every step."""
    leaves = _leaves(cell, run.initial)
    distinct = list({id(leaf): leaf for leaf, _ in leaves}.values())
    masks = [(leaf, run.masks[id(leaf)]) for leaf in distinct]
    d_outputs, *d_last = gradients
    length = tf.shape(run.x)[0]
    arrays = [
        [
            _array(length, _dtype(leaf, run.x if k == 0 and j == 0 else None))
            for j in range(2 * s + 2)
        ]
        for k, (leaf, s) in enumerate(leaves)
    ]
    notes = []  # the calls of the leaves at one step, in turn

    def body(t, d_states, arrays):
        notes.clear()
        before = [s[t] for s in run.states]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(before)
            with contextlib.ExitStack() as stack:
                stack.enter_context(keras.StatelessScope(state_mapping=state))
                stack.enter_context(_with_masks(masks))
                watched = functools.partial(_watched, tape, notes)
                stack.enter_context(keras_internals.replaced_calls(distinct, watched))
                output, new = run.step(cell, run.x[t], before)
        d_new = d_states
        if run.mask is not None:
            d_new = [_where(run.mask[t], d, tf.zeros_like(d)) for d in d_states]
        inner = [z for note in notes for z in note.outputs]
        found = tape.gradient(
            [output, *new],
            [*before, *inner],
            output_gradients=[tf.cast(d_outputs[t], output.dtype), *d_new],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        d_before, d_inner = found[: len(before)], iter(found[len(before) :])
        if run.mask is not None:
            d_before = [
                d + _where(run.mask[t], tf.zeros_like(s), s) for d, s in zip(d_before, d_states)
            ]
        written = []
        for note, theirs in zip(notes, arrays, strict=True):
            values = [note.x, *note.states, *[next(d_inner) for _ in note.outputs]]
            written.append(
                [a.write(t, tf.cast(v, a.dtype)) for a, v in zip(theirs, values, strict=True)]
            )
        return t - 1, _shaped(d_before, d_states), written

    _, _, arrays = tf.while_loop(lambda t, *_: t >= 0, body, (length - 1, list(d_last), arrays))
    found = []
    for (leaf, states), note, theirs in zip(leaves, notes, arrays):
        like = [note.x, *note.states, *note.outputs]
        values = [_rows_first(_stacked(a, run.x.shape[0], v)) for a, v in zip(theirs, like)]
        found.append(
            Steps(
                leaf,
                values[0],
                values[1 : 1 + states],
                values[1 + states],
                values[2 + states :],
                *run.masks[id(leaf)],
                note.again,
                run.training,
            )
        )
    return found


def _dtype(leaf, x):
    """The dtype of what a leaf is called with: Keras casts it, if it is real."""
    return leaf.compute_dtype if x is None or x.dtype.is_floating else x.dtype


@dataclasses.dataclass
class _Note:
    """One call of a cell: its input, flat states, flat outputs, and how to call it again."""

    x: Any
    states: list
    outputs: list
    again: Callable


def _watched(tape, notes, cell, call):
    """The cell's `call`, noted, with its outputs watched."""

    def noted(x, states, **kwargs):
        output = tf.nest.map_structure(tf.identity, call(x, states, **kwargs))
        tape.watch(tf.nest.flatten(output))

        def again(x, flat):
            output, new = cell(x, tf.nest.pack_sequence_as(states, flat), **kwargs)
            return [output, *tf.nest.flatten(new)]

        notes.append(_Note(x, tf.nest.flatten(states), tf.nest.flatten(output), again))
        return output

    return noted


def _by_example(call, state, steps, variables) -> list:
    """The vector-Jacobian product of all steps of a cell at once, for each example."""
    cell = steps.cell
    values = [tf.convert_to_tensor(v.value) for v in variables]
    length = tf.shape(steps.x)[1]
    known = steps.x.shape[1]

    def of_examples(v):
        """`[r, t, ...]` as `[n, f t, ...]`."""
        rows = call.fold * (known or length)
        return tf.reshape(v, [call.n, rows, *_rest(v, 2)])

    def repeated(v):
        """A mask `[r, ...]` at each step, as `of_examples`."""
        return of_examples(tf.repeat(v[:, tf.newaxis], length, 1))

    masks = tf.nest.map_structure(
        lambda v: () if v is None else repeated(v), (steps.dropout, steps.recurrent_dropout)
    )
    elements = tf.nest.map_structure(
        of_examples, (steps.x, steps.states, [steps.d_output, *steps.d_states])
    )

    def one(element):
        (x, states, gradients), mine = element
        mine = tuple(None if isinstance(m, tuple) and not m else m for m in mine)
        mapping = [*state, *zip(variables, values)]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            with keras.StatelessScope(state_mapping=mapping), _with_masks([(cell, mine)]):
                outputs = steps.call(x, states)
        found = tape.gradient(
            outputs,
            values,
            output_gradients=[tf.cast(g, z.dtype) for z, g in zip(outputs, gradients)],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [tf.convert_to_tensor(g) for g in found]

    found = example_map.vectorised(one, (elements, masks), f"cell {cell.name!r}")
    return [(v, forms.rows(g, v)) for v, g in zip(variables, found)]


def _rest(v, axes):
    shape = tf.shape(v)
    return [s if s is not None else shape[a] for a, s in enumerate(v.shape)][axes:]
