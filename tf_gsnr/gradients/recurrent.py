"""Recurrent layers, laid out in time so that each step of the cell is a call like any other.

A loop in the graph hides the cell. Where the number of steps is known the layer is unrolled while
it is traced, and the cell's calls, one per step, are then taken together: to the fallback they are
one call with as many more rows per example. Index letters: n example, f row of an example, t step.
"""

from __future__ import annotations

import contextlib
import dataclasses

import keras
import tensorflow as tf

MOST_STEPS = 128  # longer sequences stay a loop: unrolled they would take minutes to trace
_CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)


def can_unroll(layer, sequences, training) -> bool:
    """Whether the layer's steps are few, known, and its cells are Keras's own, without dropout.

    The mask of a cell's dropout is drawn once per sequence, which a step alone does not know.
    """
    if not isinstance(layer, keras.layers.RNN) or layer.stateful or not tf.is_tensor(sequences):
        return False
    cells = getattr(layer.cell, "cells", [layer.cell])
    known = all(type(cell) in _CELLS for cell in cells)
    drops = training and any(c.dropout or c.recurrent_dropout for c in cells if known)
    steps = sequences.shape[1]
    return known and not drops and steps is not None and steps <= MOST_STEPS


@contextlib.contextmanager
def unrolled(layer):
    """While this is open, the layer's `call` makes its steps one by one."""
    before = layer.unroll
    object.__setattr__(layer, "unroll", True)
    try:
        yield
    finally:
        object.__setattr__(layer, "unroll", before)


def together(calls) -> list:
    """The calls with those of each cell of a recurrent layer made into one."""
    steps = {}
    result = []
    for call in calls:
        if type(call.layer) not in _CELLS:
            result.append(call)
        elif call.used:
            steps.setdefault(id(call.layer), []).append(call)
    return result + [_one(of_cell) for of_cell in steps.values()]


def _one(calls):
    first = calls[0]
    filled = [
        tf.nest.map_structure(
            lambda z, g: tf.zeros_like(z) if g is None else g, call.output, call.dz
        )
        for call in calls
    ]

    def stacked(*values):
        """`[n f, ...]` of each step as `[n f t, ...]`."""
        if not tf.is_tensor(values[0]):
            return values[0]
        values = tf.stack(values, 1)
        return tf.reshape(values, tf.concat([[-1], tf.shape(values)[2:]], 0))

    return dataclasses.replace(
        first,
        args=tf.nest.map_structure(stacked, *[call.args for call in calls]),
        output=tf.nest.map_structure(stacked, *[call.output for call in calls]),
        dz=tf.nest.map_structure(stacked, *filled),
        fold=first.fold * len(calls),
    )
