"""The examples that are measured: cut into micro-batches of one shape, and refused by name.

Index letters: n example.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import tensorflow as tf


def check_batch_size(batch_size):
    if (
        isinstance(batch_size, bool)
        or not isinstance(batch_size, (int, np.integer))
        or batch_size < 1
    ):
        raise ValueError(f"batch_size={batch_size!r}: expected a positive integer")


def stack_chunks(x, y, batch_size: int):
    """Cuts arrays into `(x, y, valid)` with leading axes `[chunks, batch_size]` for `accumulate`.

    The last chunk is filled up with copies of the last example, which are not valid.
    """
    n = len(y)
    batch_size = min(batch_size, n)
    rows = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1)
    valid = (np.arange(len(rows)) < n).reshape(-1, batch_size)
    return (
        x[rows].reshape(-1, batch_size, *x.shape[1:]),
        y[rows].reshape(-1, batch_size, *y.shape[1:]),
        valid,
    )


def micro_batches(x, y, sample_weight, batch_size: int, fill: bool = True) -> Iterable:
    """Micro-batches `(x, y, sample_weight, valid)` of tensors.

    Args:
      x, y, sample_weight: as `gradient_moments` takes them.
      batch_size: examples a micro-batch.
      fill: whether the ragged end is filled up to that many, with copies that are not valid.

    Raises:
      ValueError: data that do not fit together, have no end, or hold no example.
    """
    if isinstance(x, tf.data.Dataset):
        if y is not None or sample_weight is not None:
            raise ValueError("x is a tf.data.Dataset: y and sample_weight come with it, pass None")
        if x.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("x is an infinite tf.data.Dataset: cut it with .take(batches)")
        if not isinstance(x.element_spec, tuple) or len(x.element_spec) not in (2, 3):
            raise ValueError(
                "x is a tf.data.Dataset: expected elements (x, y) or (x, y, sample_weight), got "
                f"{x.element_spec}"
            )
        rows = (tuple(element) for element in x.rebatch(batch_size))
        size = batch_size
    else:
        x, y, sample_weight = (
            _arrays("x", x),
            _arrays("y", y),
            _arrays("sample_weight", sample_weight),
        )
        if y is None:
            raise ValueError(
                "y=None: expected the targets of x (only a tf.data.Dataset has its own)"
            )
        lengths = {len(v) for v in tf.nest.flatten((x, y, sample_weight)) if v is not None}
        if len(lengths) != 1:
            raise ValueError(
                "x, y and sample_weight differ in their number of examples: "
                f"{sorted(lengths)}; expected one length"
            )
        n = lengths.pop()
        size = min(batch_size, n)
        data = (x, y, sample_weight)
        rows = (_take(data, slice(i, i + size)) for i in range(0, n, max(size, 1)))
    empty = True
    for x_rows, y_rows, *weight in rows:
        empty = False
        batch = (x_rows, y_rows, weight[0] if weight else None)
        n = len(tf.nest.flatten(y_rows)[0])
        valid = tf.constant(np.arange(size if fill else n) < n)
        if fill and n < size:
            batch = _take(batch, np.minimum(np.arange(size), n - 1))
        yield (*_take(batch, slice(None)), valid)
    if empty:
        raise ValueError("x has no examples; expected at least one")


def _take(data, rows):
    """Nested tensors of some rows (a slice or indices) of nested arrays; None stays None."""

    def take(v):
        if v is None:
            return v
        return tf.convert_to_tensor(v[rows]) if isinstance(rows, slice) else tf.gather(v, rows)

    return tf.nest.map_structure(take, data)


def _arrays(name, value):
    """Nested arrays as they are, lists of numbers as arrays."""

    def array(v):
        if tf.is_tensor(v) or isinstance(v, np.ndarray) or hasattr(v, "__array__"):
            if len(v.shape) == 0:
                raise ValueError(f"{name} is a scalar; expected a leading axis of examples")
            return v
        raise ValueError(f"{name}: expected arrays or tensors, got {type(v).__name__}")

    return None if value is None else tf.nest.map_structure(array, value)


def check_labels(model, y, start, error):
    """Raises ValueError if the error comes of a label outside the classes, with its example.

    Args:
      y: the targets of a micro-batch that begins at example `start`.
    """
    if "label" not in str(error):
        return
    classes = tf.nest.flatten(model.output_shape)[-1] if hasattr(model, "output_shape") else None
    for labels in tf.nest.flatten(y):
        wrong = np.argwhere((np.asarray(labels) < 0) | (np.asarray(labels) >= (classes or np.inf)))
        if labels.dtype.is_integer and len(wrong):
            n = int(wrong[0][0])
            raise ValueError(
                f"y: the label of example {start + n} is {np.asarray(labels)[tuple(wrong[0])]}; "
                f"expected 0 to {classes - 1}, the model has {classes} outputs"
            ) from error


def check_finite(model, moments, bad: int):
    """Raises ValueError unless all losses and gradients are finite.

    Args:
      moments: numpy arrays.
      bad: the first example whose loss is not finite, or -1.
    """
    if bad >= 0:
        raise ValueError(
            f"the loss of example {bad} is not finite: look for NaN or inf in x, y or "
            "sample_weight there, for labels outside the classes, or for weights that diverged"
        )
    for variable, mean, m2 in zip(model.trainable_variables, moments.mean, moments.m2):
        if not (np.isfinite(mean).all() and np.isfinite(m2).all()):
            raise ValueError(
                f"the gradient of {variable.path} is not finite, though every loss is: look for a "
                "function without derivative at its input (sqrt or log at 0), or scale the loss"
            )
