"""Keras's own loss: of a batch, and of every example of it as a batch of its own.

Nothing here knows what a loss is. Masks, weights, ranks, reductions, nested outputs, `add_loss` and
a `compute_loss` of the user's own are what Keras makes of them, because Keras computes them.
Index letters: n example.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.gradients import examples, targets
from tf_gsnr.gradients.vectorized import example_map


class _WithLoss(keras.Model):
    """A model without layers, compiled with a loss: `compute_loss` for the outputs of another."""

    def __init__(self, model, loss):
        super().__init__(name="loss")
        self.output_names = getattr(model, "output_names", None)
        keras_internals.set_silently(self, "_measured", model)  # Keras would track it as a layer
        with _precision_of(self):
            self.compile(loss=loss)

    @property
    def losses(self):
        return [] if self._measured is None else self._measured.losses


class OfBatch:
    """`(x, y, predictions, sample_weight, training) -> ` the loss that Keras computes.

    Attributes:
      owner: the Keras model whose `compute_loss` it is.
      uses_inputs: whether that is not Keras's own, and so may look at x.
    """

    def __init__(self, model, owner):
        self.model, self.owner = model, owner
        self.uses_inputs = owner.__class__.compute_loss is not keras.Model.compute_loss

    def __call__(self, x, y, predictions, sample_weight=None, training=False):
        targets.check(self.owner, y, predictions, sample_weight)
        given = x, y, predictions, sample_weight, training
        with without_penalties(self.model), _precision_of(self.owner):
            try:
                value = keras_internals.loss_of_batch(self.owner, *given)
            except (TypeError, ValueError, AttributeError) as error:
                if _is_of_a_library(error):
                    raise ValueError(
                        f"loss: {name_of(self)} cannot be computed of these y and sample_weight: "
                        f"{str(error).strip().splitlines()[0][:200]}; expected {targets.EXPECTED}"
                    ) from error
                raise
        # Keras divides by the number of replicas, so that their losses add up to that of all.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return value if replicas == 1 else value * replicas


def _is_of_a_library(error) -> bool:
    """Whether it was raised in Keras or TensorFlow, and so names none of our arguments."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return f"{os.sep}keras{os.sep}" in place or f"{os.sep}tensorflow{os.sep}" in place


def of_batch(model, loss=None) -> OfBatch:
    """The loss of a model, as Keras computes it.

    Weight regularisers are no part of it: they are the same for every example.

    Args:
      model: the Keras model, for its compiled loss, its `add_loss` and the names of its outputs.
      loss: whatever `compile(loss=...)` takes; None for the model's own `compute_loss`.

    Raises:
      ValueError: no loss given and none compiled; what is given is no loss.
    """
    if loss is None:
        owner = model
        overrides_loss = model.__class__.compute_loss is not keras.Model.compute_loss
        if not overrides_loss and not getattr(model, "compiled", False):
            raise ValueError(
                f"loss=None, and model {getattr(model, 'name', model)!r} is not compiled with one: "
                "pass loss= a Keras loss, its name, or a callable (y_true, y_pred) -> [batch], or "
                "call model.compile(loss=...) first"
            )
    else:
        owner = _compiled(model, loss)

    return OfBatch(model, owner)


def needs_targets(model, loss=None) -> bool:
    """Whether outputs are compared with targets: not so by what the model adds or makes itself."""
    overrides_loss = model.__class__.compute_loss is not keras.Model.compute_loss
    return loss is not None or not overrides_loss and getattr(model, "loss", None) is not None


def check(model, loss):
    """Raises ValueError for what is no loss, or none for the outputs of this model."""
    outputs = getattr(model, "outputs", None)
    outputs = None if outputs is None else len(outputs)
    targets.check_loss(loss, outputs)


def _compiled(model, loss):
    check(model, loss)
    return _WithLoss(model, loss)


@contextlib.contextmanager
def _precision_of(owner):
    """Keras makes the losses it is given by name when it first computes them, in its floatx."""
    before = keras.config.floatx()
    measured = getattr(owner, "_measured", None)
    wide = measured is not None and measured.variable_dtype == "float64"
    keras.config.set_floatx("float64" if wide else before)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def of_examples(loss: OfBatch, x, y, predictions, sample_weight=None, training=False):
    """`[n]`: what the loss is for a batch of example n alone.

    Args:
      loss: what `of_batch` returns.
      x, y, sample_weight: nested, with a leading axis of examples; None leaves stay None.
      predictions: of the model, with the masks and logits that Keras set on them.

    Raises:
      ValueError: the loss of one example is not one number.
    """
    leaves = keras.tree.flatten(predictions)
    beside = [(keras_internals.mask_of(p), keras_internals.logits_of(p)) for p in leaves]
    data = (x if loss.uses_inputs else None, y, predictions, sample_weight, beside)

    def one(_, batch):
        x, y, predictions, weight, beside = batch
        for prediction, (mask, logits) in zip(keras.tree.flatten(predictions), beside):
            keras_internals.set_mask(prediction, mask)
            keras_internals.set_logits(prediction, logits)
        with keras.StatelessScope():  # what it assigns (a metric of its own) is left alone
            return one_number(loss(x, y, predictions, weight, training))

    targets.check(loss.owner, y, predictions, sample_weight)
    n = examples.count(data[1:4])
    _check_rows(predictions, n)
    return example_map.batches_of_one(one, data, n, f"loss {name_of(loss)!r}")


def _check_rows(predictions, n):
    for prediction in tf.nest.flatten(predictions):
        rows = prediction.shape[0] if prediction.shape.rank else 0
        if isinstance(n, int) and rows not in (None, n):
            raise ValueError(
                f"the model's output has {rows} rows for {n} examples, so there is no loss of one "
                "example. To measure each example's contribution to the gradient of its "
                "micro-batch instead, pass contributions=True"
            )


def one_number(value):
    """A scalar: the loss of one example; ValueError where it is not one number."""
    value = tf.convert_to_tensor(value)
    if value.shape.num_elements() != 1:
        raise ValueError(
            f"the loss of one example has shape {value.shape}; expected one number: use the "
            "reduction 'sum_over_batch_size', Keras's default"
        )
    return tf.reshape(value, [])


def per_example_loss(loss, model=None) -> Callable:
    """Returns `fn(y_true, y_pred, sample_weight=None) -> [n]`, for losses that need no input.

    Args:
      loss, model: as in `of_batch`.

    Example:

    >>> fn = per_example_loss("mse")
    >>> fn(tf.constant([[0.0], [0.0]]), tf.constant([[1.0], [3.0]])).numpy().tolist()
    [1.0, 9.0]
    """
    of_one = of_batch(model, loss)

    def fn(y_true, y_pred, sample_weight=None):
        return of_examples(of_one, None, y_true, y_pred, sample_weight)

    return fn


def adds(model) -> bool:
    """Whether the model, as it was last called, added losses: by `add_loss`, of activities."""
    with without_penalties(model):
        return bool(model.losses)


@contextlib.contextmanager
def without_penalties(model):
    """While this is open, no variable of the model has a regulariser."""
    variables = [] if model is None else model.trainable_variables
    before = [(v, v.regularizer) for v in variables if v.regularizer is not None]
    try:
        for variable, _ in before:
            variable.regularizer = None
        yield
    finally:
        for variable, regularizer in before:
            variable.regularizer = regularizer


def name_of(loss) -> str:
    """What a loss of `of_batch` is called in messages."""
    return names_of(loss.owner)


def names_of(owner) -> str:
    """The names of the losses that a model was compiled with; of a loss of its own, that name."""
    given = getattr(owner, "loss", None)
    if given is None or owner.__class__.compute_loss is not keras.Model.compute_loss:
        return "compute_loss"
    names = [getattr(v, "name", getattr(v, "__name__", v)) for v in keras.tree.flatten(given)]
    return ", ".join(str(name) for name in names if name is not None)
