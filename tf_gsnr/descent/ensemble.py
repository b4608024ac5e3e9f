"""Many models of one network as one program: a replica axis, cut into groups that fit the memory.

A function of single models' arrays is vectorised over the replicas of a group, whose size is
bounded by the memory that its activations take, and the groups run side by side on the cores. XLA
compiles a group: of tiny models most of the time goes to the launching of operations, which it
fuses, and vectorisation alone saves little of it.

Index letters: m replica (M in all), g group, r replica of a group.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients.vectorized import converters

# Of a group's activations. On a CPU what its caches hold: a 2-50-1 network with n = 1000 took 33 us
# a step and model in groups of 5, 71 us in groups of 50 (two cores, two groups side by side).
CACHE_BYTES = 4 << 20
ACCELERATOR_BYTES = 1 << 30


def each(function: Callable, *own):
    """`function` of every replica's own arguments.

    Args:
      function: of nested tensors, to nested tensors.
      *own: the same with a leading axis of replicas.

    Returns:
      The results with a leading axis of replicas. Call it in the body of a loop of the graph rather
      than around one: `tf.vectorized_map` would turn the loop's counter into one per replica.

    Example:

    >>> each(lambda a, b: a + b, tf.constant([1, 2]), tf.constant([10, 20])).numpy().tolist()
    [11, 22]
    """
    if tf.nest.flatten(own)[0].shape[0] == 1:
        results = function(*tf.nest.map_structure(lambda v: tf.squeeze(v, 0), own))
        return tf.nest.map_structure(lambda v: tf.expand_dims(v, 0), results)
    with converters.vectorised_ops():
        return tf.vectorized_map(lambda own: function(*own), own)


def grouped(function: Callable, size_of: Callable, jit_compile: bool) -> Callable:
    """A function of a group's arrays -> the same of all replicas' arrays, compiled.

    Args:
      function: `(own, shared) -> found`, nested tensors; `own` and `found` have a leading axis of
        replicas.
      size_of: `(own, shared) -> ` the number of replicas that a group may have.
      jit_compile: whether XLA compiles a group.
    """
    group = tf.function(function, jit_compile=jit_compile, autograph=False)

    @tf.function(autograph=False)
    def whole(own, shared):
        m = tf.nest.flatten(own)[0].shape[0]
        groups, size = layout(m, size_of(own, shared), _side_by_side())
        if groups == 1:
            return group(own, shared)
        # The last group is filled up with copies of the last replica.
        rows = np.minimum(np.arange(groups * size), m - 1)
        cut = tf.nest.map_structure(
            lambda v: tf.reshape(tf.gather(v, rows), [groups, size, *v.shape[1:]]), own
        )
        first = tf.nest.map_structure(lambda v: v[0], cut)
        results = tf.map_fn(
            lambda own: group(own, shared),
            cut,
            fn_output_signature=tf.nest.map_structure(
                lambda v: tf.TensorSpec(v.shape, v.dtype),
                group.get_concrete_function(first, shared).structured_outputs,
            ),
            parallel_iterations=_side_by_side(),
        )
        return tf.nest.map_structure(
            lambda v: tf.reshape(v, [groups * size, *v.shape[2:]])[:m], results
        )

    return whole


def layout(replicas: int, largest: int, side_by_side: int) -> tuple[int, int]:
    """`(groups, replicas of a group)`: none larger than `largest`, a multiple of `side_by_side`.

    >>> layout(100, 30, 2), layout(3, 30, 2), layout(1, 30, 2), layout(7, 3, 1)
    ((4, 25), (2, 2), (1, 1), (3, 3))
    """
    groups = -(-replicas // max(largest, 1))
    groups = min(replicas, -(-groups // side_by_side) * side_by_side)
    size = -(-replicas // groups)
    return -(-replicas // size), size


def group_size(model, x) -> int:
    """How many replicas of a model a group may have, with micro-batches like `x`, `[batch, ...]`.

        bytes of a replica = 4 (3 batch activations + 3 parameters)

    For each number in a forward pass of one example, and for each parameter, the value, its
    gradient and one more that an operation makes of them.
    """
    activations = sum(
        output.shape.num_elements() or 0
        for operation in _operations(model, x.shape[1:], x.dtype)
        if operation.type not in ("Const", "Placeholder", "ReadVariableOp")
        for output in operation.outputs
    )
    available = ACCELERATOR_BYTES if _accelerated() else CACHE_BYTES
    return max(1, available // (12 * (x.shape[0] * activations + model.count_params())))


def pays(model, input_shape) -> bool:
    """Whether a model's replicas as one program are faster than one after the other.

    Not with convolutions, which with a kernel per replica run in a loop (and XLA makes them several
    times slower on a CPU: the network of table 2 with n = 400 takes 22 ms a step, 27 ms vectorised
    in pairs); nor with recurrent layers, which have a loop of their own.
    """
    types = {operation.type for operation in _operations(model, input_shape)}
    return not any("Conv" in name or "While" in name or "RNN" in name for name in types)


def _operations(model, input_shape, dtype="float32"):
    """The operations of a forward pass of one example."""
    forward = tf.function(lambda x: model(x, training=False), autograph=False)
    traced = forward.get_concrete_function(tf.TensorSpec([1, *input_shape], dtype))
    return traced.graph.get_operations()


def _side_by_side() -> int:
    """How many groups run at the same time: one per core, or one that fills an accelerator."""
    return 1 if _accelerated() else os.cpu_count() or 1


def _accelerated() -> bool:
    return bool(tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU"))
