"""From any Keras loss to one number per example: example n's own loss, never divided by the batch.

Index letters: n example, t any further axis of the targets (position, pixel).
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf


def per_example_loss(loss, model=None) -> Callable:
    """Returns `fn(y_true, y_pred, sample_weight=None) -> [n]`, the loss of each example.

    The loss of an example is the mean over its own positions t, each multiplied by its sample
    weight and left out where Keras's mask hides it; so it is what Keras's `"sum_over_batch_size"`
    reduction returns for a batch of that one example. With several outputs the losses add up,
    multiplied by the compiled `loss_weights`. Penalties of the weights (regularisers, `add_loss`)
    are no part of it: they are the same for every example.

    Args:
      loss: a Keras loss, its name, a callable `(y_true, y_pred) -> [n]` or `[n, ...]`, or, for a
        model with several outputs, a list or dict of them; None means the model's compiled loss.
      model: the Keras model, for its compiled loss and the names of its outputs.

    Raises:
      ValueError: no loss given and none compiled; a loss that is not one number per example; losses
        that do not fit the outputs.

    Example:

    >>> fn = per_example_loss("mse")
    >>> fn(tf.constant([[0.0], [0.0]]), tf.constant([[1.0], [3.0]])).numpy().tolist()
    [1.0, 9.0]
    """
    if getattr(loss, "is_per_example", False):
        return loss
    weights = None
    if loss is None:
        loss = getattr(model, "loss", None)
        compiled = getattr(model, "_compile_loss", None)  # Keras has no public name for it
        weights = getattr(compiled, "_user_loss_weights", None)
        if loss is None:
            raise ValueError(
                f"loss=None, and model {getattr(model, 'name', model)!r} is not compiled with one: "
                "pass loss= a Keras loss, its name, or a callable (y_true, y_pred) -> [batch], or "
                "call model.compile(loss=...) first"
            )
    names = getattr(model, "output_names", None)

    def total(y_true, y_pred, sample_weight=None):
        predictions, keys = outputs(y_pred, names)
        n = len(predictions)
        if n == 1:
            single = select(loss, keys, n, "loss") if isinstance(loss, (dict, list)) else [loss]
            targets = select(y_true, keys, n, "y") if isinstance(y_true, dict) else [y_true]
            parts = [
                _one_output(_as_function(single[0]), targets[0], predictions[0], sample_weight)
            ]
        else:
            losses = select(loss, keys, n, "loss") if isinstance(loss, (dict, list)) else [loss] * n
            targets = select(y_true, keys, n, "y")
            shared = not isinstance(sample_weight, (dict, list, tuple))
            sample_weights = (
                [sample_weight] * n if shared else select(sample_weight, keys, n, "sample_weight")
            )
            parts = [
                None if one is None else _one_output(_as_function(one), true, pred, weight)
                for one, true, pred, weight in zip(losses, targets, predictions, sample_weights)
            ]
        factors = [1.0] * n if weights is None else select(weights, keys, n, "loss_weights")
        parts = [(part, f) for part, f in zip(parts, factors) if part is not None]
        return tf.add_n([part * tf.cast(f, part.dtype) for part, f in parts])

    total.is_per_example = True
    return total


def _as_function(loss) -> Callable:
    if isinstance(loss, keras.losses.Loss):
        return loss.call  # what comes before the reduction
    if isinstance(loss, (str, dict)):
        loss = keras.losses.get(loss)
        return loss.call if isinstance(loss, keras.losses.Loss) else loss
    if callable(loss):
        return loss
    raise ValueError(
        f"loss={loss!r}: expected a Keras loss, its name, or a callable (y_true, y_pred) -> [batch]"
    )


def _one_output(loss_fn, y_true, y_pred, sample_weight):
    mask = getattr(y_pred, "_keras_mask", None)
    y_pred = tf.convert_to_tensor(y_pred)
    if y_pred.dtype in (tf.float16, tf.bfloat16):
        y_pred = tf.cast(y_pred, tf.float32)  # as Keras does
    y_true = tf.convert_to_tensor(y_true)
    if y_true.dtype.is_floating:
        y_true = tf.cast(y_true, y_pred.dtype)
    if y_true.shape.rank == y_pred.shape.rank - 1 and y_pred.shape[-1] == 1:
        y_true = y_true[..., tf.newaxis]  # as Keras does; [n] against [n, 1] would broadcast
    values = tf.convert_to_tensor(loss_fn(y_true, y_pred))
    if values.shape.rank == 0 or (
        values.shape[0] is not None
        and y_pred.shape[0] is not None
        and values.shape[0] != y_pred.shape[0]
    ):
        raise ValueError(
            f"the loss {getattr(loss_fn, '__qualname__', loss_fn)!r} returned shape {values.shape} "
            f"for predictions of shape {y_pred.shape}; expected one value per example, "
            "[batch] or [batch, ...]: leave the reduction over the batch out of it"
        )
    weights = tf.ones([], values.dtype)
    if mask is not None:
        mask = tf.cast(_expand(mask, values.shape.rank), values.dtype)
        weights = mask * tf.ones_like(values)
        # Keras divides by the number of positions that count, not by all of them.
        axes = list(range(1, values.shape.rank))
        size = tf.reduce_sum(tf.ones_like(values), axis=axes, keepdims=True)
        weights *= size / tf.maximum(tf.reduce_sum(weights, axis=axes, keepdims=True), 1)
        values = tf.where(weights > 0, values, 0)
    if sample_weight is not None:
        weights *= _expand(tf.cast(sample_weight, values.dtype), values.shape.rank)
    values *= weights
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))


def _expand(array, rank):
    array = tf.convert_to_tensor(array)
    if array.shape.rank == rank + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    while array.shape.rank < rank:
        array = array[..., tf.newaxis]
    return array


def outputs(y_pred, names):
    """The model's outputs as a flat list, and the key of each in a dict of losses or targets."""
    if isinstance(y_pred, dict):
        keys = list(y_pred)
        return [y_pred[k] for k in keys], keys
    if isinstance(y_pred, (list, tuple)):
        return list(y_pred), names or list(range(len(y_pred)))
    return [y_pred], names or [0]


def per_output(values, keys, argument) -> list:
    """One entry per output of a nested argument; what is not nested serves them all."""
    if isinstance(values, (dict, list, tuple)):
        return select(values, keys, len(keys), argument)
    return [values] * len(keys)


def select(values, keys, n, argument):
    """One entry of `values` (a dict by output name, or a sequence) per output."""
    if isinstance(values, dict):
        unknown = set(values) - set(keys)
        if unknown:
            raise ValueError(f"{argument} names the outputs {sorted(unknown)}; there are: {keys}")
        return [values.get(k, 1.0 if argument == "loss_weights" else None) for k in keys]
    if isinstance(values, (list, tuple)) and len(values) == n:
        return list(values)
    if argument == "loss_weights" and n == 1:
        return [values]
    raise ValueError(
        f"{argument}: expected a list of {n} entries or a dict of {keys}, got {values!r}"
    )
