"""Whether examples act on each other, through a layer or the loss; and whose rows are whose.

Index letters: n example, S a part of the batch.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, keras_internals
from tf_gsnr.gradients import examples


def part_of(n: int):
    """bool `[n]`: which examples are S, some at random, so that it cuts pairs of any order.

    No S is taken that is the same in a batch turned round.
    """
    for seed in itertools.count():
        chosen = np.random.default_rng(seed).permutation(n) < n // 2
        if n < 2 or (chosen != chosen[::-1]).any():
            return chosen


class Seen(NamedTuple):
    """Mean squares of the gradient of a part's outputs at the rows of that part, and at the others.

    Of both parts, S and the rest, added: an example that acts on all others, while none acts on it,
    shows in the part that it is not in.

    Attributes:
      own, foreign: these two.
      shared: of what both parts depend on, of which is taken the smaller.
    """

    own: tf.Tensor
    foreign: tf.Tensor
    shared: tf.Tensor


def _has_rows(gradient, n):
    """Whether it has a row, or several, for each example, or may have when it is run."""
    if gradient is None or not gradient.shape.rank:
        return False
    rows = gradient.shape[0]
    return rows is None or rows > 0 and rows % n == 0


def _seen(gradients, n) -> Seen | None:
    """Of the gradients of S's outputs and of the others', at one tensor; None without any."""
    if not any(_has_rows(g, n) for g in gradients):
        return None
    own, foreign, both = [], [], []
    for gradient, chosen in zip(gradients, _both(n)):
        if not _has_rows(gradient, n):
            continue
        gradient = tf.convert_to_tensor(gradient)
        wide = tf.float64 if gradient.dtype == tf.float64 else tf.float32
        squares = tf.square(tf.cast(gradient, wide))
        both.append(squares)
        rows = tf.reduce_mean(tf.reshape(arrays.rows_of_examples(squares, n), [n, -1]), 1)
        own.append(tf.reduce_mean(tf.boolean_mask(rows, chosen)))
        foreign.append(tf.reduce_mean(tf.boolean_mask(rows, ~chosen)))
    shared = tf.reduce_mean(tf.minimum(*both)) if len(both) == 2 else tf.zeros([], both[0].dtype)
    return Seen(*(tf.cast(v, tf.float32) for v in (tf.add_n(own), tf.add_n(foreign), shared)))


def rows_seen(tape, predictions, tensors, n: int) -> list:
    """For each tensor with rows of examples, what a random function of S's outputs depends on.

    Args:
      tape: persistent, of the forward pass.
      predictions: of the model, nested.
      tensors: of the pass, in which an example has the same number of rows side by side.
      n: the number of examples, known.

    Returns:
      Per tensor `Seen`, or None where the outputs do not depend on it or it has no such rows.
    """
    parts = []
    for chosen in _both(n):
        with tape:
            total = [tf.zeros([], tf.float64)]
            for k, output in enumerate(real(predictions)):
                if output.shape.rank and output.shape[0] in (n, None):
                    output = arrays.rows_of_examples(output, n, fold=1)
                    factors = tf.random.stateless_normal(tf.shape(output), [k, 7])
                    terms = tf.boolean_mask(output * tf.cast(factors, output.dtype), chosen)
                    total.append(tf.cast(tf.reduce_sum(terms), tf.float64))
            target = tf.add_n(total)
        parts.append(tape.gradient(target, tensors))
    return [_seen(both, n) for both in zip(*parts)]


def rows_of(tape, tensor, sources, n: int) -> Seen | None:
    """What S's rows of a tensor come from: rows of S, or others, of what has rows of examples.

    None where it comes from none of the sources, or has not the same number of rows per example.
    """
    if not sources or not _has_rows(tensor, n):
        return None
    parts = []
    for chosen in _both(n):
        with tape:
            rows = arrays.rows_of_examples(tensor, n)
            factors = tf.cast(tf.random.stateless_normal(tf.shape(rows), [3, 7]), rows.dtype)
            terms = tf.reshape(rows * factors, [n, -1])
            target = tf.reduce_sum(tf.boolean_mask(terms, chosen))
        parts.append(tape.gradient(target, sources))
    return _together(_seen(both, n) for both in zip(*parts))


def _together(seen) -> Seen | None:
    there = [s for s in seen if s is not None]
    return Seen(*(tf.add_n(v) for v in zip(*there))) if there else None


def come_from(tensors, sources) -> list:
    """Whether each tensor is computed from values of the sources, not from their sizes alone.

    It is told from the graph; outside of one it is taken for granted.
    """
    if tf.executing_eagerly():
        return [True] * len(tensors)
    marked = {id(v.op) for v in tf.nest.flatten(sources, expand_composites=True) if _in_graph(v)}
    for op in tf.compat.v1.get_default_graph().get_operations():
        if op.type not in _OF_SIZES and any(id(v.op) in marked for v in op.inputs):
            marked.add(id(op))
    return [id(v.op) in marked for v in tensors]


_OF_SIZES = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")


def _in_graph(value):
    return isinstance(value, tf.Tensor) and not hasattr(value, "numpy")


def _both(n: int):
    chosen = part_of(n)
    return chosen, ~chosen


def mixing_layer(layers, seen):
    """The layer that makes examples depend on each other; None where they do not.

    They do where both parts depend on one number, or already on the other's rows of what the model
    is called with. Rows that are only in another order for a while are no example's but its own.

    Args:
      layers, seen: of all layers' outputs, in the order of the forward pass.
    """
    there = [k for k, s in enumerate(seen) if s is not None]
    mixed = [k for k in there if _beyond_rounding(seen[k].shared, seen[k])]
    if there and is_foreign(seen[there[0]]):
        mixed += [k for k in there if is_foreign(seen[k])]
    return layers[min(max(mixed) + 1, len(layers) - 1)] if mixed else None


def is_foreign(seen: Seen) -> bool:
    """Whether S's outputs depend on rows of other examples, beyond rounding."""
    return _beyond_rounding(seen.foreign, seen)


def _beyond_rounding(square, seen) -> bool:
    return float(square) > 1e-10 * max(float(seen.own), float(seen.foreign))


def are_scrambled(seen: Seen) -> bool:
    """Whether the rows are not in the order of the examples: S's own matter no more than others."""
    return is_foreign(seen) and float(seen.foreign) > 0.25 * float(seen.own)


def loss_coupling(tape, loss, tensors, n: int):
    """What a random function of the loss's gradient at S's rows of some tensors depends on.

    It is S's rows alone, unless the loss lets examples act on each other: `Seen`, or None where the
    gradient does not depend on them (a loss that is linear in them). What is linear piece by piece,
    as a hinge between pairs of examples, is not seen.

    Args:
      tape: persistent, of the loss.
      loss: scalar.
      tensors: those without a row for each example are left out.
    """
    tensors = [t for t in tensors if t.shape.rank and t.shape[0] == n]
    with _meant(), tape:
        slopes = tape.gradient(loss, tensors)
    parts = []
    for chosen in _both(n):
        with _meant(), tape:
            total = [tf.zeros([], tf.float64)]
            for k, gradient in enumerate(slopes):
                if gradient is not None:
                    factors = tf.random.stateless_normal(tf.shape(gradient), [k, 11])
                    terms = tf.boolean_mask(gradient * tf.cast(factors, gradient.dtype), chosen)
                    total.append(tf.cast(tf.reduce_sum(terms), tf.float64))
            target = tf.add_n(total)
        parts.append(tape.gradient(target, tensors))
    return _together(_seen(both, n) for both in zip(*parts))


@contextlib.contextmanager
def _meant():
    """Keeps TensorFlow's advice not to take gradients inside a persistent tape from the user."""

    def others(record):
        return "persistent tape" not in record.getMessage()

    tf.get_logger().addFilter(others)
    try:
        yield
    finally:
        tf.get_logger().removeFilter(others)


def loss_error(loss, x, y, predictions, sample_weight, of_batch=None):
    """Whether the loss lets examples act on each other: above 1 if so, scalar.

    The gradient of the loss by S's outputs is to be the same whatever the outputs of the others are
    (as it is not for the root of the mean square error); and, but for one common factor (the number
    of valid positions), the same where half of the examples are there twice and the others are not.
    The number of examples stays what it is, since a loss may count on it.

    Args:
      loss: `(x, y, predictions, sample_weight) -> ` scalar.
      of_batch: `loss_gradient` of the rest, if known.
    """
    data = x, y, predictions, sample_weight
    n = examples.count((x, y))
    there = [k for k, p in enumerate(sources(predictions)) if _has_row(p, n)]
    if n < 2 or not there:
        return tf.zeros([])
    before = loss_gradient(loss, *data) if of_batch is None else of_batch
    before = [before[k] for k in there]
    errors = []
    for chosen in _both(n):
        others = keras.tree.map_structure(lambda p: _replaced(p, chosen, n), predictions)  # noqa: B023
        after = loss_gradient(loss, x, y, others, sample_weight)
        errors.append(_change(before, [after[k] for k in there], chosen) / REPLACED)
    if all(_has_row(v, n) for v in tf.nest.flatten(data) if tf.is_tensor(v)):
        half, every = n // 2, np.arange(n)
        for own, taken in (
            (slice(0, half), every % half),
            (slice(half, n), np.where(every < half, every + n - half, every)),
        ):
            given = examples.rows((x, y, sample_weight), taken)
            twice = keras.tree.map_structure(lambda p: _masked_rows(p, taken), predictions)  # noqa: B023
            alone = loss_gradient(loss, given[0], given[1], twice, given[2])
            pair = [g[own] for g in before], [alone[k][own] for k in there]
            errors.append(unlike(*pair) / ALONE)
    errors = tf.stack(errors)
    return tf.reduce_max(tf.where(tf.math.is_nan(errors), tf.zeros_like(errors), errors))


REPLACED = 1e-5  # an error that is more than rounding, of numbers that are computed in one way
ALONE = 1e-3  # and of others


def _has_row(value, n):
    return bool(value.shape.rank) and value.shape[0] == n


def _change(before, after, chosen):
    """The largest at these rows, relative to the largest value."""
    pairs = [[tf.boolean_mask(g, chosen) for g in pair] for pair in zip(before, after)]
    error = tf.reduce_max([_largest(a - b) for a, b in pairs])
    size = tf.reduce_max([tf.maximum(_largest(a), _largest(b)) for a, b in pairs])
    return tf.math.divide_no_nan(error, size)


def unlike(among, alone):
    """How far a list of tensors is from another times a factor, the best; relative.

    Where the one is zero and the other is not, no factor is.
    """
    among, alone = ([tf.cast(v, tf.float32) for v in values] for values in (among, alone))
    product = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(among, alone)])
    square = tf.add_n([tf.reduce_sum(b * b) for b in alone])
    factor = tf.math.divide_no_nan(product, square)
    error = tf.reduce_max([_largest(a - factor * b) for a, b in zip(among, alone)])
    size = tf.reduce_max([_largest(a) for a in among])
    lost = tf.cast((size == 0) & (square > 0), tf.float32)
    return tf.math.divide_no_nan(error, size) + lost


def _replaced(prediction, chosen, n):
    """Others than those of S are changed; what is a probability still is one, and not 0 or 1."""
    if not tf.is_tensor(prediction) or not prediction.dtype.is_floating:
        return prediction
    if not _has_row(prediction, n):
        return prediction
    mine = tf.reshape(chosen, [n] + [1] * (prediction.shape.rank - 1))
    half = tf.cast(0.5, prediction.dtype) * prediction
    changed = tf.where(mine, prediction, half + tf.cast(0.1, prediction.dtype))
    return keras_internals.attached(changed, prediction, lambda v: _replaced(v, chosen, n))


def _largest(values):
    return tf.reduce_max(tf.abs(values)) if 0 not in values.shape else tf.zeros([], values.dtype)


def loss_gradient(loss, x, y, predictions, sample_weight):
    """The gradient of a batch's loss by the outputs, as float32 tensors like the real outputs."""
    copies = keras.tree.map_structure(lambda p: _masked_rows(p, slice(None)), predictions)
    outputs = sources(copies)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        with keras.StatelessScope():
            value = tf.reduce_sum(loss(x, y, copies, sample_weight))
    gradients = tape.gradient(value, outputs, unconnected_gradients="zero")
    return [tf.cast(g, tf.float32) for g in gradients]


def _masked_rows(prediction, rows):
    if not tf.is_tensor(prediction) or not prediction.shape.rank:
        return prediction

    def taken(value):
        return tf.identity(value[rows] if isinstance(rows, slice) else tf.gather(value, rows))

    return keras_internals.attached(taken(prediction), prediction, taken)


def sources(predictions) -> list:
    """What a loss is computed from: the real outputs, and the logits that Keras attached."""
    outputs = real(predictions)
    logits = [keras_internals.logits_of(p) for p in outputs]
    return outputs + [v for v in logits if v is not None]


def real(predictions):
    return [p for p in keras.tree.flatten(predictions) if tf.is_tensor(p) and p.dtype.is_floating]
