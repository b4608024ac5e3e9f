"""One training step in two ways that end in the same gradient: plain, and measured per example.

Index letters: n example, t any further axis of the targets (position, pixel), B the batch size,
R the number of replicas, S the factor by which mixed precision scales the loss.

Keras trains on `L = c sum_nt w[n,t] l[n,t]`, where c depends on the loss's `reduction` and on the
mask. The measured step writes it as the mean of the examples' own losses, each times a weight f[n]
(`example_weights`), so that the mean of the per-example gradients is the gradient of L. Penalties
of the weights or activities are no example's own: their gradient is added from a plain tape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_gsnr.gradients import losses
from tf_gsnr.moments import Moments

LARGEST_SCALE = 2.0**40  # by which gradients are multiplied while their squares are summed


class Found(NamedTuple):
    """What either way of a step finds, before anything is assigned.

    Attributes:
      gradients: what the optimiser is to be given, scaled by S and divided by R as Keras does;
        None where a variable has no part in the loss.
      loss: the loss that Keras reports, scalar.
      predictions: of the model, for the compiled metrics.
      updates: per variable of `state`, its value after the forward pass.
      moments: of the unscaled per-example gradients; None from the plain step.
    """

    gradients: list
    loss: Any
    predictions: Any
    updates: list
    moments: Moments | None


def plain(model, state, x, y, sample_weight) -> Found:
    """The forward and backward pass of `keras.Model.train_step`; assigns nothing.

    Args:
      model: a compiled `keras.Model`.
      state: the variables that a forward pass and a loss may assign.
    """
    found, _, _ = _plain(model, state, x, y, sample_weight)
    return found


def _plain(model, state, x, y, sample_weight):
    with tf.GradientTape(persistent=True) as tape:
        # In the scope, Keras looks up only there what its regularisers are to penalise.
        penalised = [v for v in model.trainable_variables if v.regularizer is not None]
        values = [(v, v.value) for v in penalised]
        with keras.StatelessScope(values, collect_losses=True) as scope:
            predictions = model(x, training=True)
            loss = model.compute_loss(x, y, predictions, sample_weight, training=True)
            penalties = [tf.reduce_sum(tf.cast(p, loss.dtype)) for p in model.losses]
        penalty = tf.add_n(penalties) / replicas() if penalties else None
        scale = loss_scale(model.optimizer)
        scaled = loss if scale is None else loss * tf.cast(scale, loss.dtype)
        scaled_penalty = penalty if scale is None or penalty is None else penalty * scale
    variables = model.trainable_variables
    gradients = tape.gradient(scaled, variables)
    of_penalty = None if penalty is None else tape.gradient(scaled_penalty, variables)
    found = Found(gradients, loss, predictions, _values(scope, state), None)
    return found, penalty, of_penalty


def measured(model, measure, network, state, x, y, sample_weight) -> Found:
    """The same step by way of the per-example gradients.

    Args:
      model: a compiled `keras.Model` around `network`.
      measure: an engine's function (see `gradients.contract`) for `network`, in training mode.
      network: the model whose `trainable_variables` are measured.
      state: as in `plain`.
    """
    # What a plain step knows and an engine does not: which variables have no gradient or a sparse
    # one, the masks, the penalties. In a graph only what is used of it is ever computed.
    shadow, penalty, of_penalty = _plain(model, state, x, y, sample_weight)
    batch = tf.shape(tf.nest.flatten(x)[0])[0]
    n = tf.cast(tf.maximum(batch, 1), tf.float32)
    scale = loss_scale(model.optimizer)
    # As small as in the plain step, lest gradients overflow; and their squares must not either.
    factor = None if scale is None else tf.minimum(scale, LARGEST_SCALE) / n
    names = getattr(network, "output_names", None)
    weights = example_weights(model.loss, shadow.predictions, sample_weight, batch, factor, names)
    found = measure(x, y, sample_weight=weights)

    gradients = []
    for index, mean in enumerate(found.moments.mean):
        like = shadow.gradients[index]
        if like is None or isinstance(like, tf.IndexedSlices):
            # Keras's optimisers treat the repeated rows of a sparse gradient (an embedding's) one
            # by one, where squaring or clipping a dense one would add them first.
            gradients.append(like)
            continue
        gradient = mean if scale is None else mean * tf.cast(scale / factor, mean.dtype)
        gradient /= replicas()
        if of_penalty is not None and of_penalty[index] is not None:
            gradient += tf.convert_to_tensor(of_penalty[index])
        gradients.append(tf.cast(gradient, like.dtype))

    loss = tf.reduce_sum(found.losses) / tf.cast(n * replicas(), found.losses.dtype)
    loss = tf.cast(loss if factor is None else loss / tf.cast(factor, loss.dtype), tf.float32)
    loss = loss if penalty is None else loss + tf.cast(penalty, loss.dtype)
    known = {id(v): value for v, value in zip(network.non_trainable_variables, found.updates)}
    updates = [known.get(id(v), value) for v, value in zip(state, shadow.updates)]
    moments = found.moments if factor is None else _unscaled(found.moments, factor)
    predictions = _with_masks(found.predictions, shadow.predictions)
    return Found(gradients, loss, predictions, updates, moments)


def either(condition, measured, plain) -> Found:
    """Whichever of the two steps is called for, in a graph."""
    absent = []  # gradients that are None, and so pass no tf.cond

    def packed(way):
        def branch():
            found = way()
            absent[:] = [g is None for g in found.gradients]
            gradients = [g for g in found.gradients if g is not None]
            masks = [getattr(p, "_keras_mask", None) for p in tf.nest.flatten(found.predictions)]
            masks = [tf.zeros([0], tf.bool) if m is None else m for m in masks]
            return found._replace(gradients=gradients), masks

        return branch

    found, masks = tf.cond(condition, packed(measured), packed(plain))
    for prediction, mask in zip(tf.nest.flatten(found.predictions), masks):
        if mask.shape.rank is None or mask.shape != [0]:
            prediction._keras_mask = mask
    gradients = iter(found.gradients)
    return found._replace(gradients=[None if none else next(gradients) for none in absent])


def example_weights(loss, predictions, sample_weight, batch, factor=None, names=None):
    """Weights f[n] with which `mean_n f[n] l[n]` is the loss that Keras trains on.

        "sum_over_batch_size", "mean":   f = w;  with a mask  f = w valid[n] B / sum valid
        "sum":                           f = w B R             (Keras does not divide it by R)
        "mean_with_sample_weight":       f = w B / sum w

    Args:
      loss: the compiled loss, nested per output.
      predictions: nested `[B, ...]`, with Keras's masks where it set them.
      sample_weight: nested `[B]` or `[B, t]`, or None.
      batch: B, integer scalar.
      factor: scalar factor of all weights; None for 1.
      names: the names of the outputs.

    Returns:
      Like `sample_weight`, a list where there are several outputs; None where every weight is 1.

    Raises:
      ValueError: a reduction under which the loss is no mean over examples.
    """
    outputs, keys = losses.outputs(predictions, names)
    each = losses.per_output(loss, keys, "loss")
    given = losses.per_output(sample_weight, keys, "sample_weight")
    weights = [_output_weights(*terms, batch, factor) for terms in zip(each, outputs, given)]
    if all(w is None for w in weights):
        return None
    weights = [tf.ones([batch]) if w is None else w for w in weights]
    return weights[0] if len(weights) == 1 else weights


def _output_weights(loss, prediction, weight, batch, factor):
    reduction = getattr(loss, "reduction", "sum_over_batch_size")
    mask = getattr(prediction, "_keras_mask", None)
    n = tf.cast(batch, tf.float32)
    scale = None
    if mask is not None:
        valid = tf.reduce_sum(tf.reshape(tf.cast(mask, tf.float32), [batch, -1]), axis=1)
        scale = tf.math.divide_no_nan(valid * n, tf.reduce_sum(valid))
    if reduction not in ("sum_over_batch_size", "mean"):
        if reduction not in ("sum", "mean_with_sample_weight"):
            raise ValueError(
                f"the loss {loss.name!r} has reduction={reduction!r}, so that there is no one "
                "number to train on; use reduction='sum_over_batch_size' (Keras's default)"
            )
        if prediction.shape.rank > 2 or mask is not None:
            raise ValueError(
                f"the loss {loss.name!r} has reduction={reduction!r} on predictions of shape "
                f"{prediction.shape} (masked: {mask is not None}): supported for one prediction "
                "per example only; use reduction='sum_over_batch_size' (Keras's default)"
            )
        if reduction == "sum":
            scale = n * replicas()
        elif weight is not None:
            scale = tf.math.divide_no_nan(n, tf.reduce_sum(tf.cast(weight, tf.float32)))
    factors = [f for f in (scale, factor) if f is not None]
    if not factors:
        return weight
    total = tf.ones([batch])
    for f in factors:
        total *= tf.cast(f, tf.float32)
    if weight is None:
        return total
    weight = tf.cast(weight, tf.float32)
    return weight * tf.reshape(total, [-1] + [1] * (weight.shape.rank - 1))


def loss_scale(optimizer):
    """The factor S by which the optimiser wants the loss multiplied; None for none."""
    dynamic = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not dynamic and getattr(optimizer, "loss_scale_factor", None) is None:
        return None
    return tf.cast(optimizer.scale_loss(tf.ones([])), tf.float32)


def replicas() -> int:
    """How many replicas run this step in sync."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def _unscaled(moments, factor):
    mean = [v / tf.cast(factor, v.dtype) for v in moments.mean]
    m2 = [v / tf.cast(factor, v.dtype) / tf.cast(factor, v.dtype) for v in moments.m2]
    loss = moments.loss / tf.cast(factor, moments.loss.dtype)
    return moments._replace(loss=loss, mean=mean, m2=m2)


def _values(scope, variables):
    """What the variables would be if the scope's assignments had been made."""
    values = [(v, scope.get_current_value(v)) for v in variables]
    return [tf.convert_to_tensor(v.value if value is None else value) for v, value in values]


def _with_masks(predictions, like):
    for one, other in zip(tf.nest.flatten(predictions), tf.nest.flatten(like)):
        mask = getattr(other, "_keras_mask", None)
        if mask is not None:
            one._keras_mask = mask
    return predictions
