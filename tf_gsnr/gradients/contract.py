"""What every engine takes, gives and leaves alone.

g[n] is the gradient of example n's own loss: never divided by the batch size, times its sample
weight, without weight penalties. The model is left as it was found: the pass is made in a
`keras.StatelessScope`, so that what a layer assigns (a seed, a moving average) stays in it; the
variables that it reads are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.moments import Moments

BATCH_NORM_MODES = ("frozen", "batch")


class Measured(NamedTuple):
    """What an engine finds on one batch.

    Attributes:
      losses: `[batch]`, each example's own loss.
      moments: of the valid examples' gradients, in the order of `model.trainable_variables`.
      sums: `sums.Sums` of the groups for which they were asked in the place of moments.
    """

    losses: Any
    moments: Moments
    sums: Any = None


class Measure(Protocol):
    """Measures a batch of examples whose number is fixed by the shapes, in a graph or outside."""

    def __call__(self, x, y, sample_weight=None, valid=None, seeds=None) -> Measured:
        """What is found.

        Args:
          x, y: nested tensors with a leading axis of examples, as model and loss take them.
          sample_weight: per-example (or per-position) factors of the loss; None for 1.
          valid: bool `[batch]`, False for padding, which counts for nothing; None for all.
          seeds: a value per variable of `seed_variables(model)`; None for their current values.
        """
        ...


class Engine(Protocol):
    """Makes a `Measure` for a model and a loss."""

    def __call__(
        self,
        model: keras.Model,
        loss: Callable,
        *,
        sign_counts: bool = False,
        training: bool = False,
        batch_norm: str = "frozen",
        contributions: bool = False,
        wide: bool = False,
    ) -> Measure:
        """The measure.

        Args:
          loss: of `losses.of_batch`.
          sign_counts, training, batch_norm, contributions: as in `gradient_moments`.
          wide: whether gradients are scaled before they are squared, and moments are float64.
        """
        ...


def check_model(model):
    """Raises ValueError unless `model` is a built Keras model with trainable variables."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"model={model!r}: expected a keras.Model, got {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"model {model.name!r} is not built, so it has no variables yet: call it once on a "
            "batch, or model.build(input_shape), before measuring"
        )
    if not model.trainable_variables:
        raise ValueError(
            f"model {model.name!r} has no trainable variables, so there is no gradient to measure: "
            "set trainable = True on the layers that are to be measured"
        )


def sublayers(model) -> list:
    """Every layer in the model, itself and those inside other layers included, each once."""
    return keras_internals.layers_in(model)


def seed_variables(model) -> list:
    """The state variables of the model's `keras.random.SeedGenerator`s."""
    return [v for v in model.non_trainable_variables if keras_internals.is_seed(v)]


def seeds_for(model, seed, step) -> list:
    """A value per seed variable: a stream of its own for every generator and micro-batch.

    Args:
      seed: integer scalar; None starts from the model's own current seeds.
      step: the index of the micro-batch, a scalar tensor or int.
    """
    values = []
    for k, variable in enumerate(seed_variables(model)):
        dtype = tf.as_dtype(variable.dtype)
        start = variable.value
        if seed is not None:
            start = tf.stack([tf.cast(seed, dtype) + 7919 * k, tf.zeros([], dtype)])
        # A generator counts its draws in its second entry: room for 65,536 draws a micro-batch.
        values.append(start + tf.stack([tf.zeros([], dtype), tf.cast(step, dtype) * 65536]))
    return values


def check_batch_norm(batch_norm: str):
    """Raises ValueError unless `batch_norm` is one of `BATCH_NORM_MODES`."""
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(
            f"unknown batch_norm {batch_norm!r}; available: {', '.join(BATCH_NORM_MODES)}"
        )


def batch_norm_layers(model) -> list:
    """The layers that normalise by the batch's statistics when in training mode."""
    return [
        layer
        for layer in sublayers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]


def frozen_batch_norm(model):
    """While this is open, batch-norm layers use their moving statistics whatever the mode."""

    def frozen(layer, call):
        def inference(inputs, *args, **kwargs):
            return call(inputs, *args, **{**kwargs, "training": False})

        return inference

    return keras_internals.replaced_calls(batch_norm_layers(model), frozen)


def values_given(variables) -> list:
    """`(variable, value)` of those that a scope around this gives another value than their own.

    All others are left to be read as the real variables that they are: only so have what
    `tf.recompute_grad`, `tf.custom_gradient` and `tf.function` read gradients.
    """
    given = [(v, v.value) for v in variables]
    return [(v, value) for v, value in given if not hasattr(value, "assign")]
