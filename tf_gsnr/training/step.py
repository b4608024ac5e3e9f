"""One training step: Keras's own, watched.

The forward pass, the loss and the assignments are those of `keras.Model.train_step`, on the user's
own model object and its real variables. The loss L is differentiated once, to the outputs of the
layers; from these gradients the rules make c[n], B times the part of dL/dW that passes through
example n's rows, so that mean_n c[n] = dL/dW for every loss, mask, weight and reduction. The
optimiser is given the ordinary gradient, whatever is measured: a sum that agrees on one batch may
differ on the next, where a variable is used outside its layer now and then. At every measured step
the two are compared at the parameters that are measured, and in the first step everywhere; a
variable for which they differ is not measured.

Index letters: n example, k sampled parameter, v variable, B the global batch size, S the factor by
which mixed precision scales the loss.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays
from tf_gsnr.gradients import capture, conservation, distributed, layerwise, rules
from tf_gsnr.gradients.dense_forms import BLOCK_BYTES, UNKNOWN_BATCH, concatenated, moments_of
from tf_gsnr.moments import Moments
from tf_gsnr.training import gap
from tf_gsnr.training.plan import CHECKS, Plan, first_checks, operations
from tf_gsnr.training.sample import table


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
            before = operations()
            loss = model._compute_loss(*given, training=True)
        if model._loss_tracker is not None:
            model._loss_tracker.update_state(loss * replicas(), sample_weight=n)
        scaled = model.optimizer.scale_loss(loss)
    end = len(operations())
    watched = found.watched()
    gradients = tape.gradient(scaled, [*watched, *(v.value for v in variables)])
    ordinary = gradients[len(watched) :]
    found.set_gradients(gradients[: len(watched)])

    scale = loss_scale(model.optimizer)
    factor = _global(n) / scale  # c[n] = B / S times what passes through n
    moments, totals = _measured(model, plan, meter, found, ordinary, n, factor)
    checks = {}
    if first:
        of_loss = operations()[len(before) : end]
        checks = first_checks(plan, model, tape, found, scaled, predictions, n, of_loss)
    del tape

    model.optimizer.apply_gradients(zip(ordinary, variables))
    logs = model.compute_metrics(*given[:3], sample_weight=given[3])
    _refuse_names(logs, meter)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        # The optimiser skips a step whose scaled gradients overflow, and so does the meter.
        due &= _all_finite(ordinary)
    due &= _rows_are_examples(found.calls, n)
    meter.advance(_global(n))
    gradients = None
    if "gap_growth" in meter.shown and gap.needs_gradients(model.optimizer):
        gradients = [_reduced_gradient(g, scale) for g in ordinary]

    def show(moments):
        meter.update_state(_reduced(moments), model.optimizer, every, totals, gradients)

    if replicas() == 1 and tf.get_static_value(tf.convert_to_tensor(due)):
        show(moments)
    else:
        distributed.where(due, show, moments)
    return logs | ({CHECKS: checks} if checks else {})


def plain(model, plan, meter, data) -> dict:
    """Makes Keras's training step, which the meter only counts."""
    data = as_traced(data, plan.hides_batch_size)
    logs = type(model).train_step(model, data)
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    meter.advance(_global(capture.batch_size(x)))
    return logs


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


def _refuse_names(logs, meter):
    """Raises ValueError, while the step is traced, where a metric has a name that we show."""
    taken = [name for name in meter.result_names if name in logs]
    if taken:
        raise ValueError(
            f"the model has metrics of the names {taken}, which GSNRModel shows too: rename them, "
            "or leave these out of shown="
        )


def _measured(model, plan, meter, found, ordinary, n, factor):
    """`(Moments of the sampled parameters [k], totals)` of the contributions; see `GSNRMeter`.

    NaN for what is not measured; notes what came of the comparison with the ordinary gradient.
    """
    variables, sample = model.trainable_variables, meter.sample
    scales = layerwise.unit_scales(found.calls) if sample.exact else None
    forms = layerwise.forms_of(found.calls, plan.folds, scales, plan.reasons)
    used, left_out = [], []
    plan.missed = []
    for v, gradient in zip(variables, ordinary):
        form = None if id(v) in plan.unmeasured else forms.get(id(v))
        if gradient is None:
            form = layerwise.Nothing(v)
        elif form is None:
            plan.missed += [] if id(v) in plan.unmeasured else [v]
        used.append(form or layerwise.Nothing(v))
        left_out.append(form is None)
    of = _of_all if sample.exact else _of_sample
    moments = of(sample, used, n, meter.sign_counts, variables, scales)
    mean, m2 = moments.mean[0], moments.m2[0]
    status = _compared(model, sample, used, ordinary, mean, m2, n, first=not plan.settled)
    idle = np.array([o or g is None for o, g in zip(left_out, ordinary)])
    status = tf.where(idle, conservation.UNUSED, status)
    meter.status.assign(tf.maximum(meter.status.value, status))
    wrong = tf.gather(tf.equal(status, conservation.DIFFERS) | left_out, sample.owner)
    mean, m2 = (tf.where(wrong, tf.constant(np.nan, tf.float64), v) for v in (mean, m2))
    factor = tf.cast(factor, tf.float64)
    totals = None
    if replicas() == 1 and not sample.exact and _is_precise(model):
        totals = _totals(sample, used, ordinary, n) * tf.square(factor)
    moments = moments._replace(mean=[mean * factor], m2=[m2 * tf.square(factor)])
    return moments, totals


def _of_sample(sample, forms, n, sign_counts, variables, scales):
    """`Moments` of float64 vectors `[k]`, from the gradients of each example at these places."""
    matrices, columns, found = [], [], {}
    for v, (form, there) in enumerate(zip(forms, sample.places)):
        found[v] = form.moments_at(there, n, sign_counts)
        if found[v] is None:
            matrices.append((form, there))
            columns.append(v)
    dtype = tf.float64 if any(f.dtype == tf.float64 for f in forms) else tf.float32
    parts = []
    for group in _groups(matrices, n):
        with tf.control_dependencies(tf.nest.flatten(parts[-1:])):
            each = [tf.cast(form.sample(there), dtype) for form, there in group]
            parts.append(moments_of(concatenated(each, 1), n, sign_counts))
    if parts:
        sizes = [there.size for _, there in matrices]
        split = [tf.split(concatenated(p, 0), sizes) for p in zip(*parts)]
        found |= dict(zip(columns, zip(*split)))
    values = [arrays.flat(v) for v in zip(*(found[v] for v in range(len(forms))))]
    mean, m2, *signs = values
    signs = [[v] for v in signs] or [[], []]
    return Moments(tf.cast(n, tf.int64), tf.zeros([], tf.float64), [mean], [m2], *signs)


def _groups(pairs, n):
    """The forms and their places, in groups of which all gradients are in memory together."""
    groups, size = [], 0
    examples = n if isinstance(n, int) else UNKNOWN_BATCH
    for form, there in pairs:
        size += there.size * examples * 8
        if not groups or size > BLOCK_BYTES:
            groups.append([])
            size = there.size * examples * 8
        groups[-1].append((form, there))
    return groups


def _of_all(sample, forms, n, sign_counts, variables, scales):
    """`Moments` of float64 vectors, from the forms' own moments; `scales` are taken out again."""
    by_variable = {id(v): form for v, form in zip(variables, forms)}
    mean, m2, *signs = layerwise.combined(variables, by_variable, n, None, sign_counts)
    powers = [tf.cast(scales.get(id(v), 1.0), tf.float64) for v in variables]
    mean = sample.take(mean) / tf.gather(tf.stack(powers), sample.owner)
    m2 = sample.take(m2) / tf.square(tf.gather(tf.stack(powers), sample.owner))
    signs = [[arrays.flat(v)] if v else [] for v in signs]
    return Moments(tf.cast(n, tf.int64), tf.zeros([], tf.float64), [mean], [m2], *signs)


CANCELS_BELOW = 0.1  # of sum g^2: less of it is better told from centred gradients
UNDERFLOWS_BELOW = 1e-28  # a sum of squares, some of which float32 may have lost


def _totals(sample, forms, ordinary, n):
    """|g|^2 and sum m2 of whole variables, float64 `[2, v]`; NaN where a sample has to do."""
    n, nothing = tf.cast(n, tf.float64), tf.constant(np.nan, tf.float64)
    found = []
    for form, there, gradient in zip(forms, sample.places, ordinary):
        squares = None if there.whole or gradient is None else form.cheap_squares()
        if squares is None:
            found.append(tf.stack([nothing, nothing]))
            continue
        if isinstance(gradient, tf.IndexedSlices) and _are_few(gradient, there.shape):
            whole = table(gradient, there.shape).cheap_squares()
        else:
            whole = tf.cast(2 * tf.nn.l2_loss(tf.convert_to_tensor(gradient)), tf.float64)
        m2 = squares - whole / n
        clear = (m2 > CANCELS_BELOW * squares) & (tf.minimum(squares, whole) > UNDERFLOWS_BELOW)
        found.append(tf.where(clear, tf.stack([whole / n**2, m2]), nothing))
    return tf.stack(found, 1)


def _are_few(slices, shape):
    """Whether so few rows of the table have a gradient that they are not to be made dense."""
    rows = slices.indices.shape.num_elements()
    return rows is not None and 4 * rows < shape[0]


def _is_precise(model):
    return "16" not in conservation.precision_of(model)


def _compared(model, sample, forms, ordinary, mean, m2, n, first):
    """Whether contributions add up to the ordinary gradient, int32 `[v]`; see `conservation`.

    At the sampled places; in the first step everywhere.
    """
    variables, count = model.trainable_variables, tf.cast(n, tf.float64)
    precision = conservation.precision_of(model)
    variances = sample.largest(m2) / count
    totals = {}
    if first:
        totals = {i: forms[i].total() for i, p in enumerate(sample.places) if not p.whole}

    def status_of(gradients):
        theirs = sample.take(gradients) / count
        sizes = [sample.largest(tf.abs(v)) for v in (mean - theirs, theirs, mean)]
        if totals:
            zeros = [tf.zeros([], tf.float64)] * 3
            whole = [
                _largest(totals[i], g, count) if i in totals and g is not None else zeros
                for i, g in enumerate(gradients)
            ]
            sizes = [tf.maximum(*pair) for pair in zip(sizes, map(tf.stack, zip(*whole)))]
        return conservation.judged(variables, precision, *sizes, variances)

    status = status_of(ordinary)
    penalties = [_penalty_gradient(model, v) for v in variables]
    if any(p is not None for p in penalties):
        # A compute_loss of the user's may leave the penalties out: either will do.
        pairs = zip(ordinary, penalties)
        without = [
            g if g is None or p is None else tf.convert_to_tensor(g) - tf.cast(p, g.dtype)
            for g, p in pairs
        ]
        without = status_of(without)
        status = tf.where(tf.equal(without, conservation.AGREES), without, status)
    return status


def _largest(ours, theirs, count):
    """Of the difference, of theirs and of ours the largest entry, float64, by one example."""
    theirs = tf.cast(tf.convert_to_tensor(theirs), ours.dtype)
    ends = [(tf.reduce_max(v), -tf.reduce_min(v)) for v in (ours - theirs, theirs, ours)]
    return [tf.cast(tf.maximum(*pair), tf.float64) / count for pair in ends]


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


def _reduced_gradient(gradient, scale):
    """Dense, of the whole batch, without the factor of mixed precision; None as it is."""
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    gradient /= tf.cast(scale, gradient.dtype)
    if replicas() == 1:
        return gradient
    return tf.distribute.get_replica_context().all_reduce("SUM", gradient)


def _reduced(moments):
    return distributed.all_reduce(moments) if replicas() > 1 else moments


def _all_finite(gradients):
    """Whether all are finite, on all replicas."""
    values = [getattr(g, "values", g) for g in gradients if g is not None]  # dense or sparse
    wrong = tf.add_n([tf.math.count_nonzero(~tf.math.is_finite(v)) for v in values])
    if replicas() > 1:
        wrong = tf.distribute.get_replica_context().all_reduce("SUM", wrong)
    return tf.equal(wrong, 0)
