"""The reference engine: `tf.vectorized_map` over `GradientTape`, for any Keras model.

It materialises a `[batch, *shape]` gradient for every variable: slow and large, but nothing about
it depends on what the layers are. Index letters: n example, j parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from tf_gsnr.gradients import contract, converters, recurrent
from tf_gsnr.moments import Moments


def build(
    model: keras.Model,
    loss_fn: Callable,
    *,
    sign_counts: bool = False,
    training: bool = False,
    batch_norm: str = "frozen",
) -> Callable:
    """Returns `measure` as `gradients.contract` defines it.

    Raises:
      ValueError: batch statistics are asked for: they tie one example's loss to the others.
    """
    contract.check_batch_norm(batch_norm)
    if training and batch_norm == "batch" and contract.batch_norm_layers(model):
        names = ", ".join(layer.name for layer in contract.batch_norm_layers(model))
        raise ValueError(
            "training=True and batch_norm='batch' with engine='vectorized': the batch-"
            f"normalisation layers {names} would see one example at a time, and every gradient "
            "through them would be exactly zero. Choose: engine='layerwise' (statistics of the "
            "micro-batch, gradients flow through them), batch_norm='frozen' (moving statistics, "
            "dropout stays active) or training=False (all layers in inference mode)"
        )
    seeds_of_model = contract.seed_variables(model)

    def measure(x, y, sample_weight=None, valid=None, seeds=None):
        parameters = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
        # A scope around this one may give the other variables values, too.
        others = [(v, tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables]
        if seeds is None:
            seeds = [v.value for v in seeds_of_model]
        batch = tf.shape(tf.nest.flatten(x)[0])[0]
        body = []  # the ops of one example

        def one_example(arguments):
            n, x, y, weight = arguments
            graph = tf.compat.v1.get_default_graph()
            before = len(graph.get_operations())
            x, y, weight = tf.nest.map_structure(lambda v: v[tf.newaxis], (x, y, weight))
            # Adding 0 n marks the seed as varying with n, without which a random op would be drawn
            # once, for all examples; converters.py then draws for the whole batch at once.
            varying = [s + tf.cast(0 * n, s.dtype) for s in seeds]
            state = [*zip(model.trainable_variables, parameters), *others]
            state += zip(seeds_of_model, varying)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(parameters)
                with keras.StatelessScope(state_mapping=state) as scope:
                    prediction = model(x, training=training)
                losses = loss_fn(y, prediction, None if sample_weight is None else weight)
            gradients = tape.gradient(
                losses, parameters, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            gradients = [tf.convert_to_tensor(g) for g in gradients]  # an embedding's are sparse
            body.extend(graph.get_operations()[before:])
            _refuse_shared_randomness(body, n)
            drawn = [tf.convert_to_tensor(scope.get_current_value(v)) for v in seeds_of_model]
            return losses[0], gradients, tf.nest.map_structure(lambda v: v[0], prediction), drawn

        frozen = contract.frozen_batch_norm(model) if training else contract.replaced_calls([])
        short = recurrent.without_loops(model, training)
        with converters.vectorised_ops(), frozen, short:
            losses, gradients, predictions, drawn = tf.vectorized_map(
                one_example, (tf.range(batch), x, y, () if sample_weight is None else sample_weight)
            )
        moments = Moments.of(gradients, losses, valid=valid, sign_counts=sign_counts)
        drawn = {id(v): d[0] for v, d in zip(seeds_of_model, drawn)}
        updates = [
            drawn.get(id(v), tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables
        ]
        return contract.Measured(losses, moments, predictions, updates)

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
