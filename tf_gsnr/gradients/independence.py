"""Whether examples act on each other, through a layer or the loss; and whose rows are whose.

Index letters: n example, S a part of the batch.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, keras_internals
from tf_gsnr.gradients import examples


def part_of(n: int):
    """bool `[n]`: which examples are S, some at random, so that it cuts pairs of any order."""
    chosen = np.random.default_rng(0).permutation(n) < n // 2
    return chosen


class Seen(NamedTuple):
    """Mean squares of the gradient of a part's outputs at the rows of that part, and at the others.

    Of both parts, S and the rest, added: an example that acts on all others, while none acts on it,
    shows in the part that it is not in.
    """

    own: tf.Tensor
    foreign: tf.Tensor


def _has_rows(gradient, n):
    """Whether it has a row, or several, for each example, or may have when it is run."""
    if gradient is None or not gradient.shape.rank:
        return False
    rows = gradient.shape[0]
    return rows is None or rows > 0 and rows % n == 0


def _seen(gradient, chosen, n) -> Seen:
    gradient = arrays.rows_of_examples(tf.convert_to_tensor(gradient), n)
    squares = tf.square(tf.cast(gradient, tf.float64))
    squares = tf.reduce_mean(tf.reshape(squares, [n, -1]), 1)
    parts = (tf.reduce_mean(tf.boolean_mask(squares, part)) for part in (chosen, ~chosen))
    return Seen(*(tf.cast(mean, tf.float32) for mean in parts))


def _added(seen) -> Seen | None:
    """Of the parts that something depends on; None without any."""
    there = [s for s in seen if s is not None]
    return Seen(*(tf.add_n(v) for v in zip(*there))) if there else None


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
        seen: list[Seen | None] = []
        for gradient in tape.gradient(target, tensors):
            seen.append(_seen(gradient, chosen, n) if _has_rows(gradient, n) else None)
        parts.append(seen)
    return [_added(both) for both in zip(*parts)]


def _both(n: int):
    chosen = part_of(n)
    return chosen, ~chosen


def mixing_layer(layers, seen):
    """The layer that makes examples depend on each other; None where they do not.

    Args:
      layers, seen: of all layers' outputs, in the order of the forward pass.
    """
    mixed = [k for k, s in enumerate(seen) if s is not None and is_foreign(s)]
    if not mixed:
        return None
    return layers[min(mixed[-1] + 1, len(layers) - 1)]


def is_foreign(seen: Seen) -> bool:
    """Whether S's outputs depend on rows of other examples, beyond rounding."""
    return float(seen.foreign) > 1e-10 * float(seen.own)


def are_scrambled(seen: Seen) -> bool:
    """Whether the rows are not in the order of the examples: S's own matter no more than others."""
    return is_foreign(seen) and float(seen.foreign) > 0.25 * float(seen.own)


def loss_coupling(tape, loss, predictions, n: int):
    """What a random function of the loss's gradient at S's outputs depends on.

    It is the outputs of S alone, unless the loss lets examples act on each other: `Seen`, or None
    where the gradient does not depend on the outputs (a loss that is linear in them).

    Args:
      tape: persistent, of the loss.
      loss: scalar.
    """
    outputs = [p for p in real(predictions) if p.shape.rank and p.shape[0] == n]
    parts: list[Seen | None] = []
    with _meant(), tape:
        slopes = tape.gradient(loss, outputs)
    for chosen in _both(n):
        with _meant(), tape:
            total = [tf.zeros([], tf.float64)]
            for k, gradient in enumerate(slopes):
                if gradient is not None:
                    factors = tf.random.stateless_normal(tf.shape(gradient), [k, 11])
                    terms = tf.boolean_mask(gradient * tf.cast(factors, gradient.dtype), chosen)
                    total.append(tf.cast(tf.reduce_sum(terms), tf.float64))
            target = tf.add_n(total)
        bends = tape.gradient(target, outputs)
        parts += [_seen(gradient, chosen, n) for gradient in bends if gradient is not None]
    return _added(parts)


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


def loss_apart(loss, x, y, predictions, sample_weight, training, n: int) -> list:
    """Whether the loss lets examples act on each other, `[error]` per half of the batch.

    The gradient of the loss of S alone, by S's outputs, is to be that of the whole batch's loss but
    for one common factor (the number of examples, or of valid positions). The error is relative.
    """
    if n < 2:
        return []
    outputs = real(predictions)
    of_batch = _loss_gradient(loss, x, y, predictions, sample_weight, training)
    errors = []
    for rows in (slice(0, n // 2), slice(n // 2, n)):
        data = examples.rows((x if loss.uses_inputs else None, y, sample_weight), rows)
        part = keras.tree.map_structure(lambda p: _masked_rows(p, rows), predictions)  # noqa: B023
        alone = _loss_gradient(loss, data[0], data[1], part, data[2], training)
        among = [g[rows] for g, p in zip(of_batch, outputs) if p.shape.rank]
        alone = [g for g, p in zip(alone, outputs) if p.shape.rank]
        product = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(among, alone)])
        square = tf.add_n([tf.reduce_sum(b * b) for b in alone])
        factor = tf.math.divide_no_nan(product, square)
        error = [tf.reduce_max(tf.abs(a - factor * b)) for a, b in zip(among, alone)]
        size = [tf.reduce_max(tf.abs(a)) for a in among]
        errors.append(tf.math.divide_no_nan(tf.reduce_max(error), tf.reduce_max(size)))
    return errors


def _loss_gradient(loss, x, y, predictions, sample_weight, training):
    """The gradient of a batch's loss by the outputs, as float32 tensors like the real outputs."""
    copies = keras.tree.map_structure(lambda p: _masked_rows(p, slice(None)), predictions)
    outputs = real(copies)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        with keras.StatelessScope():
            value = tf.reduce_sum(loss(x, y, copies, sample_weight, training))
    gradients = tape.gradient(value, outputs, unconnected_gradients="zero")
    return [tf.cast(g, tf.float32) for g in gradients]


def _masked_rows(prediction, rows):
    if not tf.is_tensor(prediction) or not prediction.shape.rank:
        return prediction
    part = tf.identity(prediction[rows])
    mask = keras_internals.mask_of(prediction)
    if mask is not None:
        keras_internals.set_mask(part, mask[rows])
    return part


def real(predictions):
    return [p for p in keras.tree.flatten(predictions) if tf.is_tensor(p) and p.dtype.is_floating]
