"""Trust: what the rules make of a model must add up to its ordinary gradient, for each variable.

On random input, with a random linear function of the outputs as each example's loss and a random
weight on each example, the weighted sum of the per-example gradients must be the ordinary gradient
of the weighted sum of the losses. It is not where a variable acts outside the `call` of its layer,
where a rule is wrong, or where rows are taken for examples that they do not belong to.
Index letters: n example.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import contract

EXAMPLES = 3
UNKNOWN_LENGTH = 16  # what stands for an axis whose length is not known
TOLERANCE = {"float64": 1e-8, "float32": 1e-3}  # of others (half precision): 0.1


class NotConserved(ValueError):
    """A model that the layer-wise engine cannot measure; the message names the variables."""


class Comparison(NamedTuple):
    """What `compare` finds.

    Attributes:
      errors: per trainable variable, the largest difference between the sum of its per-example
        gradients and its ordinary gradient, relative to the latter; see `_error`.
      calls: per call in the order of the forward pass, `(layer, route, rows per example)`.
    """

    errors: list
    calls: list


def compare(model: keras.Model, x: Any, per_example: Callable, *, training, coupled) -> Comparison:
    """Compares the engine with ordinary gradients, on random data.

    Args:
      model: the model.
      x: nested tensors or specs like the model's input, for their shapes and dtypes.
      per_example: `(x, seeds, loss_of) -> (calls, forms_of)`, the engine's pass over the model;
        `forms_of(calls)` gives `{id(variable): form}`.
      training: mode of the layers.
      coupled: whether examples act on each other (batch statistics): their weights are then 1.
    """
    x = _random_like(model, x)  # numpy arrays
    n = tf.nest.flatten(x)[0].shape[0]
    weights = np.ones(n) if coupled else np.random.default_rng(0).uniform(0.5, 2.0, n)
    notes = []

    @tf.function(autograph=False)
    def both(x):
        seeds = [tf.convert_to_tensor(v.value) for v in contract.seed_variables(model)]

        def losses(predictions):
            values = _random_loss(predictions, n)
            return values, values

        calls, forms_of = per_example(x, seeds, losses)
        for call in calls:
            call.dz = tf.nest.map_structure(lambda g: _weighted(g, weights), call.dz)
        by_variable = forms_of(calls)
        notes.extend((call.layer.name, call.route, call.fold) for call in calls)
        ours = [by_variable.get(id(v)) for v in model.trainable_variables]
        ours = [None if form is None else form.total() for form in ours]

        parameters = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
        state = [*zip(model.trainable_variables, parameters)]
        state += zip(contract.seed_variables(model), seeds)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameters)
            with keras.StatelessScope(state_mapping=state):
                predictions = model(x, training=training)
            values = _random_loss(predictions, n)
            target = tf.reduce_sum(values * tf.constant(weights, values.dtype))
        theirs = tape.gradient(
            target, parameters, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        theirs = [tf.convert_to_tensor(g) for g in theirs]
        largest = tf.reduce_max([tf.cast(tf.reduce_max(tf.abs(g)), tf.float64) for g in theirs])
        return [_error(a, b, largest) for a, b in zip(ours, theirs)]

    def evaluate():
        arrays = tf.nest.map_structure(tf.constant, x)
        traced = both.get_concrete_function(arrays)
        return [float(e) for e in traced(arrays)]

    # A thread of its own has no graph, tape, strategy or scope around it, whatever calls this.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        errors = thread.submit(evaluate).result()
    return Comparison(errors, notes)


def violations(model, errors) -> list:
    """`(path, error)` of the variables whose error is more than rounding."""
    return [
        (v.path, e)
        for v, e in zip(model.trainable_variables, errors)
        if not e <= TOLERANCE.get(v.dtype, 0.1) or _low_precision(model) and not e <= 0.1
    ]


def _low_precision(model):
    return model.compute_dtype in ("float16", "bfloat16")


def _error(ours, theirs, largest):
    """The difference relative to the variable's gradient, or to a 1000th of the model's largest.

    The latter is for gradients that are zero but for rounding (a bias before a softmax, say).
    """
    difference = theirs if ours is None else ours - theirs
    error, scale = (tf.cast(tf.reduce_max(tf.abs(v)), tf.float64) for v in (difference, theirs))
    scale = tf.maximum(scale, 1e-3 * largest)
    return tf.where(scale > 0, error / tf.where(scale > 0, scale, 1), error)


def _weighted(gradient, weights):
    """A gradient whose rows belong to the examples in turn, times the examples' weights."""
    if gradient is None or gradient.shape.rank in (0, None) or gradient.shape[0] is None:
        return gradient
    if gradient.shape[0] % len(weights):
        return gradient
    rows = np.repeat(weights, gradient.shape[0] // len(weights))
    return gradient * tf.constant(
        rows.reshape([-1] + [1] * (gradient.shape.rank - 1)), gradient.dtype
    )


def _random_loss(predictions, n):
    """`[n]`: a linear function of each example's outputs, always the same one."""
    total = []
    for k, output in enumerate(tf.nest.flatten(predictions)):
        output = tf.convert_to_tensor(output)
        if not output.dtype.is_floating:
            continue
        factors = tf.random.stateless_normal(tf.shape(output), [k, 7])
        terms = tf.reshape(output * tf.cast(factors, output.dtype), [n, -1])
        total.append(tf.cast(tf.reduce_sum(terms, 1), tf.float64))
    return tf.add_n(total)


def _random_like(model, x):
    """Random arrays like the model's input: floats in [0, 1), integers 0 or 1."""
    fixed = [getattr(v, "shape", [None])[0] for v in getattr(model, "inputs", None) or []]
    n = next((size for size in fixed if size is not None), EXAMPLES)
    rng = np.random.default_rng(0)

    def random(v):
        shape = [n] + [UNKNOWN_LENGTH if s is None else s for s in v.shape[1:]]
        dtype = tf.as_dtype(v.dtype)
        if dtype.is_floating:
            return rng.uniform(size=shape).astype(dtype.as_numpy_dtype)
        if dtype.is_integer or dtype.is_bool:
            return rng.integers(0, 2, size=shape).astype(dtype.as_numpy_dtype)
        raise NotConserved(
            f"model {model.name!r} takes {dtype.name} inputs, on which the layer-wise engine "
            "cannot be checked: use engine='vectorized'"
        )

    return tf.nest.map_structure(random, x)
