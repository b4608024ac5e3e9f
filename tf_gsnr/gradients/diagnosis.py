"""What the layer-wise engine does with a model, and how far it is from the reference engine.

Index letters: n example.
"""

from __future__ import annotations

import html
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import checks, keras_internals
from tf_gsnr.gradients import examples, losses, network, targets
from tf_gsnr.gradients.layerwise import capture, rules
from tf_gsnr.gradients.layerwise import engine as layerwise
from tf_gsnr.gradients.vectorized import engine as vectorized


class Table(list):
    """A list of dicts with the same keys that prints as a table, in a notebook too."""

    def __str__(self):
        if not self:
            return "(empty)"
        rows = [list(self[0]), *([str(v) for v in row.values()] for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [list(self[0]), *(row.values() for row in self)] if self else []
        cells = [[html.escape(str(value)) for value in row] for row in rows]
        lines = [
            "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(self)], cells)
        ]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def explain(model: keras.Model) -> Table:
    """Which rule each layer with trainable variables is measured by.

    Returns:
      A table of dicts, a row per layer: `layer` (its path), `class`, `parameters` (trainable ones
      of its own), `route`: the name of a rule; "recurrent"; "fallback", the layer's vector-Jacobian
      product for each example; or "fallback (whole)" for a layer together with all that is in it. A
      rule may still pass a call on to the fallback, for instance a Dense layer with LoRA.

    Raises:
      ValueError: the model is not built or has no trainable variables.

    Example:

    >>> import keras, tf_gsnr
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="hidden")])
    >>> (row,) = tf_gsnr.explain(model)  # print it for the whole table
    >>> row["class"], row["parameters"], row["route"]
    ('Dense', 15, 'dense')
    """
    network.check(model)
    table = Table()
    for unit in _units(model):
        table.append(
            {
                "layer": unit.layer.path or unit.layer.name,
                "class": type(unit.layer).__name__,
                "parameters": sum(int(np.prod(v.shape)) for v in unit.variables),
                "route": _route(unit),
            }
        )
    return table


def routes(model) -> dict:
    """`id(variable) -> (class of its layer, route)`, as `explain` names them."""
    return {
        id(v): (type(unit.layer).__name__, _route(unit))
        for unit in _units(model)
        for v in unit.variables
    }


def _route(unit) -> str:
    if isinstance(unit.layer, keras.layers.RNN):
        return "recurrent"
    rule = None if unit.whole else rules.rule_of(unit.layer)
    return rule.function.__name__ if rule else "fallback (whole)" if unit.whole else "fallback"


def _units(model):
    """The model's units but for those inside of others."""
    opaque = layerwise.whole_layers(model)
    inside = {
        id(one) for layer in opaque for one in keras_internals.layers_in(layer, include_self=False)
    }
    units = capture.units_of(model, opaque, rules.activation_of)
    return [unit for unit in units if id(unit.layer) not in inside]


def check_engine(
    model: keras.Model,
    x: Any,
    y: Any,
    loss: Any = None,
    *,
    sample_weight: Any = None,
    training: bool = False,
    batch_norm: str = "frozen",
) -> Table:
    """Compares the layer-wise engine with the reference engine on a few of your own examples.

    Args:
      model, loss, training, batch_norm: as in `gradient_moments`.
      x, y, sample_weight: nested arrays with a leading axis of examples; a handful is enough, the
        reference engine needs `[examples, parameters]` of memory.

    Returns:
      A table, a row per trainable variable: `variable` (its path), `route` (the rule of its
      layer), `mean` and `variance`: the largest difference between the engines, relative to the
      variable's root mean square gradient and to its largest variance. Rounding in float32 is
      about 1e-6; 1e-3 and more is a fault.

    Raises:
      ValueError: the model is not built, or one of the engines cannot measure it.

    Example:

    >>> import keras, numpy as np, tf_gsnr
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    >>> x, y = np.random.normal(size=[8, 3]), np.random.normal(size=[8, 1])
    >>> table = tf_gsnr.check_engine(model, x, y, "mse")
    >>> max(max(row["mean"], row["variance"]) for row in table) < 1e-5
    True
    """
    network.check(model)
    checks.boolean("training", training)
    network.check_batch_norm(batch_norm)
    of_batch = losses.of_batch(model, loss)
    if y is None and not examples.is_stream(x) and losses.needs_targets(model, loss):
        raise ValueError("y=None: expected the targets of x (only a dataset has its own)")
    data = examples.collect(x, y, sample_weight)
    batches = examples.micro_batches(*data, examples.count(data))
    x, y, sample_weight, _ = next(targets.whole_labels(model, loss, batches))
    network.check_inputs(model, x)
    options = dict(training=training, batch_norm=batch_norm)
    ours, theirs = (
        tf.function(engine.build(model, of_batch, **options), autograph=False)(
            x, y, sample_weight
        ).moments.numpy()
        for engine in (layerwise, vectorized)
    )
    route_of = routes(model)
    table = Table()
    for j, variable in enumerate(model.trainable_variables):
        m2 = theirs.m2[j].max()
        square = m2 / theirs.count + np.max(theirs.mean[j] ** 2)
        table.append(
            {
                "variable": variable.path,
                "route": route_of.get(id(variable), ("", "unused"))[1],
                "mean": _relative(ours.mean[j] - theirs.mean[j], square**0.5),
                "variance": _relative(ours.m2[j] - theirs.m2[j], m2),
            }
        )
    return table


def _relative(difference, scale):
    return float(f"{np.abs(difference).max() / scale if scale else np.abs(difference).max():.1e}")
