"""A function of one example, over all examples: vectorised, or one after the other.

Index letters: n example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from tf_gsnr.gradients import examples
from tf_gsnr.gradients.vectorized import converters


def batches_of_one(one: Callable, data: Any, n: Any, name: str) -> Any:
    """`one(n, rows)` of each example: its number, and nested rows of data, a batch of one.

    Args:
      data: nested, dense or sparse or ragged, with a leading axis of examples; None stays None.
      n: the number of examples.
      name: of what is mapped, for the log.
    """
    present = [v for v in tf.nest.flatten(data) if v is not None]
    if not all(isinstance(v, tf.Tensor) and v.dtype != tf.string for v in present):
        return one_by_one(lambda i: one(i, examples.rows(data, i[tf.newaxis])), tf.range(n))

    def element(arguments):
        i, rows = arguments
        rows = iter(rows)
        batch = tf.nest.map_structure(lambda v: None if v is None else next(rows)[tf.newaxis], data)
        return one(i, batch)

    return vectorised(element, (tf.range(n), present), name)


def vectorised(one: Callable, elements: Any, name: str) -> Any:
    """`one` of each example by `tf.vectorized_map`, or by `one_by_one` where that fails.

    Args:
      one: function of one example's element.
      elements: nested `[n, ...]`.
      name: of what is mapped, for the log.
    """

    def without_loops(element):
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        result = one(element)
        for op in graph.get_operations()[before:]:
            if op.type in _LOOPS:
                raise NotImplementedError("it has a loop of its own")
            if _is_uneven(op):
                raise NotImplementedError(f"the size of what {op.name} returns depends on the data")
        return result

    with converters.vectorised_ops():
        try:
            return tf.vectorized_map(without_loops, elements)
        except (TypeError, ValueError, NotImplementedError, tf.errors.OpError) as error:
            logging.log_first_n(
                logging.WARNING,
                "%s cannot be vectorised over examples and is run in a loop: %s",
                1,
                name,
                error,
            )
    return one_by_one(one, elements)


# `tf.vectorized_map` takes minutes over them, and what it makes of some fails when it is run.
_LOOPS = ("While", "StatelessWhile")
# Operations whose results have sizes of their own for each example (`tf.boolean_mask`, `tf.repeat`
# and ragged tensors come down to some of these): what it makes of them fails when it is run.
_UNEVEN = tuple(
    "Where DynamicPartition Unique ListDiff Ragged StringSplit Segment SparseSegment "
    "NonMaxSuppression".split()
)


def _is_uneven(op) -> bool:
    """Whether the size of what it returns depends on more than the sizes of what it is given."""
    if op.type.startswith(_UNEVEN):
        return True
    sizes_known = all(v.shape.is_fully_defined() for v in op.inputs)
    return (
        bool(op.inputs)
        and sizes_known
        and not all(v.shape.is_fully_defined() for v in op.outputs if v.dtype.is_numpy_compatible)
    )


def one_by_one(one: Callable, elements: Any) -> Any:
    """`one` of each example by `tf.map_fn`, traced once, whatever structure it returns."""
    return traced(one, elements)(elements)


def traced(one: Callable, elements: Any) -> Callable:
    """`elements -> ` what `one_by_one` returns, with `one` traced when this is called.

    The caller can learn from the trace how the function is to be run.
    """

    compiled = _compiled(one, elements)
    signature = tf.nest.map_structure(
        lambda v: tf.TensorSpec(v.shape, v.dtype), compiled.structured_outputs
    )

    def run(elements):
        return tf.map_fn(compiled, elements, fn_output_signature=signature)

    return run


def of_one(one: Callable, elements: Any) -> Callable:
    """`i -> ` what `one` makes of the i-th element, traced when this is called."""
    compiled = _compiled(one, elements)
    return lambda i: compiled(tf.nest.map_structure(lambda v: v[i], elements))


def _compiled(one, elements):
    @tf.function(autograph=False)
    def compiled(element):
        return one(element)

    specs = tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape[1:], v.dtype), elements)
    return compiled.get_concrete_function(specs)


def changes(one: Callable, data: Any, n: Any, drew: list) -> bool:
    """Whether `one`, traced for this, appends to `drew`: whether it draws random numbers."""
    traced(lambda i: one(i, examples.rows(data, i[tf.newaxis])), tf.range(n))
    return bool(drew)
