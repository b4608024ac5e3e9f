"""The reference engine: `tf.vectorized_map` over `GradientTape`, for any Keras model.

It materialises a `[batch, *shape]` gradient for every variable: slow and large, but nothing about
it depends on what the layers are. Index letters: n example, j parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from tf_gsnr import keras_internals
from tf_gsnr.gradients import contract, examples, losses, network
from tf_gsnr.gradients.layerwise import capture
from tf_gsnr.gradients.vectorized import example_map
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
) -> contract.Measure:
    """An engine, as `gradients.contract` defines it.

    Raises:
      ValueError: batch statistics or contributions are asked for: they tie one example's loss to
        the others.
    """
    network.check_batch_norm(batch_norm)
    if training and batch_norm == "batch" and network.batch_norms(model):
        names = ", ".join(layer.name for layer in network.batch_norms(model))
        raise ValueError(
            "training=True and batch_norm='batch' with engine='vectorized': the batch-"
            f"normalisation layers {names} would see one example at a time, and every gradient "
            "through them would be exactly zero. Choose: engine='layerwise' (statistics of the "
            "micro-batch, gradients flow through them), batch_norm='frozen' (moving statistics, "
            "dropout stays active) or training=False (all layers in inference mode)"
        )
    if contributions:
        raise ValueError(
            "contributions=True with engine='vectorized', which runs each example alone: use "
            "engine='layerwise'"
        )
    seeds_of_model = network.seeds(model)

    def gradient(given, x, y, sample_weight, loss_of):
        """`(loss, gradients)` of one example, and the seeds' values after it."""
        sources = [v.value for v in model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            with (
                keras.StatelessScope(given, collect_losses=True) as scope,
                losses.without_penalties(model),
            ):
                prediction = model(x, training=training)
                value = loss_of(x, y, prediction, sample_weight, training)
            value = losses.one_number(value)
            after = [scope.get_current_value(v) for v in seeds_of_model]
        found = tape.gradient(value, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # An embedding's are sparse.
        return value, [tf.convert_to_tensor(g) for g in found], after

    def measure(x, y, sample_weight=None, valid=None, seeds=None):
        # A scope around this one may give variables other values.
        given = network.values_given(model.variables)
        if seeds is None:
            seeds = [v.value for v in seeds_of_model]
        n = capture.batch_size(x)
        body = []  # the ops of one example
        drew = []  # the seeds that one example changes

        def one(i, batch):
            graph = tf.compat.v1.get_default_graph()
            before = len(graph.get_operations())
            # Adding 0 i marks the seed as varying with i, without which a random op would be drawn
            # once, for all examples; converters.py then draws for the whole batch at once.
            varying = [s + tf.cast(0 * i, s.dtype) for s in seeds]
            mapping = [*given, *zip(seeds_of_model, varying)]
            value, found, after = gradient(mapping, *batch, loss)
            body.extend(graph.get_operations()[before:])
            _refuse_shared_randomness(body, i)
            drew.extend(a for a, b in zip(after, varying) if a is not b)
            return value, found

        def one_of_batch(i):
            """As `one`, with the whole batch run for it, so that it draws as the batch."""

            def loss_of(*arguments):
                return losses.of_examples(loss, *arguments)[i]

            mapping = [*given, *zip(seeds_of_model, seeds)]
            return gradient(mapping, x, y, sample_weight, loss_of)[:2]

        data = (x, y, sample_weight)
        frozen = network.frozen_batch_norm(model) if training else keras_internals.replaced([])
        with frozen:
            if not network.has_loops(model):
                found = example_map.batches_of_one(one, data, n, f"model {model.name!r}")
            elif network.keeps_states(model) or example_map.changes(one, data, n, drew):
                found = example_map.one_by_one(one_of_batch, tf.range(n))
            else:
                found = example_map.one_by_one(
                    lambda i: one(i, examples.rows(data, i[tf.newaxis])), tf.range(n)
                )
        each, gradients = found
        if wide:
            gradients = [tf.cast(g, tf.float64) for g in gradients]
        return contract.Measured(
            each, Moments.of(gradients, each, valid=valid, sign_counts=sign_counts)
        )

    return measure


def _refuse_shared_randomness(operations, n):
    """Raises where a random op does not depend on the example: one draw would serve them all."""
    varying = {id(n.op)}
    for op in operations:  # in the order of their making, so inputs come first
        if any(id(i.op) in varying for i in op.inputs):
            varying.add(id(op))
        elif op.type.startswith("Stateless") and op.type.endswith("V2"):
            raise ValueError(
                f"the random op {op.name!r} is not seeded by a keras.random.SeedGenerator of the "
                "model, so that every example would get the same random numbers: give the layer "
                "that makes it a seed generator (self.seed = keras.random.SeedGenerator(...)) and "
                "pass that as its seed"
            )
