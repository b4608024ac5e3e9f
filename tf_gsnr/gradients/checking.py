"""What a micro-batch must show before its gradients are believed; what is refused by name.

Index letters: n example, j variable.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import conservation, examination, examples, losses, network


def examined(model, loss, batch, index, seeds, options) -> examination.Examined:
    """The micro-batch as Keras runs it.

    Args:
      loss: of `losses.of_batch`.
      index: the number of the micro-batch.
      seeds: a value per seed variable.
      options: of the engine.

    Raises:
      ValueError: the loss cannot be computed for one example, or a label is outside the classes.
    """
    modes = network.modes(model, options["training"], options["batch_norm"])
    try:
        return examination.examine(
            model,
            loss,
            batch,
            [np.asarray(s) for s in seeds],
            modes,
            training=options["training"],
            contributions=options["contributions"],
        )
    except tf.errors.OpError as error:
        examples.check_labels(model, batch[1], index * examples.count(batch), error)
        if not _works_whole(model, loss, batch):
            shapes = [_shapes(v) for v in (batch[1], batch[2])]
            raise ValueError(
                f"the loss {losses.name_of(loss)!r} of model {model.name!r} cannot be computed of "
                f"y {shapes[0]} and sample_weight {shapes[1]}: {str(error.message).splitlines()[0]}"
            ) from error
        if options["contributions"]:
            raise
        raise ValueError(
            f"the loss {losses.name_of(loss)!r} of model {model.name!r} cannot be computed for one "
            "example at a time. To measure each example's contribution to the gradient of its "
            "micro-batch instead, pass contributions=True"
        ) from error


def _shapes(values):
    shapes = [str(list(v.shape)) for v in tf.nest.flatten(values) if hasattr(v, "shape")]
    return " and ".join(["None", *shapes][bool(shapes) :])


def _works_whole(model, loss, batch) -> bool:
    """Whether Keras computes the loss of the whole micro-batch."""
    x, y, sample_weight, _ = batch
    try:
        with keras.StatelessScope():
            loss(x, y, model(x, training=False), sample_weight)
    except Exception:  # whatever the user's own code raises
        return False
    return True


def refuse(model, loss, seen: examination.Examined, engine: str, options):
    """Raises where an example has no gradient of its own, or its rows cannot be told.

    Raises:
      ValueError: examples act on each other.
      NotConserved: a layer's rows are not those of the examples in turn.
    """
    if options["contributions"]:
        return
    way_out = (
        "so an example has no gradient of its own. To measure each example's contribution to the "
        "gradient of its micro-batch instead, pass contributions=True"
    )
    if seen.loss_acts:
        what = (
            "a loss added (add_loss) by" if seen.adds else f"the loss {losses.name_of(loss)!r} of"
        )
        raise ValueError(
            f"{what} model {model.name!r} lets the examples of a batch act on each other, {way_out}"
        )
    asked = options["training"] and options["batch_norm"] == "batch"
    if seen.mixing is not None and not asked:
        layer = seen.mixing
        raise ValueError(
            f"layer {layer.name!r} ({type(layer).__name__}) of model {model.name!r} lets the "
            f"examples of a batch act on each other, {way_out}"
        )
    if seen.scrambled is not None and engine == "layerwise":
        raise conservation.NotConserved(
            f"model {model.name!r}: the rows of layer {seen.scrambled.name!r} are not those of "
            "the examples in turn, so their gradients cannot be told apart: use "
            "engine='vectorized', or engine='auto', which does so by itself"
        )


def weighs(model, loss) -> str:
    """What is said of a loss that gives examples other weights in a batch than alone."""
    return (
        f"the loss {losses.name_of(loss)!r} of model {model.name!r} divides by something of the "
        "whole batch, its number of valid positions or a sum of weights: what is measured is the "
        "loss of each example alone, whose mean is not the batch's. To measure each example's "
        "contribution to the gradient of its micro-batch instead, pass contributions=True"
    )


def agreeing(model, moments, gradients) -> set:
    """The variables j whose mean is the ordinary gradient.

    Not among them are those of which both are zero, as long as the loss depends on them.

    Args:
      moments: of the micro-batch.
      gradients: of `examination.Examined`.

    Raises:
      NotConserved: a variable's is another.
    """
    status, wrong = _compared(model, moments, gradients)
    if wrong:
        raise conservation.NotConserved(
            f"model {model.name!r}: the per-example gradients of {', '.join(wrong)} do not add up "
            "to the ordinary gradient: the variable is used outside the call of its own layer, or "
            "a rule is wrong; use engine='vectorized', or engine='auto', which does so by itself"
        )
    return {
        j
        for j, (outcome, gradient) in enumerate(zip(status, gradients))
        if outcome == conservation.AGREES or gradient is None and outcome == conservation.ZERO
    }


def _compared(model, moments, gradients):
    """The status of each variable, and the paths of those that differ."""
    n = int(moments.count)
    variables = model.trainable_variables
    means = [np.asarray(m, np.float64) for m in moments.mean]
    variances = [np.max(np.asarray(s, np.float64), initial=0) / n for s in moments.m2]
    ordinary = [np.zeros_like(m) if g is None else g / n for g, m in zip(gradients, means)]
    precision = network.precision(model)
    kinds = {str(v.dtype) for v in [*variables, *moments.mean]}
    if precision == "float64" and kinds != {"float64"}:  # LoRA's variables; moments asked for so
        precision = "float32"
    status = conservation.compared(variables, precision, means, ordinary, variances).numpy()
    return status, [v.path for v, s in zip(variables, status) if s == conservation.DIFFERS]


def refuse_unlike(model, x, moments, seen: examination.Examined, options):
    """Raises where examples that are run alone have not the ordinary gradient as their mean.

    It is another anyway where each example has noise of its own or batch norm sees it alone, and
    it is not known where the model adds losses.

    Args:
      moments: of the micro-batch.

    Raises:
      NotConserved: a variable's is another.
    """
    training = options["training"]
    alone = training and options["batch_norm"] == "batch" and network.batch_norms(model)
    if alone or seen.adds:
        return
    _, wrong = _compared(model, moments, seen.gradients)
    modes = network.modes(model, training, options["batch_norm"])
    if wrong and not examination.is_random(model, x, modes, training=training):
        raise conservation.NotConserved(
            f"model {model.name!r}: the gradients of examples that are run one by one do not add "
            f"up, for {', '.join(wrong)}, to the ordinary gradient of the batch: the loss draws "
            "random numbers, the model treats a single example otherwise than a batch, or an "
            "operation is vectorised wrongly. To measure each example's contribution to the "
            "gradient of its micro-batch instead, pass contributions=True"
        )


TINY = 1e-12  # squares of gradients below may underflow in float32


def are_tiny(gradients) -> bool:
    """Whether of some variable they are, all of them."""
    sizes = [np.abs(g).max() for g in gradients if g is not None and g.size]
    return any(0 < size < TINY for size in sizes)


def are_finite(gradients) -> bool:
    return all(g is None or np.isfinite(g).all() for g in gradients)
