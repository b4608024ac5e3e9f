"""One training step: Keras's own, watched.

The forward pass, the loss and the assignments are those of `keras.Model.train_step`, on the user's
own model object and its real variables. The loss L is differentiated once, to the outputs of the
layers; from these gradients the rules make c[n], B times the part of dL/dW that passes through
example n's rows, so that mean_n c[n] = dL/dW for every loss, mask, weight and reduction. Where that
is so on the user's data, the optimiser is given the sum, which saves the gradient by the weights a
second pass; where not, the ordinary gradient.

Index letters: n example, B the global batch size, R replicas, S the factor by which mixed precision
scales the loss.
"""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import capture, conservation, distributed, layerwise, rules
from tf_gsnr.moments import Moments
from tf_gsnr.training.plan import CHECKS, Plan, first_checks


def measured(model, plan: Plan, meter, data, *, every: int = 1, due=True) -> dict:
    """Makes a training step, and shows what is measured in it; returns its logs.

    Args:
      model: a compiled and built Keras model.
      plan: what is known of it; the trace of the first step writes to it.
      meter: a `GSNRMeter`.
      data: what `keras.Model.train_step` is given.
      every: how many steps this one stands for.
      due: whether the meter is to count it; bool or a boolean tensor.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    n = capture.batch_size(x)
    first = not plan.settled
    variables = model.trainable_variables
    units = capture.units_of(model, plan.whole, rules.activation_of)
    with tf.GradientTape(persistent=True) as tape:
        with capture.watching(model, units, tape, n, training=True, all_outputs=first) as found:
            predictions = _called(model, x)
            given = x, y, predictions, sample_weight
            given = as_traced(given, plan.hides_batch_size)
            loss = model._compute_loss(*given, training=True)
        if model._loss_tracker is not None:
            model._loss_tracker.update_state(loss * replicas(), sample_weight=n)
        scaled = model.optimizer.scale_loss(loss)
    watched = found.watched()
    gradients = tape.gradient(scaled, [*watched, *(v.value for v in variables)])
    ordinary = gradients[len(watched) :]
    found.set_gradients(gradients[: len(watched)])

    factor = _global(n) / loss_scale(model.optimizer)  # c[n] = B / S times what passes through n
    scales = layerwise.unit_scales(found.calls, factor)
    by_variable = layerwise.forms_of(found.calls, plan.folds, scales, plan.reasons)
    sums = _sums(model, plan, by_variable, scales, ordinary, n, meter.sign_counts)
    checks = {"status": tf.stack(sums.status)} if plan.pending(variables) else {}
    if first:
        checks |= first_checks(model, plan, tape, found, (x, y, predictions, sample_weight), n)
    plan.missed = sums.missed
    del tape

    model.optimizer.apply_gradients(zip(sums.gradients, variables))
    logs = model.compute_metrics(*given[:3], sample_weight=given[3])
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        # The optimiser skips a step whose scaled gradients overflow, and so does the meter.
        due &= _all_finite(sums.gradients)
    powers = [tf.cast(scales.get(id(v), factor), tf.float32) / factor for v in variables]
    due &= _rows_are_examples(found.calls, n)
    meter.advance(_global(n))
    powers = tf.stack(powers)

    def show(moments):
        meter.update_state(_reduced(moments), model.optimizer, every, powers)

    if tf.get_static_value(due) is True or due is True:
        show(sums.moments)
    else:
        distributed.where(due, show, sums.moments)
    shown = {} if first else meter.result()  # those of the first step are read outside its graph
    return logs | shown | ({CHECKS: checks} if checks else {})


def plain(model, plan, meter, data) -> dict:
    """Makes Keras's training step, which the meter only counts."""
    data = as_traced(data, plan.hides_batch_size)
    logs = type(model).train_step(model, data)
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    meter.advance(_global(capture.batch_size(x)))
    return logs | meter.result()


def as_traced(values, hides_batch_size: bool):
    """Nested tensors as Keras's step meets them in `fit`, where that hides the batch size."""
    return tf.nest.map_structure(_hidden, values) if hides_batch_size else values


def _hidden(value):
    """The tensor, of an unknown number of examples, as Keras's loss and metrics meet it in `fit`.

    Keras weighs the mean of each output's loss by the batch size where that is known when traced.
    """
    if not isinstance(value, tf.Tensor) or tf.executing_eagerly() or not value.shape.rank:
        return value
    if value.shape[0] is None:
        return value
    hidden = tf.raw_ops.PlaceholderWithDefault(input=value, shape=[None, *value.shape[1:]])
    mask = getattr(value, "_keras_mask", None)
    if mask is not None:
        hidden._keras_mask = _hidden(mask)
    return hidden


def _called(model, x):
    return model(x, training=True) if model._call_has_training_arg else model(x)


@dataclasses.dataclass
class _Sums:
    """Per variable: what the optimiser is given, what is measured, and what the check says."""

    gradients: list
    moments: Moments
    status: list
    missed: list


def _sums(model, plan, by_variable, scales, ordinary, n, sign_counts) -> _Sums:
    variables = model.trainable_variables
    used = {key: form for key, form in by_variable.items() if key not in plan.unmeasured}
    mean, m2, up, down = layerwise.combined(variables, used, n, None, sign_counts)
    whole = [tf.cast(scales.get(id(v), 1.0), tf.float32) for v in variables]
    per_sums = tf.unstack(tf.cast(n, tf.float32) / tf.stack(whole))  # times the mean: the sum
    gradients, missed, status = list(ordinary), [], [conservation.UNUSED] * len(variables)
    pending = []
    for j, variable in enumerate(variables):
        key, dtype = id(variable), mean[j].dtype
        if ordinary[j] is None:
            plan.served.setdefault(key, False)
        elif key in plan.unmeasured or key not in used:
            missed += [variable] if key not in plan.unmeasured else []
            mean[j] = m2[j] = tf.fill(variable.shape, tf.constant(np.nan, dtype))
        elif key not in plan.served:
            pending.append(j)
        elif not isinstance(ordinary[j], tf.IndexedSlices):
            # A sparse gradient (an embedding's) stays: optimisers treat its rows apart.
            own = tf.cast(mean[j] * tf.cast(per_sums[j], dtype), ordinary[j].dtype)
            penalty = _penalty_gradient(model, variable) if plan.served[key] else None
            gradients[j] = own if penalty is None else own + penalty
    found = _compared(
        model, [variables[j] for j in pending], pending, mean, m2, ordinary, per_sums, n
    )
    for j, state in zip(pending, found):
        wrong = tf.equal(state, conservation.DIFFERS)
        mean[j], m2[j] = (
            tf.where(wrong, tf.constant(np.nan, v.dtype), v) for v in (mean[j], m2[j])
        )
        status[j] = state
    count = tf.cast(n, tf.int64)
    moments = Moments(count, tf.zeros([], tf.float64), mean, m2, up, down)
    return _Sums(gradients, moments, status, missed)


def _compared(model, variables, places, mean, m2, ordinary, per_sums, n) -> list:
    """The status of these variables, with their regulariser taken out of the ordinary gradient."""
    if not variables:
        return []
    ours, theirs, penalised, variances = [], [], [], []
    for j, variable in zip(places, variables):
        dtype = mean[j].dtype
        per_sum = tf.cast(per_sums[j], dtype)
        gradient = tf.cast(tf.convert_to_tensor(ordinary[j]), dtype) / per_sum
        penalty = _penalty_gradient(model, variable)
        ours.append(mean[j])
        theirs.append(gradient)
        penalised.append(
            gradient if penalty is None else gradient - tf.cast(penalty, dtype) / per_sum
        )
        variances.append(tf.reduce_max(m2[j]))
    count = tf.cast(n, tf.float64)
    variances = tf.unstack(conservation.stacked(variances) / count)
    precision = conservation.precision_of(model)
    status = conservation.compared(variables, precision, ours, theirs, variances)
    if any(v.regularizer is not None for v in variables):
        without = conservation.compared(variables, precision, ours, penalised, variances)
        agrees = tf.constant([v.regularizer is not None for v in variables])
        agrees &= tf.equal(without, conservation.AGREES)
        status = tf.where(agrees, conservation.PENALISED, status)
    return tf.unstack(status)


def _penalty_gradient(model, variable):
    """The gradient of the variable's regulariser, scaled as Keras scales it; None without one."""
    if variable.regularizer is None:
        return None
    with tf.GradientTape() as tape:
        value = tf.convert_to_tensor(variable.value)
        tape.watch(value)
        penalty = model._aggregate_additional_loss(variable.regularizer(value))
        penalty = model.optimizer.scale_loss(penalty)
    return tape.gradient(penalty, value)


def _rows_are_examples(calls, n):
    """Whether an example has as many rows as in the first step, where the graph counts on it."""
    same = [
        tf.equal(tf.shape(z)[0], n * call.fold)
        for call in calls
        if call.used and isinstance(call.fold, int)
        for z in tf.nest.flatten(call.output)[:1]
        if z.shape.rank and z.shape[0] is None
    ]
    return tf.reduce_all(tf.stack(same)) if same else tf.constant(True)


def loss_scale(optimizer):
    """The factor S by which the optimiser wants the loss multiplied."""
    return tf.cast(optimizer.scale_loss(tf.ones([])), tf.float32)


def replicas() -> int:
    """How many replicas run this step in sync."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def _global(n):
    """B as float32: how many examples all replicas have."""
    n = tf.cast(n, tf.float32)
    if replicas() == 1:
        return n
    return tf.distribute.get_replica_context().all_reduce("SUM", n)


def _reduced(moments):
    return distributed.all_reduce(moments) if replicas() > 1 else moments


def _all_finite(gradients):
    """Whether all are finite, on all replicas."""
    values = [getattr(g, "values", g) for g in gradients if g is not None]  # dense or sparse
    wrong = tf.add_n([tf.math.count_nonzero(~tf.math.is_finite(v)) for v in values])
    if replicas() > 1:
        wrong = tf.distribute.get_replica_context().all_reduce("SUM", wrong)
    return tf.equal(wrong, 0)
