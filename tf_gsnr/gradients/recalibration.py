"""Batch-norm statistics of a whole data set, computed exactly.

The moving statistics of a layer lag behind its weights. Appendix A.2 of the paper evaluates with
the mean and variance of the training set instead: layer by layer, since those of a layer depend on
those of the layers before it. `whole_data_statistics` streams data of any size, for the time of a
measurement; `forward` takes them in one pass inside a graph, and can be differentiated.
Index letters: a and b disjoint sets of examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import checks, keras_internals
from tf_gsnr.gradients import network
from tf_gsnr.moments import pairwise


@contextlib.contextmanager
def whole_data_statistics(model: keras.Model, batches: Callable):
    """While this is open, `BatchNormalization` layers hold the statistics of the whole data.

    One pass over the data per layer, memory independent of their number; the moving statistics are
    put back bit for bit afterwards, whatever happens in between.

    Args:
      model: the model; its layers are run in inference mode.
      batches: `() -> ` iterable of `(x, y, sample_weight, valid)`; may be called several times.

    Raises:
      ValueError: the model is none, or the batches are none of this kind.
    """
    network.check_built(model)
    layers = _in_order_of_calls(model, _first(batches))
    variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    before = [np.array(v) for v in variables]
    try:
        for layer in layers:
            mean, variance = _statistics(model, layer, batches())
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(variance)
        yield
    finally:
        for variable, value in zip(variables, before):
            variable.assign(value)


def forward(model: keras.Model, x, valid=None) -> tuple:
    """A forward pass in which `BatchNormalization` layers use the exact statistics of all of `x`.

    For a graph, and for data whose activations fit into memory. The statistics are functions of the
    weights here, so gradients of what is returned flow through them. No variable changes.

    Args:
      model: the model; its other layers are run in inference mode.
      x: tensor `[examples, ...]`.
      valid: bool `[examples]`, False for padding, which is no part of the statistics; None for all.

    Raises:
      ValueError: an argument is not usable; the message names it.

    Returns:
      `(predictions, statistics)`: statistics is a list of `(moving variable, value)`.

    Example:

    >>> model = keras.Sequential([keras.Input([1]), keras.layers.BatchNormalization()])
    >>> _, statistics = forward(model, tf.constant([[1.0], [3.0]]))
    >>> [(v.name, float(value[0])) for v, value in statistics]
    [('moving_mean', 2.0), ('moving_variance', 1.0)]
    """
    network.check_built(model)
    expected = "a tensor [examples, ...] of numbers"
    x = _as_tensor("x", x, expected)
    network.check_inputs(model, x)
    if valid is not None:
        expected = "booleans [examples], True for one of them at least"
        valid = _as_tensor("valid", valid, expected)
        known = valid.numpy() if hasattr(valid, "numpy") else None
        fits = valid.shape.rank == 1 and valid.shape[0] in (None, x.shape[0])
        if valid.dtype != tf.bool or not fits or known is not None and not known.any():
            checks.refuse("valid", valid, expected)
    layers = network.all_batch_norms(model)

    def recalibrated(layer, call):
        def with_own_statistics(inputs, *args, **kwargs):
            mean, variance = _differentiable_moments(inputs, layer.axis, valid)
            layer.moving_mean.assign(mean)  # in the scope only
            layer.moving_variance.assign(variance)
            return call(inputs, *args, **{**kwargs, "training": False})

        return with_own_statistics

    state = [(v, tf.convert_to_tensor(v.value)) for v in model.variables]
    with keras_internals.replaced_calls(layers, recalibrated):
        with keras.StatelessScope(state_mapping=state) as scope:
            predictions = model(x, training=False)
    moving = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    return predictions, [(v, scope.get_current_value(v)) for v in moving]


def _as_tensor(name, value, expected):
    try:
        found = tf.convert_to_tensor(value)
    except (TypeError, ValueError):
        checks.refuse(name, value, expected)
    if found.dtype == tf.string or found.shape.rank == 0 or found.shape[:1] == [0]:
        checks.refuse(name, value, expected)
    return found


def _first(batches):
    """x of the first of the batches; ValueError where they are none."""
    expected = "a function () -> batches (x, y, sample_weight, valid), one at least"
    checks.function("batches", batches, 0, expected)
    given = batches()
    first = next(iter(given), None) if hasattr(given, "__iter__") else None
    if not isinstance(first, tuple) or len(first) != 4:
        checks.refuse("batches", given, expected)
    return first[0]


def _differentiable_moments(inputs, axis, valid):
    """`(mean, variance)` per channel of the valid examples."""
    rank = inputs.shape.rank
    axes = [a for a in range(rank) if a != axis % rank]
    if valid is None:
        return tf.nn.moments(inputs, axes)
    weights = tf.reshape(tf.cast(valid, inputs.dtype), [-1] + [1] * (rank - 1))
    return tf.nn.weighted_moments(inputs, axes, weights)


def _in_order_of_calls(model, x):
    layers = network.all_batch_norms(model)
    seen = {}

    def noting(layer, call):
        def noted(*args, **kwargs):
            seen.setdefault(id(layer), layer)
            return call(*args, **kwargs)

        return noted

    with keras_internals.replaced_calls(layers, noting):
        with keras.StatelessScope():
            model(x, training=False)
    return list(seen.values())


def _statistics(model, layer, batches):
    """`(mean, variance)` of a layer's inputs over all examples, in float64."""

    @tf.function(autograph=False)
    def of_batch(x, valid):
        found = []

        def noting(layer, call):
            def noted(inputs, *args, **kwargs):
                found.append(_moments(inputs, layer.axis, valid))
                return call(inputs, *args, **kwargs)

            return noted

        with keras_internals.replaced_calls([layer], noting), keras.StatelessScope():
            model(x, training=False)
        return found

    count, total = 0, (np.float64(0), np.float64(0))
    for x, _, _, valid in batches:
        for n, *part in of_batch(x, valid):
            n, part = float(n), [np.asarray(v) for v in part]
            count, total = count + n, pairwise((count, n), total, part)
    mean, m2 = total
    return mean, m2 / count


def _moments(inputs, axis, valid):
    """`(count, mean, sum of squared deviations)` per channel of the valid examples."""
    inputs = tf.cast(inputs, tf.float64)
    rank = inputs.shape.rank
    rows = tf.boolean_mask(inputs, valid)
    axes = [a for a in range(rank) if a != axis % rank]
    count = tf.cast(tf.size(rows) / tf.shape(rows)[axis], tf.float64)
    mean = tf.reduce_mean(rows, axes, keepdims=True)
    m2 = tf.reduce_sum(tf.square(rows - mean), axes)
    return count, tf.reshape(mean, [-1]), m2


def averaged_statistics(model: keras.Model) -> Callable:
    """Returns `refresh(batches)`: sets the moving statistics to the average of the batches' own.

    One forward pass in training mode, weights held ("precise batch norm", Wu and Johnson 2021). A
    batch's statistics differ from those of the whole data by about 1/sqrt(batch), their average by
    about 1/batch (the means' spread between batches is missing from the variance). Frozen layers
    keep theirs; a model without batch norm is left alone.

    Args:
      model: its layers' moving statistics are replaced, and not put back.

    Returns:
      A function of an iterable of inputs `x`, batches of one size, traced once.

    Raises:
      ValueError: it is no built model; in `refresh`, the batches are none.
    """
    network.check_built(model)
    layers = network.batch_norms(model)
    variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    shares = [1 - layer.momentum for layer in layers for _ in range(2)]
    others = model.non_trainable_variables
    places = [next(i for i, o in enumerate(others) if o is v) for v in variables]

    @tf.function(autograph=False)
    def of_batch(x):
        state = [tf.convert_to_tensor(v) for v in others]
        for place in places:
            state[place] = tf.zeros_like(state[place])  # the update then leaves share * own
        _, state = model.stateless_call(model.trainable_variables, state, x, training=True)
        return [state[place] / share for place, share in zip(places, shares)]

    def refresh(batches):
        expected = "an iterable of inputs x [examples, ...], one batch at least"
        if isinstance(batches, str) or not hasattr(batches, "__iter__"):
            checks.refuse("batches", batches, expected)
        found = []
        for x in batches:
            x = _as_tensor("batches", x, expected)
            network.check_inputs(model, x, "batches")
            found.append(of_batch(x))
        if not found:
            checks.refuse("batches", batches, expected)
        for variable, *values in zip(variables, *found):
            variable.assign(tf.add_n(values) / len(values))

    return refresh
