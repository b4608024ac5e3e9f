"""A batch as Keras itself runs it, to compare with: the real variables, without a scope.

Index letters: n example.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import examples, independence, losses, network
from tf_gsnr.gradients.layerwise import capture


def kept_variables(model, loss=None):
    """Afterwards all that layers and losses keep beside the model's variables is as before.

    Metrics of a layer, the states of a recurrent one, a `tf.Variable` in a layer; of a loss that is
    a function, what it closes over.
    """
    given = getattr(model, "loss", None) if loss is None else loss
    losses_given = [given] if callable(given) else keras.tree.flatten(given)
    values = []
    for owner in [*network.layers(model), *losses_given]:
        values += getattr(owner, "__dict__", {}).values()
        function = getattr(owner, "fn", owner)  # of Keras's wrapper
        values += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    values += [v for several in values if isinstance(several, (list, tuple)) for v in several]
    metrics = [v for v in values if isinstance(v, keras.metrics.Metric)]
    values += [v for metric in metrics for v in metric.variables]
    own = {id(v.value) for v in model.variables}
    values = [v.value if isinstance(v, keras.Variable) else v for v in values]
    return _restored(v for v in values if isinstance(v, tf.Variable) and id(v) not in own)


@contextlib.contextmanager
def _restored(variables):
    before = [(v, v.read_value()) for v in {id(v): v for v in variables}.values()]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


class Examined(NamedTuple):
    """What an ordinary pass over a batch shows.

    Attributes:
      gradients: per trainable variable, the gradient summed over the examples; None where the loss
        does not depend on it.
      mixing: the layer through which examples act on each other, or None.
      scrambled: a layer whose rows are not in the order of the examples, or None.
      loss_acts: whether the loss lets examples act on each other, or what the model adds to it.
      weighs: whether an example has another weight in it than alone: the loss divides by something
        of the whole batch.
      adds: whether the model adds losses, of which the gradients know nothing.
    """

    gradients: list
    mixing: keras.layers.Layer | None
    scrambled: keras.layers.Layer | None
    loss_acts: bool
    weighs: bool
    adds: bool


def examine(model, loss, batch, seeds, modes, *, training, contributions) -> Examined:
    """Runs a batch eagerly, as Keras would: the real variables, without a scope.

    Args:
      batch: `(x, y, sample_weight, valid)`.
      seeds: a value per `network.seeds(model)`.
      modes: the context of the layers' modes.
      contributions: whether the loss of the whole batch, times its number of examples, is meant.
    """
    x, y, sample_weight, valid = batch
    n = int(examples.count((x, y)))
    for layer in network.layers(model):
        if getattr(layer, "quantization_mode", None) == "float8":
            raise ValueError(
                f"layer {layer.name!r} is quantized to float8, which Keras runs in a compiled step "
                "only: watch it in fit, by GSNRModel"
            )
    with _restored(v.value for v in model.variables), kept_variables(model), modes:
        _assign_seeds(model, seeds)
        with tf.GradientTape(persistent=True) as tape:
            with capture.watching(
                model, [], tape, n, training=training, all_outputs=True
            ) as seen_pass:
                predictions = model(x, training=training)
            adds = losses.adds(model) and not contributions
            if adds:  # of which there is one for all examples
                value = tf.zeros([])
            elif contributions:
                value = n * tf.reduce_sum(loss(x, y, predictions, sample_weight, training))
            else:
                each = losses.of_examples(loss, x, y, predictions, sample_weight, training)
                value = tf.reduce_sum(tf.where(valid, each, 0))
        gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
        gradients = [None if g is None else np.asarray(tf.convert_to_tensor(g)) for g in gradients]
        layers, outputs = zip(*seen_pass.outputs) if seen_pass.outputs else ((), ())
        seen = independence.rows_seen(tape, predictions, list(outputs), n) if n > 1 else []
        outputs_of_model = independence.sources(predictions)
        slopes = tape.gradient(value, outputs_of_model, unconnected_gradients="zero")
        added_act = adds and n > 1 and _added_act(model, x, tape, outputs, n, seeds, training)
        del tape
        mixing = independence.mixing_layer(layers, seen) if seen else None
        scrambled = None
        if n > 1 and not (training and network.seeds(model)) and _sizes_vary(model):
            if _alike_without_others(model, x, predictions, n, seeds, training):
                scrambled_layers = [
                    layer
                    for layer, one in zip(layers, seen)
                    if one is not None
                    and independence.is_foreign(one)
                    and layer.trainable_variables
                ]
                mixing, scrambled = None, scrambled_layers[0] if scrambled_layers else None
            else:
                mixing = mixing or model
        loss_acts, weighs = added_act, False
        if not adds and n > 1:
            one_mode = functools.partial(loss, training=training)
            of_batch = independence.loss_gradient(one_mode, x, y, predictions, sample_weight)
            given = x, y, predictions, sample_weight, of_batch
            loss_acts = float(independence.loss_error(one_mode, *given)) > 1
            if not contributions:
                pair = [[tf.boolean_mask(g, valid) for g in gs] for gs in (of_batch, slopes)]
                weighs = float(independence.unlike(*pair)) > independence.ALONE
    return Examined(gradients, mixing, scrambled, loss_acts, weighs, adds)


def _added_act(model, x, tape, outputs, n, seeds, training) -> bool:
    """Whether a loss that the model adds lets examples act on each other.

    As `independence.loss_error`, at the layers' outputs, of each loss by itself. Nothing is said
    where the outputs themselves are others without the rest of the batch.
    """
    there = [k for k, z in enumerate(outputs) if z.shape.rank and z.shape[0] == n]
    outputs = [outputs[k] for k in there]
    whole = _added_gradients(model, tape, outputs)
    for given, own in _halves(n):
        _assign_seeds(model, seeds)
        data = examples.rows(x, given)
        size = int(examples.count(data))
        with tf.GradientTape(persistent=True) as part_tape:
            options = dict(training=training, all_outputs=True)
            with capture.watching(model, [], part_tape, size, **options) as part:
                model(data, training=training)
        if len(part.outputs) <= max(there, default=0):
            return False
        outputs_of_part = [part.outputs[k][1] for k in there]
        if not all(_same(a, b, own) for a, b in zip(outputs_of_part, outputs)):
            return False
        alone = _added_gradients(model, part_tape, outputs_of_part)
        for of_whole, of_part in zip(whole, alone):
            pair = ([g[own] for g in gradients] for gradients in (of_whole, of_part))
            if float(independence.unlike(*pair)) > independence.ALONE:
                return True
    return False


def _added_gradients(model, tape, outputs) -> list:
    """Of each loss that the model added, the gradients at the outputs."""
    with losses.without_penalties(model):
        added = list(model.losses)
    return [
        [tf.convert_to_tensor(g) for g in tape.gradient(v, outputs, unconnected_gradients="zero")]
        for v in added
    ]


def is_random(model, x, modes, *, training) -> bool:
    """Whether the model gives other outputs when it is called again."""
    with _restored(v.value for v in model.variables), kept_variables(model), modes:
        once, again = (independence.real(model(x, training=training)) for _ in range(2))
    return any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(once, again))


def _assign_seeds(model, seeds):
    for variable, seed in zip(network.seeds(model), seeds):
        variable.assign(seed)


def _sizes_vary(model) -> bool:
    """Whether the model takes batches of any number of examples."""
    return network.fixed_batch_size(model) is None


def _alike_without_others(model, x, predictions, n, seeds, training) -> bool:
    """Whether the outputs of each half of the examples are the same without the other half."""
    for given, own in _halves(n):
        _assign_seeds(model, seeds)
        outputs = independence.real(model(examples.rows(x, given), training=training))
        for some, whole in zip(outputs, independence.real(predictions)):
            if not _same(some, whole, own):
                return False
    return True


def _halves(n) -> tuple:
    """`(rows to be given, rows of these that count)`, for each half of the examples.

    Of both: what one example does to all others (the largest of a batch, that all are divided by)
    shows in the half that is without it. The first half is alone; beside the second half there are
    copies of its own, since noise of a fixed seed goes by an example's place.
    """
    half = n // 2
    beside = np.concatenate([np.arange(n - half, n), np.arange(half, n)])
    first, second = slice(0, half), slice(half, n)
    return (first, first), (beside, second)


def _same(some, whole, own) -> bool:
    """Whether two outputs are the same at these examples."""
    if not some.shape.rank or not whole.shape.rank:
        return False
    loose = 0.1 if some.dtype.size == 2 else 1e-3
    a, b = (np.asarray(v, np.float64)[own] for v in (some, whole))
    size = np.nanmax(np.abs(b), initial=0)
    return a.shape == b.shape and np.allclose(a, b, loose, loose * size, equal_nan=True)
