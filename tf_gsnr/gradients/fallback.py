"""A layer without a rule: its own vector-Jacobian product, for each example apart.

Right for any layer whose output's rows depend on the same example's input only. Index letters:
n example.
"""

from __future__ import annotations

import keras
import tensorflow as tf
from absl import logging

from tf_gsnr.gradients import converters, forms, recurrent
from tf_gsnr.gradients.capture import without_activation


def products(call) -> list:
    """`[(variable, form), ...]` of a call, by running the layer again on each example."""
    variables = call.unit.variables
    with converters.vectorised_ops():
        try:
            with recurrent.without_loops(call.layer, call.training):
                gradients = tf.vectorized_map(*_one_example(call))
        except (ValueError, NotImplementedError, tf.errors.OpError) as error:
            logging.log_first_n(
                logging.WARNING,
                "layer %s cannot be vectorised over examples and is run in a loop: %s",
                1,
                call.layer.name,
                error,
            )
            one, elements = _one_example(call)
            signature = [tf.TensorSpec(v.shape, v.dtype) for v in call.unit.variables]
            gradients = tf.map_fn(one, elements, fn_output_signature=signature)
    return [(v, forms.rows(g, v)) for v, g in zip(variables, gradients)]


def _one_example(call):
    """`(function, elements)`: the product of one example, for a map over the elements."""
    arguments = (call.args, call.kwargs)
    flat = tf.nest.flatten(arguments)
    rows = call.n * call.fold
    split = [i for i, v in enumerate(flat) if _has_rows(v, rows)]
    dz = tf.nest.flatten(call.dz)
    used = [i for i, g in enumerate(dz) if g is not None]
    values = [tf.convert_to_tensor(v.value) for v in call.unit.variables]
    others = [(v, tf.convert_to_tensor(v.value)) for v in call.layer.non_trainable_variables]
    elements = (
        tf.range(call.n),
        [_rows_of_examples(flat[i], call) for i in split],
        [_rows_of_examples(dz[i], call) for i in used],
    )

    def one(element):
        n, inputs, gradients = element
        mine = list(flat)
        for i, v in zip(split, inputs):
            mine[i] = v
        args, kwargs = tf.nest.pack_sequence_as(arguments, mine)
        # Adding 0 n marks the seed as varying with n: see converters.py.
        seeds = [(v, s + tf.cast(0 * n, s.dtype)) for v, s in call.seeds]
        state = [*others, *zip(call.unit.variables, values), *seeds]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            with keras.StatelessScope(state_mapping=state):
                with without_activation(call.layer, call.unit.bare):
                    output = call.layer(*args, **kwargs)
            output = tf.nest.flatten(output)
        found = tape.gradient(
            [output[i] for i in used],
            values,
            output_gradients=[tf.cast(g, output[i].dtype) for i, g in zip(used, gradients)],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [tf.convert_to_tensor(g) for g in found]

    return one, elements


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
