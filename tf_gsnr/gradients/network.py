"""What is known of a model: its layers, its seeds, which of its layers are of a special kind.

Asked of the model each time, never kept: layers are frozen, added and exchanged between two calls,
and what holds a model's layers would keep the model alive.
"""

from __future__ import annotations

import contextlib

import keras
import tensorflow as tf

from tf_gsnr import checks, keras_internals

BATCH_NORM_MODES = ("frozen", "batch")


def check(model):
    """Raises ValueError unless `model` is a built Keras model with trainable variables."""
    check_built(model)
    if not model.trainable_variables:
        raise ValueError(
            f"model {model.name!r} has no trainable variables, so there is no gradient to measure: "
            "set trainable = True on the layers that are to be measured"
        )


def check_built(model):
    """Raises ValueError unless `model` is a built Keras model."""
    checks.keras_model(model)
    if not model.built:
        raise ValueError(
            f"model {model.name!r} is not built, so it has no variables yet: call it once on a "
            "batch, or model.build(input_shape), before measuring"
        )


def layers(model) -> list:
    """Every layer in the model, itself and those inside other layers included, each once."""
    return keras_internals.layers_in(model)


def all_batch_norms(model) -> list:
    """All of the model's `BatchNormalization` layers, those that do not train included."""
    return [layer for layer in layers(model) if isinstance(layer, keras.layers.BatchNormalization)]


def batch_norms(model) -> list:
    """The layers that normalise by the batch's statistics when in training mode."""
    return [layer for layer in all_batch_norms(model) if layer.trainable]


def has_loops(model) -> bool:
    """Whether a layer of the model, or the layer itself, runs a cell in a loop.

    `tf.vectorized_map` takes minutes to trace such a loop and its gradient, and cannot draw the
    masks of its dropout: `example_map` goes through the examples one by one instead.
    """
    return any(isinstance(layer, keras.layers.RNN) for layer in layers(model))


def keeps_states(model) -> bool:
    """Whether a layer keeps its states from one batch to the next, a row for each example."""
    return any(getattr(layer, "stateful", False) for layer in layers(model))


def precision(model) -> str:
    """The least precise dtype in which a layer of the model computes."""
    kinds = {layer.compute_dtype for layer in layers(model)} - {None}
    return next((kind for kind in kinds if "16" in kind), model.variable_dtype)


def fixed_batch_size(model: keras.Model) -> int | None:
    """The only batch size that the model takes, by its inputs or a stateful layer; None for any.

    Raises:
      ValueError: its inputs name several.
    """
    shapes = [v.shape for v in getattr(model, "inputs", None) or []]
    for layer in layers(model):
        if getattr(layer, "stateful", False):
            shapes += [v.shape for v in tf.nest.flatten(getattr(layer, "states", None) or [])]
    sizes = {shape[0] for shape in shapes if len(shape) and shape[0] is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"model {model.name!r} has inputs of the batch sizes {sorted(sizes)}; expected one"
        )
    return sizes.pop() if sizes else None


def check_inputs(model, x, name: str = "x"):
    """Raises ValueError where nested arrays are not what the model takes, as far as it says.

    Args:
      name: of the argument, for the error.
    """
    expected = getattr(model, "inputs", None)  # a subclassed model takes what its call takes
    preprocesses = getattr(model, "preprocessor", None) is not None
    if not expected or isinstance(x, dict) or preprocesses:
        return
    given = tf.nest.flatten(x)
    if len(expected) != len(given):
        raise ValueError(
            f"{name}: {len(given)} inputs are given; expected {len(expected)}, as model "
            f"{model.name!r} takes"
        )
    for one, takes in zip(given, expected):
        if one is None:
            continue
        if not _fits(tuple(one.shape)[1:], takes.shape[1:]):
            raise ValueError(
                f"{name}: the examples have shape {tuple(one.shape)[1:]}; expected "
                f"{takes.shape[1:]}, as model {model.name!r} takes"
            )
        dtype, wanted = tf.as_dtype(one.dtype), tf.as_dtype(takes.dtype)
        complex_for_real = dtype.is_complex and not wanted.is_complex
        if complex_for_real or dtype == tf.string != wanted:
            raise ValueError(
                f"{name}: the examples are of dtype {dtype.name}; expected {wanted.name}, as "
                f"model {model.name!r} takes"
            )


def _fits(given, takes):
    """Whether Keras takes an example of one shape for the other; it mends a last axis of one."""
    if len(given) + 1 == len(takes) and takes[-1] == 1:
        given = (*given, 1)
    elif len(given) == len(takes) + 1 and given[-1] == 1:
        given = given[:-1]
    return len(given) == len(takes) and all(None in (g, t) or g == t for g, t in zip(given, takes))


def seeds(model) -> list:
    """The state variables of the model's `keras.random.SeedGenerator`s."""
    return [v for v in model.non_trainable_variables if keras_internals.is_seed(v)]


def seeds_for(model, seed, step) -> list:
    """A value per seed variable: a stream of its own for every generator and micro-batch.

    Args:
      seed: integer scalar; None starts from the model's own current seeds.
      step: the index of the micro-batch, a scalar tensor or int.
    """
    values = []
    for k, variable in enumerate(seeds(model)):
        dtype = tf.as_dtype(variable.dtype)
        start = variable.value
        if seed is not None:
            start = tf.stack([tf.cast(seed, dtype) + 7919 * k, tf.zeros([], dtype)])
        # A generator counts its draws in its second entry: room for 65,536 draws a micro-batch.
        values.append(start + tf.stack([tf.zeros([], dtype), tf.cast(step, dtype) * 65536]))
    return values


def values_given(variables) -> list:
    """`(variable, value)` of those that a scope around this gives another value than their own.

    All others are left to be read as the real variables that they are: only so have what
    `tf.recompute_grad`, `tf.custom_gradient` and `tf.function` read gradients.
    """
    given = [(v, v.value) for v in variables]
    return [(v, value) for v, value in given if not hasattr(value, "assign")]


def check_batch_norm(batch_norm: str):
    """Raises ValueError unless `batch_norm` is one of `BATCH_NORM_MODES`."""
    checks.choice("batch_norm", batch_norm, BATCH_NORM_MODES)


def modes(model, training: bool, batch_norm: str):
    """The context in which batch-norm layers use the statistics that were asked for."""
    if training and batch_norm == "frozen":
        return frozen_batch_norm(model)
    return contextlib.nullcontext()


def frozen_batch_norm(model):
    """While this is open, batch-norm layers use their moving statistics whatever the mode."""

    def frozen(layer, call):
        def inference(inputs, *args, **kwargs):
            return call(inputs, *args, **{**kwargs, "training": False})

        return inference

    return keras_internals.replaced_calls(batch_norms(model), frozen)
