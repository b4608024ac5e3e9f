"""A layer without a rule: its own vector-Jacobian product, for each example apart.

Right for any layer whose output's rows depend on the same example's input only. Index letters:
n example.
"""

from __future__ import annotations

import math

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.gradients import network
from tf_gsnr.gradients.layerwise import capture, dense_forms, forms
from tf_gsnr.gradients.layerwise.one_by_one import OneByOne
from tf_gsnr.gradients.vectorized import example_map


def products(call) -> list:
    """`[(variable, form), ...]` of a call, by running the layer again on each example."""
    if network.has_loops(call.layer):
        gradients = _one_by_one(call)
    else:
        one, elements, drew = _one_example(call)
        if _is_large(call):
            run = example_map.of_one(one, elements)
            if not drew:  # what is drawn for one example alone is not what it has in its batch
                return [
                    (v, _one_by_one_form(call, run, j)) for j, v in enumerate(call.unit.variables)
                ]
        gradients = example_map.vectorised(one, elements, f"layer {call.layer.name!r}")
    return [(v, forms.rows(g, v)) for v, g in zip(call.unit.variables, gradients)]


LARGE = 2**16  # parameters of a variable, of which more than a block of gradients is not held


def _is_large(call):
    """Whether the gradients of all examples would take more than one block of memory."""
    n = call.n if isinstance(call.n, int) else dense_forms.UNKNOWN_BATCH
    sizes = [(math.prod(v.shape), tf.as_dtype(v.dtype).size) for v in call.unit.variables]
    return any(p > LARGE and n * p * size > dense_forms.BLOCK_BYTES for p, size in sizes)


def _one_by_one_form(call, run, j):
    variable = call.unit.variables[j]
    return OneByOne(lambda i: run(i)[j], call.n, variable.shape, variable.dtype)


def _one_by_one(call):
    """In a loop over the examples; where it matters what the others draw, with all of them in it.

    A mask that is drawn for one example alone is not the one that it has in its batch, and the
    states that a layer keeps from batch to batch are those of all examples.
    """
    one, elements, drew = _one_example(call)
    if not network.keeps_states(call.layer):
        run = example_map.traced(one, elements)
        if not drew:
            return run(elements)
    one, elements = _one_of_batch(call)
    return example_map.one_by_one(one, elements)


def _one_example(call):
    """`(function, elements)`: the product of one example, for a map over the elements.

    Also a list that is not empty, once the function was traced, if the layer drew random numbers.
    """
    arguments = (call.args, call.kwargs)
    flat = tf.nest.flatten(arguments)
    rows = call.n * call.fold
    split = [i for i, v in enumerate(flat) if _has_rows(v, rows)]
    dz = tf.nest.flatten(call.dz)
    used = [i for i, g in enumerate(dz) if g is not None]
    elements = (
        tf.range(call.n),
        [_rows_of_examples(flat[i], call) for i in split],
        [_rows_of_examples(dz[i], call) for i in used],
    )
    drew = []

    def one(element):
        n, inputs, gradients = element
        mine = list(flat)
        for i, v in zip(split, inputs):
            mine[i] = v
        # Adding 0 n marks a seed as varying with n: see converters.py.
        state = [
            (v, s + tf.cast(0 * n, s.dtype) if keras_internals.is_seed(v) else s)
            for v, s in call.state
        ]
        args, kwargs = tf.nest.pack_sequence_as(arguments, mine)
        return _product(call, args, kwargs, state, dict(zip(used, gradients)), drew)

    return one, elements, drew


def _one_of_batch(call):
    """As `_one_example`, with the whole batch run for each example, so that it draws as one."""
    dz = [(i, g) for i, g in enumerate(tf.nest.flatten(call.dz)) if g is not None]

    def one(n):
        gradients = {}
        for i, g in dz:
            g = forms.per_example(call, g, keep_fold=True)
            own = tf.reshape(tf.range(call.n) == n, [-1] + [1] * (g.shape.rank - 1))
            g = tf.where(own, g, tf.zeros_like(g))
            gradients[i] = tf.reshape(g, tf.concat([[-1], tf.shape(g)[2:]], 0))
        return _product(call, call.args, call.kwargs, call.state, gradients, [])

    return one, tf.range(call.n)


def _product(call, args, kwargs, state, gradients, drew):
    """The layer's vector-Jacobian product with `gradients`, by the index of an output."""
    given = {id(v): value for v, value in state}
    # The real variables where no scope gives others: see `network.values_given`.
    sources = [given.get(id(v), v.value) for v in call.unit.variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        with (
            keras.StatelessScope(state_mapping=state) as scope,
            capture.without_activation(call.layer, call.unit.activation),
            _once(call.layer),
        ):
            before = [scope.get_current_value(v) for v, _ in state]
            output = call.layer(*args, **kwargs)
            after = [scope.get_current_value(v) for v, _ in state]
        output = tf.nest.flatten(output)
    drew += [
        v for (v, _), a, b in zip(state, before, after) if a is not b and keras_internals.is_seed(v)
    ]
    found = tape.gradient(
        [output[i] for i in gradients],
        sources,
        output_gradients=[tf.cast(g, output[i].dtype) for i, g in gradients.items()],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return [tf.convert_to_tensor(g) for g in found]


def _once(layer):
    """While this is open, Keras does not recompute the layer in its backward pass."""
    if not keras_internals.is_rematerialised(layer):
        return keras_internals.replaced([])
    return keras_internals.replaced(
        [(layer, "rematerialized_call", lambda _: lambda call, *_, **__: call)]
    )


def _has_rows(value, rows):
    """Whether an argument has a row for each row of the batch."""
    if not tf.is_tensor(value) or value.shape.rank in (0, None):
        return False
    if isinstance(rows, int):
        return value.shape[0] == rows
    return value.shape[0] is None


def _rows_of_examples(value, call):
    """`[n f, ...]` -> `[n, f, ...]`: what one example of the map sees is a batch of its own."""
    return forms.per_example(call, value, keep_fold=True)
