"""What a traced step depends on besides variables: the attributes of layers and losses.

A graph holds a layer's rate, activation or flag as it was when traced; where one of them is another
now, the step is traced anew.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import network

SMALL = 4096  # bytes of an array, and
FEW = 1000  # entries of a list or dict, that are compared by their values; more by identity

# What Keras's `fit`, `evaluate` and `predict` leave on a model, new each time: its loops, and how
# they went. No layer's call depends on it.
OF_LOOPS = frozenset(
    "history train_function test_function predict_function "
    "stop_training stop_evaluating stop_predicting".split()
)


def of(model, loss) -> dict:
    """`(id of the owner, name) -> value` of all public attributes of the layers and the loss."""
    attributes = {}
    for layer in network.layers(model):
        kept = vars(layer)
        ignored = OF_LOOPS if isinstance(layer, keras.Model) else ()
        attributes |= {
            (id(layer), k): _value(v)
            for k, v in kept.items()
            if not k.startswith("_") and k not in ignored
        }
        attributes[id(layer), ""] = layer.trainable, layer.compute_dtype
    for one in keras.tree.flatten(loss):
        if isinstance(one, keras.losses.Loss):
            attributes |= {(id(one), k): _value(v) for k, v in vars(one).items()}
    return attributes


def changed(before: dict, after: dict) -> set:
    """The keys whose values differ."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def _value(value):
    """Something that is equal, and has an equal hash, as long as the attribute means the same."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return repr(value)  # NaN is not equal to itself
    if value is None or isinstance(value, (bool, int, str, bytes, complex)):
        return type(value).__name__, value
    if isinstance(value, (list, tuple, dict)) and len(value) > FEW:
        return id(value), len(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_value, value))
    if isinstance(value, dict):
        return tuple((str(k), _value(v)) for k, v in value.items())
    if isinstance(value, np.ndarray) and value.nbytes <= SMALL and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (tf.DType, tf.TensorShape)):
        return str(value)
    return id(value), id(getattr(value, "__code__", None))
