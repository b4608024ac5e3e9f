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

from tf_gsnr.gradients import contract

MOST_STEPS = 128  # longer sequences stay a loop: unrolled they would take minutes to trace
_CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)


def can_unroll(layer, sequences, training) -> bool:
    """Whether the layer's steps are few, known, and its cells are Keras's own, without dropout.

    The mask of a cell's dropout is drawn once per sequence, which a step alone does not know.
    """
    if not isinstance(layer, keras.layers.RNN) or not _is_short(layer, sequences):
        return False
    known = all(type(cell) in _CELLS for cell in _cells(layer))
    return known and not (training and _drops(layer))


def _is_short(layer, sequences) -> bool:
    """Whether the number of steps is known and small."""
    if layer.stateful or not tf.is_tensor(sequences):
        return False
    steps = sequences.shape[1]
    return steps is not None and steps <= MOST_STEPS


def _cells(layer):
    return getattr(layer.cell, "cells", [layer.cell])


def _drops(layer) -> bool:
    return any(
        getattr(c, "dropout", 0) or getattr(c, "recurrent_dropout", 0) for c in _cells(layer)
    )


def without_loops(model, training):
    """While this is open, recurrent layers make their steps one by one, if these are few and known.

    `tf.vectorized_map` takes minutes to trace the gradient of a loop, and cannot draw inside of it.

    Raises:
      ValueError: (by the layer's call) a loop that would have to draw the masks of its dropout.
    """

    def wrap(layer):
        call = layer.call

        def one_by_one(sequences, *args, **kwargs):
            if _is_short(layer, sequences):
                with unrolled(layer):
                    return call(sequences, *args, **kwargs)
            if training and _drops(layer):
                raise ValueError(
                    f"layer {layer.name!r} has dropout and {sequences.shape[1]} steps: in training "
                    "mode tf.vectorized_map cannot draw its masks in a loop. Give the model's "
                    f"input a fixed length of at most {MOST_STEPS} steps, set dropout and "
                    "recurrent_dropout to 0 (a Dropout layer before it draws a mask per step), or "
                    "measure with training=False"
                )
            return call(sequences, *args, **kwargs)

        return one_by_one

    layers = [v for v in contract.sublayers(model) if isinstance(v, keras.layers.RNN)]
    return contract.replaced_calls([(layer, wrap(layer)) for layer in layers])


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
