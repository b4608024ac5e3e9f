"""The layer-wise engine: one forward pass, one backward pass, and a rule per layer.

The backward pass stops at the layers' outputs; from each layer's input and the gradient at its
output a rule makes the per-example gradients in the cheapest form (`forms`). Index letters:
n example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import keras
import tensorflow as tf

from tf_gsnr.gradients import (
    capture,
    conservation,
    contract,
    fallback,
    forms,
    layer_rules,
    recurrent,
    rules,
)
from tf_gsnr.moments import Moments

assert layer_rules  # importing it registers Keras's layers


def build(
    model: keras.Model,
    loss_fn: Callable,
    *,
    sign_counts: bool = False,
    training: bool = False,
    batch_norm: str = "frozen",
) -> Callable:
    """Returns `measure` as `gradients.contract` defines it.

    The first time `measure` is traced, conservation is checked: the sum of a variable's per-example
    gradients must be its ordinary gradient.

    Raises:
      conservation.NotConserved: (by `measure`) a variable acts outside the `call` of its layer, or
        a layer mixes examples; the message names what is concerned.
    """
    contract.check_batch_norm(batch_norm)
    seeds_of_model = contract.seed_variables(model)
    plans = {}  # structure of x -> rows per example of each call

    def measure(x, y, sample_weight=None, valid=None, seeds=None):
        if seeds is None:
            seeds = [tf.convert_to_tensor(v.value) for v in seeds_of_model]
        specs = tf.nest.map_structure(lambda v: (tuple(v.shape[1:]), v.dtype.name), x)
        key = str(specs)
        if key not in plans:
            plans[key] = check(model, x, training=training, batch_norm=batch_norm)

        def loss_of(predictions):
            losses = loss_fn(y, predictions, sample_weight)
            return losses, losses if valid is None else tf.where(valid, losses, 0)

        with modes(model, training, batch_norm):
            found = forward_backward(model, loss_of, x, seeds=seeds, training=training)
            by_variable = forms_of(found.calls, plans[key])
        moments = combine(model.trainable_variables, by_variable, found.losses, valid, sign_counts)
        return contract.Measured(found.losses, moments, found.predictions, found.updates)

    return measure


def check(model, x, *, training=False, batch_norm="frozen") -> list:
    """Checks conservation on random data like `x`, outside any graph or strategy.

    Returns:
      The rows per example of each call, in the order of the forward pass.

    Raises:
      conservation.NotConserved: some variable's per-example gradients do not add up.
    """

    def per_example(x, seeds, loss_of):
        found = forward_backward(model, loss_of, x, seeds=seeds, training=training)
        return found.calls, forms_of

    coupled = training and batch_norm == "batch" and bool(contract.batch_norm_layers(model))
    with modes(model, training, batch_norm):
        comparison = conservation.compare(model, x, per_example, training=training, coupled=coupled)
    wrong = conservation.violations(model, comparison.errors)
    if wrong:
        names = ", ".join(f"{path} (off by {error:.1e})" for path, error in wrong)
        raise conservation.NotConserved(
            f"model {model.name!r}: the per-example gradients of {names} do not add up to the "
            "ordinary gradient: the variable is used outside the call of its own layer, or a layer "
            "mixes examples; use engine='vectorized', or engine='auto', which does so by itself"
        )
    return [fold for _, _, fold in comparison.calls]


def modes(model, training, batch_norm):
    """The context in which batch-norm layers use the statistics that were asked for."""
    if training and batch_norm == "frozen":
        return contract.frozen_batch_norm(model)
    return contextlib.nullcontext()


def whole_layers(model) -> list:
    """Recurrent layers: they run their cell fused, or in a loop, where it cannot be observed."""
    return [layer for layer in contract.sublayers(model) if isinstance(layer, keras.layers.RNN)]


def forward_backward(model, loss_of, x, *, seeds, training) -> capture.Pass:
    """`capture.run` with the units that the model needs."""
    layers = contract.sublayers(model)
    whole = whole_layers(model)
    while True:
        units = capture.units_of(model, whole, rules.activation_of)
        found = capture.run(model, units, loss_of, x, seeds=seeds, training=training)
        if not found.unobservable:
            return found
        for inner in found.unobservable:
            parents = [p for p in layers if any(inner is c for c in p._layers)]
            whole += [p for p in parents if not any(p is w for w in whole)]


def forms_of(calls, folds=None) -> dict:
    """`id(variable) -> form` of all calls together.

    Args:
      calls: of a `capture.Pass`. Their `fold` and `route` are filled in.
      folds: the rows per example of each call, where known; otherwise from the shapes.
    """
    by_variable = {}
    for call, fold in zip(calls, folds or [None] * len(calls), strict=True):
        call.fold = _fold(call, fold)
    for call in recurrent.together(calls):
        if not call.used:
            continue
        rule = None if call.unit.whole else rules.rule_of(call.layer)
        answer = None if rule is None else rule.function(call)
        call.route = "fallback" if answer is None else rule.function.__name__
        wanted = {id(v) for v in call.unit.variables}
        for variable, form in answer or fallback.products(call):
            if id(variable) in wanted:
                by_variable.setdefault(id(variable), []).append(form)
    return {key: forms.add(parts) for key, parts in by_variable.items()}


def _fold(call, expected):
    """How many rows of its output belong to one example."""
    outputs = [z for z, g in zip(*map(tf.nest.flatten, (call.output, call.dz))) if g is not None]
    rows = {z.shape[0] if z.shape.rank else 0 for z in outputs} - {None}
    if not rows or not isinstance(call.n, int):
        return expected or 1
    found = rows.pop()
    if rows or found % call.n or found == 0 or expected not in (None, found // call.n):
        raise conservation.NotConserved(
            f"layer {call.layer.name!r}: its output has {found} rows for {call.n} examples, so its "
            "gradient has no part of each example's own; use engine='vectorized', or "
            "engine='auto', which does so by itself"
        )
    return found // call.n


def combine(variables, by_variable, losses, valid, sign_counts) -> Moments:
    """The moments of a batch from the form of each variable; no form means no gradient."""
    losses = tf.cast(losses, tf.float64)
    if valid is None:
        count = tf.size(losses, tf.int64)
        loss = tf.reduce_mean(losses)
    else:
        count = tf.math.count_nonzero(valid, dtype=tf.int64)
        total = tf.reduce_sum(tf.where(valid, losses, 0))
        loss = total / tf.cast(tf.maximum(count, 1), tf.float64)
    mean, m2, positives, negatives = [], [], [], []
    for variable in variables:
        dtype = tf.as_dtype(variable.dtype)
        form = by_variable.get(id(variable))
        if form is None:
            form = _Nothing(variable)
        mask = None if valid is None else tf.cast(valid, dtype)
        one_mean, one_m2 = form.moments(tf.cast(tf.maximum(count, 1), dtype), mask)
        mean.append(one_mean)
        m2.append(one_m2)
        if sign_counts:
            up, down = form.signs()
            positives.append(up)
            negatives.append(down)
    return Moments(count, loss, mean, m2, positives, negatives)


class _Nothing(forms.Form):
    """The gradients of a variable that the losses do not depend on."""

    def __init__(self, variable):
        self.shape, self.dtype = tuple(variable.shape), tf.as_dtype(variable.dtype)

    def total(self):
        return tf.zeros(self.shape, self.dtype)

    def moments(self, count, valid):
        return self.total(), self.total()

    def signs(self):
        return tf.zeros(self.shape, tf.int64), tf.zeros(self.shape, tf.int64)
