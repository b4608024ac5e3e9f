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

import contextlib
import functools

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.gradients import distributed, independence, losses
from tf_gsnr.gradients.layerwise import capture, rules
from tf_gsnr.training import contributions, gap
from tf_gsnr.training.plan import CHECKS, LossPass, Plan, first_checks, operations


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
        options = dict(training=True, all_outputs=first, inputs=x)
        with capture.watching(model, units, tape, n, **options) as seen_pass:
            predictions = _called(model, x)
            before, of_model = operations(), len(seen_pass.calls)
            apart = first and not losses.adds(model)  # what is added does not come from the outputs
            with _tape_from(predictions) if apart else contextlib.nullcontext(tape) as loss_tape:
                given = x, y, predictions, sample_weight
                loss = _loss(model, plan, *given)
                of_loss = operations()[len(before) :]
                scaled = model.optimizer.scale_loss(loss)
        tracker = keras_internals.loss_tracker(model)
        if tracker is not None:
            tracker.update_state(loss * replicas(), sample_weight=n)
    watched = seen_pass.watched()
    gradients = tape.gradient(scaled, [*watched, *(v.value for v in variables)])
    ordinary = gradients[len(watched) :]
    seen_pass.set_gradients(gradients[: len(watched)])

    scale = loss_scale(model.optimizer)
    factor = _global(n) / scale  # c[n] = B / S times what passes through n
    alone = replicas() == 1
    moments, totals = contributions.measured(
        model, plan, meter, seen_pass.calls, ordinary, n, factor, alone
    )
    checks = {}
    if first:
        again = functools.partial(_loss, model, plan)
        loss_pass = LossPass(scaled, loss_tape, again, given, of_loss, of_model)
        checks = first_checks(plan, model, tape, seen_pass, loss_pass, n)
    del tape, loss_tape

    model.optimizer.apply_gradients(zip(ordinary, variables))
    given = as_traced(given, plan.hides_batch_size)
    logs = model.compute_metrics(*given[:3], sample_weight=given[3])
    _refuse_names(logs, meter)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        # The optimiser skips a step whose scaled gradients overflow, and so does the meter.
        due &= _all_finite(ordinary)
    due &= _rows_are_examples(plan, seen_pass.calls, n)
    meter.advance(_global(n))
    gradients = None
    if meter.needs_optimizer and gap.needs_gradients(model.optimizer):
        gradients = [_reduced_gradient(g, scale) for g in ordinary]

    def show(moments):
        meter.update_state(_reduced(moments), model.optimizer, every, totals, gradients)

    due = tf.convert_to_tensor(due)
    if replicas() == 1 and tf.get_static_value(due):
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
    squash = _SQUASHING.get(value.op.type)
    if squash and keras_internals.logits_of(value) is None:
        hidden = squash(_hidden(value.op.inputs[0]))  # crossentropies look at the operation, too
    else:
        hidden = tf.raw_ops.PlaceholderWithDefault(input=value, shape=[None, *value.shape[1:]])
    return keras_internals.attached(hidden, value, _hidden)


_SQUASHING = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}


def _loss(model, plan, *given):
    """Keras's loss of `(x, y, predictions, sample_weight)`, as its own step computes it."""
    given = as_traced(given, plan.hides_batch_size)
    return keras_internals.loss_of_batch(model, *given, training=True)


def _called(model, x):
    return model(x, training=True) if keras_internals.takes_training(model) else model(x)


@contextlib.contextmanager
def _tape_from(predictions):
    """A tape that begins at the model's outputs: what leads to them is not gone through again."""
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(independence.sources(predictions))
        yield tape


def _refuse_names(logs, meter):
    """Raises ValueError, while the step is traced, where a metric has a name that we show."""
    taken = [name for name in meter.result_names if name in logs]
    if taken:
        raise ValueError(
            f"the model has metrics of the names {taken}, which GSNRModel shows too: rename them, "
            "or leave these out of shown="
        )


def _rows_are_examples(plan, calls, n):
    """Whether an example has as many rows as in the first step, where the graph counts on it.

    True, not a tensor, where all examples have the same sizes: nothing then has to wait for it.
    """
    if not (plan.sizes_vary or plan.uneven):
        return True
    same = [
        tf.equal(tf.shape(z)[0], n * call.fold)
        for call in calls
        if call.used and isinstance(call.fold, int)
        for z in tf.nest.flatten(call.output)[:1]
        if z.shape.rank and z.shape[0] is None
    ]
    return tf.reduce_all(tf.stack(same)) if same else True


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
