"""Trust, on the user's own batch: per-example gradients add up, and each is its example's own.

Three questions. Is the sum of what the rules make of a layer the ordinary gradient, which the real
variables have without a scope? Does an example's part depend on who else is in the batch, through
a layer or through the loss? Are a layer's rows in the order of the examples?
Index letters: n example, S a part of the batch.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import capture, contract, examples, losses

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}  # of others (half precision): 0.1
ROUNDING = {"float64": 1e-12, "float32": 1e-5}  # of sums of gradients that cancel; others 0.05
# What a comparison may find. PENALISED: it agrees, but for the gradient of its regulariser.
ZERO, AGREES, DIFFERS, UNUSED, PENALISED = range(5)


class NotConserved(ValueError):
    """A model that the layer-wise engine cannot measure; the message names what is concerned."""


def precision_of(model) -> str:
    """The least precise dtype in which a layer of the model computes."""
    kinds = {layer.compute_dtype for layer in contract.sublayers(model)} - {None}
    return next((kind for kind in kinds if "16" in kind), model.variable_dtype)


def compared(precision, ours, theirs, noise):
    """Whether a sum of per-example gradients is the ordinary gradient: `ZERO`, `AGREES`, `DIFFERS`.

    `ZERO`, where both are exactly zero or one is not finite, is no agreement: nothing was compared
    with nothing.

    Args:
      precision: of `precision_of`.
      ours, theirs: the mean over examples, of the variable's shape.
      noise: the largest root mean square of the examples' gradients, over the parameters of the
        layer: what cancels (a bias before a batch norm) is known to the rounding of that only.
    """
    error, size, own = (
        tf.cast(tf.reduce_max(tf.abs(v)), tf.float64) for v in (ours - theirs, theirs, ours)
    )
    noise = tf.cast(noise, tf.float64)
    small = TOLERANCE.get(precision, 0.1) * size + ROUNDING.get(precision, 0.05) * noise
    nothing = (size == 0) & (own == 0) | ~tf.math.is_finite(error)
    return tf.where(nothing, ZERO, tf.where(error <= small, AGREES, DIFFERS))


def by_layer(variables, spreads) -> list:
    """Per variable the largest of the spreads in its layer."""
    largest = {}
    for variable, spread in zip(variables, spreads):
        layer = variable.path.rpartition("/")[0]
        largest[layer] = tf.maximum(tf.cast(spread, tf.float64), largest.get(layer, 0.0))
    return [largest[v.path.rpartition("/")[0]] for v in variables]


def part_of(n: int):
    """bool `[n]`: which examples are S, some at random, so that it cuts pairs of any order."""
    chosen = np.random.default_rng(0).permutation(n) < n // 2
    return chosen


class Seen(NamedTuple):
    """Mean squares of the gradient of S's outputs at the rows of S, and at all other rows."""

    own: tf.Tensor
    foreign: tf.Tensor


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
    chosen = part_of(n)
    with tape:
        total = [tf.zeros([], tf.float64)]
        for k, output in enumerate(_real(predictions)):
            if output.shape.rank and output.shape[0] == n:
                factors = tf.random.stateless_normal(tf.shape(output), [k, 7])
                terms = tf.boolean_mask(output * tf.cast(factors, output.dtype), chosen)
                total.append(tf.cast(tf.reduce_sum(terms), tf.float64))
        target = tf.add_n(total)
    found = []
    for gradient in tape.gradient(target, tensors):
        rows = None if gradient is None or not gradient.shape.rank else gradient.shape[0]
        if not rows or rows % n:
            found.append(None)
            continue
        squares = tf.square(tf.cast(tf.convert_to_tensor(gradient), tf.float32))
        squares = tf.reduce_mean(tf.reshape(squares, [n, -1]), 1)
        found.append(
            Seen(
                tf.reduce_mean(tf.boolean_mask(squares, chosen)),
                tf.reduce_mean(tf.boolean_mask(squares, ~chosen)),
            )
        )
    return found


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


def loss_apart(loss, x, y, predictions, sample_weight, training, n: int) -> list:
    """Whether the loss lets examples act on each other, `[error]` per half of the batch.

    The gradient of the loss of S alone, by S's outputs, is to be that of the whole batch's loss but
    for one common factor (the number of examples, or of valid positions). The error is relative.
    """
    if n < 2:
        return []
    outputs = _real(predictions)
    whole = _loss_gradient(loss, x, y, predictions, sample_weight, training)
    errors = []
    for rows in (slice(0, n // 2), slice(n // 2, n)):
        data = examples.rows((x if loss.uses_inputs else None, y, sample_weight), rows)
        part = keras.tree.map_structure(lambda p: _masked_rows(p, rows), predictions)  # noqa: B023
        alone = _loss_gradient(loss, data[0], data[1], part, data[2], training)
        among = [g[rows] for g, p in zip(whole, outputs) if p.shape.rank]
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
    outputs = _real(copies)
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
    mask = getattr(prediction, "_keras_mask", None)
    if mask is not None:
        part._keras_mask = mask[rows]
    return part


def _real(predictions):
    return [p for p in keras.tree.flatten(predictions) if tf.is_tensor(p) and p.dtype.is_floating]


def kept_variables(model):
    """Afterwards every `tf.Variable` that the layers keep beside Keras's is as before."""
    return _restored(
        value
        for layer in contract.sublayers(model)
        for value in vars(layer).values()
        if isinstance(value, tf.Variable)
    )


@contextlib.contextmanager
def _restored(variables):
    before = [(v, v.read_value()) for v in {id(v): v for v in variables}.values()]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


class Examined(NamedTuple):
    """What an ordinary pass over a batch shows.

    Attributes:
      gradients: per trainable variable, the gradient summed over the examples; None where the loss
        does not depend on it.
      mixing: the layer through which examples act on each other, or None.
      scrambled: a layer whose rows are not in the order of the examples, or None.
      loss_acts: whether the loss lets examples act on each other.
    """

    gradients: list
    mixing: keras.layers.Layer | None
    scrambled: keras.layers.Layer | None
    loss_acts: bool


def examine(model, loss, batch, seeds, modes, *, training, contributions) -> Examined:
    """Runs a batch eagerly, as Keras would: the real variables, without a scope.

    Args:
      batch: `(x, y, sample_weight, valid)`.
      seeds: a value per `contract.seed_variables(model)`.
      modes: the context of the layers' modes.
      contributions: whether the loss of the whole batch, times its number of examples, is meant.
    """
    x, y, sample_weight, valid = batch
    n = int(examples.count((x, y)))
    with _restored(v.value for v in model.variables), modes:
        _assign_seeds(model, seeds)
        with tf.GradientTape(persistent=True) as tape:
            with capture.watching(model, [], tape, n, training=training, all_outputs=True) as found:
                predictions = model(x, training=training)
            adds = losses.adds(model) and not contributions
            if adds:  # of which there is one for all examples
                value = tf.zeros([])
            elif contributions:
                value = n * tf.reduce_sum(loss(x, y, predictions, sample_weight, training))
            else:
                each = losses.of_examples(loss, x, y, predictions, sample_weight, training)
                value = tf.reduce_sum(tf.where(valid, each, 0))
        gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
        gradients = [None if g is None else np.asarray(tf.convert_to_tensor(g)) for g in gradients]
        layers, outputs = zip(*found.outputs) if found.outputs else ((), ())
        seen = rows_seen(tape, predictions, list(outputs), n) if n > 1 else []
        del tape
        mixing = mixing_layer(layers, seen) if seen else None
        scrambled = None
        if n > 1 and not (training and contract.seed_variables(model)) and _sizes_vary(model):
            _assign_seeds(model, seeds)
            few = model(examples.rows(x, slice(0, n // 2)), training=training)
            if _same(few, predictions):
                own = [
                    layer
                    for layer, one in zip(layers, seen)
                    if one is not None and is_foreign(one) and layer.trainable_variables
                ]
                mixing, scrambled = None, own[0] if own else None
            else:
                mixing = mixing or model
        errors = []
        if not adds:
            errors = loss_apart(loss, x, y, predictions, sample_weight, training, n)
    return Examined(gradients, mixing, scrambled, any(float(e) > 1e-3 for e in errors))


def _assign_seeds(model, seeds):
    for variable, seed in zip(contract.seed_variables(model), seeds):
        variable.assign(seed)


def _sizes_vary(model) -> bool:
    """Whether the model takes batches of any number of examples."""
    return examples.fixed_batch_size(model) is None


def _same(few, predictions) -> bool:
    """Whether the outputs of the first examples alone are those within the batch."""
    for a, b in zip(_real(few), _real(predictions)):
        if not a.shape.rank or not b.shape.rank:
            return False
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)[: a.shape[0]]
        loose = 0.1 if np.finfo(_real(few)[0].dtype.as_numpy_dtype).bits == 16 else 1e-3
        if a.shape != b.shape or not np.allclose(a, b, rtol=loose, atol=loose * np.abs(b).max()):
            return False
    return True
