"""The contributions of a step's examples: their moments, and whether they add up.

c[n] is factor times what passes through example n's rows. Index letters: n example, k sampled
parameter, v variable.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, keras_internals
from tf_gsnr.gradients import conservation, network
from tf_gsnr.gradients.layerwise import dense_forms
from tf_gsnr.gradients.layerwise import engine as layerwise
from tf_gsnr.gradients.layerwise.dense_forms import concatenated, moments_of
from tf_gsnr.moments import Moments
from tf_gsnr.training.sample import table


def measured(model, plan, meter, calls, ordinary, n, factor, alone):
    """`(moments, totals)` of a step's contributions, as `GSNRMeter.update_state` takes them.

    NaN for what is not measured. What came of the comparison is left in the meter's `status`, what
    no call accounts for in the plan's `missed`.

    Args:
      model, plan, meter: as in `step.measured`.
      calls: what was captured, with the gradients of the scaled loss at the layers' outputs.
      ordinary: the gradients of the scaled loss by the model's trainable variables.
      n: the number of examples of this replica.
      factor: B / S.
      alone: whether there is one replica, whose gradient is that of the batch.
    """
    variables, sample = model.trainable_variables, meter.sample
    scales = layerwise.unit_scales(calls) if sample.exact else None
    errors = {}
    forms = layerwise.forms_of(calls, plan.folds, scales, errors, plan.uneven)
    plan.reasons |= {key: " ".join(str(error).split()) for key, error in errors.items()}
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
    if alone and not sample.exact and _is_precise(model):
        totals = _totals(sample, used, ordinary, n) * tf.square(factor)
    moments = moments._replace(mean=[mean * factor], m2=[m2 * tf.square(factor)])
    return moments, totals


def _of_sample(sample, forms, n, sign_counts, variables, scales):
    """`Moments` of float64 vectors `[k]`, from the gradients of each example at these places."""
    matrices, columns, by_variable = [], [], {}
    for v, (form, there) in enumerate(zip(forms, sample.places)):
        by_variable[v] = form.moments_at(there, n, sign_counts)
        if by_variable[v] is None:
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
        by_variable |= dict(zip(columns, zip(*split)))
    values = [arrays.flat(v) for v in zip(*(by_variable[v] for v in range(len(forms))))]
    mean, m2, *signs = values
    signs = [[v] for v in signs] or [[], []]
    return Moments(tf.cast(n, tf.int64), tf.zeros([], tf.float64), [mean], [m2], *signs)


def _groups(pairs, n):
    """The forms and their places, in groups of which all gradients are in memory together."""
    groups, size = [], 0
    examples = n if isinstance(n, int) else dense_forms.UNKNOWN_BATCH
    for form, there in pairs:
        size += there.size * examples * 8
        if not groups or size > dense_forms.BLOCK_BYTES:
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
    sums = []
    for form, there, gradient in zip(forms, sample.places, ordinary):
        squares = None if there.whole or gradient is None else form.cheap_squares()
        if squares is None:
            sums.append(tf.stack([nothing, nothing]))
            continue
        if isinstance(gradient, tf.IndexedSlices) and _are_few(gradient, there.shape):
            whole = table(gradient, there.shape).cheap_squares()
        else:
            whole = tf.cast(2 * tf.nn.l2_loss(tf.convert_to_tensor(gradient)), tf.float64)
        m2 = squares - whole / n
        clear = (m2 > CANCELS_BELOW * squares) & (tf.minimum(squares, whole) > UNDERFLOWS_BELOW)
        sums.append(tf.where(clear, tf.stack([whole / n**2, m2]), nothing))
    return tf.stack(sums, 1)


def _are_few(slices, shape):
    """Whether so few rows of the table have a gradient that they are not to be made dense."""
    rows = slices.indices.shape.num_elements()
    return rows is not None and 4 * rows < shape[0]


def _is_precise(model):
    return "16" not in network.precision(model)


def _compared(model, sample, forms, ordinary, mean, m2, n, first):
    """Whether contributions add up to the ordinary gradient, int32 `[v]`; see `conservation`.

    At the sampled places; in the first step everywhere.
    """
    variables, count = model.trainable_variables, tf.cast(n, tf.float64)
    precision = network.precision(model)
    variances = sample.largest(m2) / count
    totals = {}
    if first:
        totals = {i: forms[i].total() for i, p in enumerate(sample.places) if not p.whole}

    def status_of(gradients):
        theirs = sample.take(gradients) / count
        sizes = [sample.largest(tf.abs(v)) for v in (mean - theirs, theirs)]
        if totals:
            zeros = [tf.zeros([], tf.float64)] * 2
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
    """Of the difference and of theirs the largest entry, float64, by one example."""
    theirs = tf.cast(tf.convert_to_tensor(theirs), ours.dtype)
    ends = [(tf.reduce_max(v), -tf.reduce_min(v)) for v in (ours - theirs, theirs)]
    return [tf.cast(tf.maximum(*pair), tf.float64) / count for pair in ends]


def _penalty_gradient(model, variable):
    """The gradient of the variable's regulariser, scaled as Keras scales it; None without one."""
    if variable.regularizer is None:
        return None
    with tf.GradientTape() as tape:
        value = tf.convert_to_tensor(variable.value)
        tape.watch(value)
        penalty = keras_internals.scaled_penalty(model, variable.regularizer(value))
        penalty = model.optimizer.scale_loss(penalty)
    return tape.gradient(penalty, value)
