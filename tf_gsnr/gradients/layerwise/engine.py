"""The layer-wise engine: one forward pass, one backward pass, and a rule per layer.

The backward pass stops at the layers' outputs; from each layer's input and the gradient at its
output a rule makes the per-example gradients in the cheapest form (`forms`). Index letters:
n example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, checks, keras_internals
from tf_gsnr.gradients import conservation, contract, losses, network
from tf_gsnr.gradients.layerwise import capture, fallback, forms, recurrent, rules
from tf_gsnr.gradients.sums import Groups, Sums, grouped
from tf_gsnr.moments import Moments


def build(
    model: keras.Model,
    loss: Callable,
    *,
    sign_counts: bool = False,
    training: bool = False,
    batch_norm: str = "frozen",
    contributions: bool = False,
    wide: bool = False,
    summed: Groups = (),
) -> contract.Measure:
    """An engine, as `gradients.contract` defines it.

    Args:
      contributions: differentiate the loss of the whole batch, times its number of examples,
        instead of the sum of the losses of each example alone; see `gradient_moments`.
      wide: whether gradients are scaled before they are squared, and moments are float64.
      summed: groups of the numbers of variables of which `measure` answers with `Measured.sums`;
        its moments are of the others. If wide, `measure` is told by `scale` by which number to
        multiply all gradients: sums are of the products.

    Raises:
      conservation.NotConserved: (by `measure`) a variable acts outside the `call` of its layer, or
        the model adds losses of its own, of which there is one for all examples.
    """
    network.check_batch_norm(batch_norm)
    seeds_of_model = network.seeds(model)

    def measure(x, y, sample_weight=None, valid=None, seeds=None, scale=None):
        if seeds is None:
            seeds = [tf.convert_to_tensor(v.value) for v in seeds_of_model]
        n = capture.batch_size(x)

        def loss_of(predictions):
            if contributions:
                of_batch = tf.reduce_sum(loss(x, y, predictions, sample_weight, training))
                each, target = tf.fill([n], of_batch), of_batch * tf.cast(n, of_batch.dtype)
            else:
                each = losses.of_examples(loss, x, y, predictions, sample_weight, training)
                target = tf.reduce_sum(each if valid is None else tf.where(valid, each, 0))
            return each, target if scale is None else target * tf.cast(scale, target.dtype)

        with network.modes(model, training, batch_norm):
            found, each, by_variable = _pass(
                model, loss_of, x, n, seeds, training, added=contributions
            )
            scales = {}
            if wide and scale is None:
                scales = unit_scales(found.calls)
                by_variable = forms_of(found.calls, scales=scales)
        variables = model.trainable_variables
        count, loss_mean = _mean_loss(each, valid)
        numbers = {j for group in summed for j in group}
        added = {j: _form(by_variable, variables[j]) for j in numbers}
        variables = [v for j, v in enumerate(variables) if j not in numbers]
        mean, m2, up, down = combined(variables, by_variable, n, valid, sign_counts)
        if wide:
            whole = 1.0 if scale is None else scale
            powers = [tf.cast(scales.get(id(v), whole), tf.float64) for v in variables]
            mean = [tf.cast(v, tf.float64) / s for v, s in zip(mean, powers)]
            m2 = [tf.cast(v, tf.float64) / s / s for v, s in zip(m2, powers)]
        moments = Moments(count, loss_mean, mean, m2, up, down)
        if not summed:
            return contract.Measured(each, moments)
        found = {j: form.sums(sign_counts) for j, form in added.items()}
        kinds = range(4 if sign_counts else 2)
        lists = [grouped(summed, {j: parts[k] for j, parts in found.items()}) for k in kinds]
        return contract.Measured(each, moments, Sums(*lists))

    return measure


def _pass(model, loss_of, x, n, seeds, training, added):
    """`(Pass, losses [n], {id(variable): form})`, with as many layers whole as it takes."""
    whole = whole_layers(model)
    variables = model.trainable_variables
    while True:
        units = capture.units_of(model, whole, rules.activation_of)
        given = network.values_given(model.variables)
        given += zip(network.seeds(model), seeds)
        with tf.GradientTape() as tape:
            sources = [v.value for v in variables]
            tape.watch([v for v in sources if tf.is_tensor(v)])
            with (
                keras.StatelessScope(given, collect_losses=True),
                capture.watching(model, units, tape, n, training=training) as found,
            ):
                predictions = model(x, training=training)
                if not added:
                    check_no_added_losses(model)
                calls, hidden = len(found.calls), len(found.hidden)
                each, target = loss_of(predictions)
                if not added and len(found.calls) + len(found.hidden) > calls + hidden:
                    _refuse_calls_of_loss(model, [*found.calls[calls:]], found.hidden[hidden:])
        watched = found.watched()
        gradients = tape.gradient(target, watched + sources)
        found.set_gradients(gradients[: len(watched)])
        reasons = {}
        by_variable = forms_of(found.calls, reasons=reasons)
        for error in reasons.values():
            if not isinstance(error, conservation.NotConserved):
                raise error
        by_variable = {key: form for key, form in by_variable.items() if key not in reasons}
        missed = [
            v
            for v, g in zip(variables, gradients[len(watched) :])
            if g is not None and id(v) not in by_variable
        ]
        if not missed:
            return found, each, by_variable
        larger, unseen = wider(model, whole, missed)
        if unseen:
            for v in unseen:
                if id(v) in reasons:
                    raise reasons[id(v)]
            raise conservation.NotConserved(
                f"model {model.name!r}: no call of its own layer accounts for "
                f"{', '.join(v.path for v in unseen)}: it is used outside of it, or a rule leaves "
                "it out; use engine='vectorized', or engine='auto', which does so by itself"
            )
        whole = larger


def _refuse_calls_of_loss(model, calls, hidden):
    """Raises `NotConserved`: the loss calls layers, on rows that it alone knows."""
    layer = [*(call.layer for call in calls), *hidden][0]
    raise conservation.NotConserved(
        f"model {model.name!r}: its loss calls layer {layer.name!r}, on rows that need not be the "
        "examples': use engine='vectorized', which runs each example alone, or engine='auto', "
        "which does so by itself"
    )


def check_no_added_losses(model):
    """Raises `NotConserved` where the model adds losses, one number for all examples."""
    if losses.adds(model):
        raise conservation.NotConserved(
            f"model {model.name!r} adds losses of its own (add_loss, or an activity regulariser), "
            "which are one number for all examples: use engine='vectorized', which runs each "
            "example alone, or engine='auto', which does so by itself"
        )


def whole_layers(model) -> list:
    """Layers that are observed from outside from the start.

    Recurrent layers run their cell in a loop; a `call` that is a `tf.function` has a graph of its
    own, which may have been traced before.
    """
    return [
        layer
        for layer in network.layers(model)
        if layer is not model
        and (isinstance(layer, keras.layers.RNN) or hasattr(layer.call, "get_concrete_function"))
    ]


def wider(model, opaque, missed) -> tuple[list, list]:
    """The layers that are to be whole so that these variables are seen, and which cannot be.

    Args:
      whole: the layers that are so far.
      missed: variables that the loss depends on, and that no call accounts for.
    """
    everything = len(model.trainable_variables)
    layers = [p for p in network.layers(model) if len(p.trainable_variables) < everything]
    owners = {
        id(v): unit.layer
        for unit in capture.units_of(model, opaque, rules.activation_of)
        for v in unit.variables
    }
    before, opaque, unseen = opaque, list(opaque), []
    for variable in missed:
        owner = owners.get(id(variable))
        outer = [
            p for p in layers if any(owner is c for c in keras_internals.layers_directly_in(p))
        ]
        outer = [p for p in outer if not any(p is w for w in before)]
        if not outer:
            unseen.append(variable)
        opaque += [p for p in outer if not any(p is w for w in opaque)]
    return opaque, unseen


def unit_scales(calls, factor=1.0) -> dict:
    """`id(variable) -> ` the power of two times `factor` by which its layer's `dz` is multiplied.

    1 but for gradients so small that their squares would underflow in float32.
    """
    places, sizes, of_size = {}, [], []
    for call in calls:
        for dz in tf.nest.flatten(call.dz):
            if dz is not None:
                half = dz.dtype.size < 4  # which is multiplied by nothing
                size = np.inf if half else tf.cast(tf.reduce_max(tf.abs(dz)), tf.float32)
                sizes.append(size)
                of_size.append(places.setdefault(id(call.layer), len(places)))
    if not sizes:
        return {}
    largest = factor * tf.math.unsorted_segment_max(tf.stack(sizes), of_size, len(places))
    scales = tf.unstack(tf.where(tf.math.is_inf(largest), 1.0, factor * _power(largest)))
    return {
        id(v): scales[places[id(call.layer)]]
        for call in calls
        if id(call.layer) in places
        for v in call.unit.variables
    }


SMALL = 2.0**-30  # gradients whose squares, and whose squares' sums, float32 holds with ease


def _power(size):
    """A power of two, at least 1, that brings a small size near to `SMALL`."""
    small = (size > 0) & (size < SMALL)
    exponent = tf.round(tf.math.log(SMALL / tf.where(small, size, SMALL)) / tf.math.log(2.0))
    return tf.where(small, tf.pow(2.0, tf.minimum(exponent, 96.0)), 1.0)


def forms_of(calls, folds=None, scales=None, reasons=None, uneven=None) -> dict:
    """`id(variable) -> form` of all calls together.

    Args:
      calls: of a `capture.Pass`. Their `fold` and `route` are filled in.
      folds: `(id(layer), k) -> ` rows per example of a layer's k-th call, where known from another
        pass.
      scales: `id(variable) -> ` by which the gradients at its layer's outputs are multiplied.
      reasons: a dict for `id(variable) -> ` the exception for which it has no form, or not the
        form of all calls; where that is not to be raised.
      uneven: a set of `(id(layer), k)`, to which the calls are added whose rows depend on the data.

    Raises:
      conservation.NotConserved: without `reasons`, where a layer's rows are not the examples'.
    """
    by_variable, seen = {}, {}
    for call in calls:
        k = seen[id(call.layer)] = seen.get(id(call.layer), -1) + 1
        if not call.used:
            continue
        scale = None if scales is None else scales.get(id(call.unit.variables[0]))
        try:
            key, even = (id(call.layer), k), call
            fold = (folds or {}).get(key)
            if _rows_are_unknown(call):
                uneven = set() if uneven is None else uneven
                uneven.add(key)
            if uneven and key in uneven:
                even, fold = _with_rows_of_examples(call, fold)
            call.fold = even.fold = _fold(even, fold)
            scaled = even if scale is None else _times(even, scale)
            for variable, form in _answer(scaled):
                by_variable.setdefault(id(variable), []).append(form)
            call.route = scaled.route
        except Exception as error:
            if reasons is None:
                raise
            reasons |= {id(v): error for v in call.unit.variables}
    return {key: forms.add(parts) for key, parts in by_variable.items()}


def _rows_are_unknown(call):
    """Whether the examples are known when this is traced, and the rows of the call are not."""
    return isinstance(call.n, int) and any(
        z.shape.rank and z.shape[0] is None for z in tf.nest.flatten(call.output) if tf.is_tensor(z)
    )


def _with_rows_of_examples(call, fold):
    """The call, with zeros in place of rows that are not those of the examples; its rows of one.

    Of a layer that is called with the rows that were sent to it, say. Its gradients then do not add
    up to the ordinary one, so that they are not believed; but nothing fails.
    """
    tensors = [v for v in tf.nest.flatten((call.args, call.kwargs)) if tf.is_tensor(v)]
    if fold is None and isinstance(call.n, int):  # of what it is called with, where that is known
        rows = [v.shape[0] for v in tensors if v.shape.rank and v.shape[0]]
        fold = rows[0] // call.n if rows and rows[0] % call.n == 0 else None

    def even(value):
        if not tf.is_tensor(value) or not value.shape.rank:
            return value
        return arrays.rows_of_examples(value, call.n, fold)

    parts = tf.nest.map_structure(even, (call.args, call.kwargs, call.output, call.dz))
    return dataclasses.replace(call, **dict(zip(("args", "kwargs", "output", "dz"), parts))), fold


def _times(call, scale):
    def scaled(g):
        return None if g is None else g * tf.cast(scale, g.dtype)

    return dataclasses.replace(call, dz=tf.nest.map_structure(scaled, call.dz))


def _answer(call) -> list:
    """`[(variable, form), ...]` of the unit's variables, by its rule or without."""
    call.args, call.kwargs = tf.nest.map_structure(
        lambda v: tf.sparse.to_dense(v) if isinstance(v, tf.SparseTensor) else v,
        (call.args, call.kwargs),
    )
    rule = None if call.unit.whole else rules.rule_of(call.layer)
    if rule is not None and keras_internals.is_rematerialised(call.layer) and rule.activation:
        rule = None if _is_activated(call.layer, rule.activation) else rule
    answer = None
    if rule is not None:
        answer = _checked(rule.function, rule.function(call))
        call.route = rule.function.__name__
    if answer is None and isinstance(call.layer, keras.layers.RNN):
        answer = recurrent.products(call)
        call.route = "recurrent"
    if answer is None:
        answer = fallback.products(call)
        call.route = "fallback"
    wanted = {id(v) for v in call.unit.variables}
    return [(v, form) for v, form in answer if id(v) in wanted]


def _checked(rule, answer):
    """What a rule answered; ValueError where it is no list of variables and forms."""
    pairs = answer if isinstance(answer, (list, tuple)) else [answer]
    for pair in [] if answer is None else pairs:
        fits = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not (fits and isinstance(pair[0], keras.Variable) and isinstance(pair[1], forms.Form)):
            raise ValueError(
                f"the rule {rule.__name__} returned {checks.shown(answer)}; expected None, or a "
                "list of (variable, form) with forms of tf_gsnr.gradients.forms"
            )
    return answer


def _is_activated(layer, attribute):
    return keras_internals.function_of(layer, attribute) not in (None, keras.activations.linear)


def _fold(call, expected):
    """How many rows of its output belong to one example."""
    outputs = [z for z, g in zip(*map(tf.nest.flatten, (call.output, call.dz))) if g is not None]
    rows = {z.shape[0] if z.shape.rank else 0 for z in outputs} - {None}
    if not rows or not isinstance(call.n, int):
        return expected or tf.shape(outputs[0])[0] // call.n
    out_rows = rows.pop()
    if rows or out_rows % call.n or out_rows == 0:
        raise conservation.NotConserved(
            f"layer {call.layer.name!r}: its output has {out_rows} rows for {call.n} examples, "
            "so its gradient has no part of each example's own; use engine='vectorized', or "
            "engine='auto', which does so by itself"
        )
    return out_rows // call.n


def combined(variables, by_variable, n, valid, sign_counts) -> tuple:
    """`(mean, m2, positives, negatives)`, lists over the variables; no form means no gradient."""
    dtype = tf.int64
    count = tf.cast(n, dtype) if valid is None else tf.math.count_nonzero(valid, dtype=dtype)
    mean, m2, positives, negatives = [], [], [], []
    counts = {v.dtype: tf.cast(tf.maximum(count, 1), v.dtype) for v in variables}
    masks = {v.dtype: None if valid is None else tf.cast(valid, v.dtype) for v in variables}
    for variable in variables:
        form = _form(by_variable, variable)
        one_mean, one_m2 = form.moments(counts[variable.dtype], masks[variable.dtype])
        mean.append(one_mean)
        m2.append(one_m2)
        if sign_counts:
            up, down = form.signs()
            positives.append(up)
            negatives.append(down)
    return mean, m2, positives, negatives


def _form(by_variable, variable):
    return by_variable.get(id(variable)) or Nothing(variable)


def _mean_loss(losses: Sequence, valid):
    """`(number of valid examples, mean of their losses)`."""
    losses = tf.cast(losses, tf.float64)
    if valid is None:
        return tf.size(losses, tf.int64), tf.reduce_mean(losses)
    count = tf.math.count_nonzero(valid, dtype=tf.int64)
    total = tf.reduce_sum(tf.where(valid, losses, 0))
    return count, total / tf.cast(tf.maximum(count, 1), tf.float64)


class Nothing(forms.Form):
    """The gradients of a variable that the losses do not depend on."""

    def __init__(self, variable):
        self.shape, self.dtype = tuple(variable.shape), tf.as_dtype(variable.dtype)

    def total(self):
        return tf.zeros(self.shape, self.dtype)

    def moments(self, count, valid):
        return self.total(), self.total()

    def sums(self, sign_counts):
        return (self.total(),) * (4 if sign_counts else 2)

    def signs(self):
        return tf.zeros(self.shape, tf.int64), tf.zeros(self.shape, tf.int64)

    def moments_at(self, places, n, sign_counts):
        return [tf.zeros([places.size], tf.float64)] * (4 if sign_counts else 2)
