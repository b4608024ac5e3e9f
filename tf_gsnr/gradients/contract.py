"""What every engine takes, gives and leaves alone.

An engine is `build(model, loss, *, sign_counts, training, batch_norm, contributions, wide) ->
measure` with a loss of `losses.of_batch`, and

    measure(x, y, sample_weight=None, valid=None, seeds=None) -> Measured

may be called in a graph, on a batch of examples whose number is fixed by the shapes:
  x, y: nested tensors with a leading axis of examples, as the model and the loss take them.
  sample_weight: per-example (or per-position) factors of the loss; None for 1.
  valid: bool `[batch]`, False for padding, which counts for nothing; None for all.
  seeds: a value per variable of `seed_variables(model)`; None for their current values.

g[n] is the gradient of example n's own loss: never divided by the batch size, times its sample
weight, without weight penalties. The model is left as it was found: the pass is made in a
`keras.StatelessScope`, so that what a layer assigns (a seed, a moving average) stays in it; the
variables that it reads are the real ones.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any, NamedTuple

import keras
import tensorflow as tf

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
    return list({id(layer): layer for layer in model._flatten_layers()}.values())


def seed_variables(model) -> list:
    """The state variables of the model's `keras.random.SeedGenerator`s."""
    return [v for v in model.non_trainable_variables if v.name == "seed_generator_state"]


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


class _Switch:
    """A function on a layer that is another one for the threads that replaced it."""

    def __init__(self, usual):
        self.usual = usual
        self.stacks = {}  # thread -> what takes its place there, the last one holds

    def current(self):
        stack = self.stacks.get(threading.get_ident())
        return stack[-1] if stack else self.usual

    def __call__(self, *args, **kwargs):
        return self.current()(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.current(), name)


_SWITCHING = threading.Lock()


def function_of(layer, name):
    """The layer's function of that name, as this thread sees it; None without one."""
    function = getattr(layer, name, None)
    return function.current() if isinstance(function, _Switch) else function


@contextlib.contextmanager
def replaced(replacements):
    """While this is open, the function is `make(what it is)` for each `(layer, name, make)`.

    For this thread only: others that call the layer meanwhile find it as it was. Nothing is left
    behind on the layers, whatever fails in between.
    """
    thread, switched = threading.get_ident(), []
    try:
        for layer, name, make in replacements:
            made = make(function_of(layer, name))
            with _SWITCHING:
                switch = vars(layer).get(name)
                if not isinstance(switch, _Switch):
                    switch = _Switch(getattr(layer, name))
                    switch.of_layer = name in vars(layer)  # as replaced by someone else before
                    object.__setattr__(layer, name, switch)
                switch.stacks.setdefault(thread, []).append(made)
            switched.append((layer, name, switch))
        yield
    finally:
        for layer, name, switch in reversed(switched):
            with _SWITCHING:
                switch.stacks[thread].pop()
                if not switch.stacks[thread]:
                    del switch.stacks[thread]
                if not switch.stacks:
                    if switch.of_layer:
                        object.__setattr__(layer, name, switch.usual)
                    else:
                        object.__delattr__(layer, name)


def replaced_calls(layers, make):
    """`replaced` for the `call` of each layer, by `make(layer, call)`."""
    return replaced([(layer, "call", functools.partial(make, layer)) for layer in layers])


def frozen_batch_norm(model):
    """While this is open, batch-norm layers use their moving statistics whatever the mode."""

    def frozen(layer, call):
        def inference(inputs, *args, **kwargs):
            return call(inputs, *args, **{**kwargs, "training": False})

        return inference

    return replaced_calls(batch_norm_layers(model), frozen)


def values_given(variables) -> list:
    """`(variable, value)` of those that a scope around this gives another value than their own.

    All others are left to be read as the real variables that they are: only so have what
    `tf.recompute_grad`, `tf.custom_gradient` and `tf.function` read gradients.
    """
    given = [(v, v.value) for v in variables]
    return [(v, value) for v, value in given if not hasattr(value, "assign")]
