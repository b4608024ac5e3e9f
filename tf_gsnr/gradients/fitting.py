"""Whether data fit a model: inputs, targets, weights.

Of targets and weights only what can be known is looked at, where Keras would broadcast, round or
say it late: one output, arrays, a loss of Keras's own. Index letters: n example.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import examples


def check_inputs(model, x, name: str):
    """Raises ValueError where the arrays are not what the model takes, as far as it says."""
    expected = getattr(model, "inputs", None)  # a subclassed model takes what its call takes
    if isinstance(x, examples.Batches):
        x = x.batches[0][0]
    preprocesses = getattr(model, "preprocessor", None) is not None
    if not expected or isinstance(x, dict) or preprocesses:
        return
    given = tf.nest.flatten(x)
    if not all(one is None or hasattr(one, "shape") for one in given):
        return  # which is refused where they are made arrays
    if len(expected) != len(given):
        raise ValueError(
            f"{name}: it has {len(given)} inputs, model {model.name!r} takes {len(expected)}"
        )
    for one, takes in zip(given, expected):
        if getattr(getattr(one, "dtype", None), "kind", "f") in "US" and takes.dtype != "string":
            raise ValueError(f"{name}: an array of texts, and model {model.name!r} takes numbers")
        if one is not None and not _fits(tuple(one.shape)[1:], takes.shape[1:]):
            raise ValueError(
                f"{name}: its examples have shape {tuple(one.shape)[1:]}, model "
                f"{model.name!r} takes {takes.shape[1:]}"
            )


def _fits(given, takes):
    """Whether Keras takes an example of one shape for the other; it mends a last axis of one."""
    if len(given) + 1 == len(takes) and takes[-1] == 1:
        given = (*given, 1)
    elif len(given) == len(takes) + 1 and given[-1] == 1:
        given = given[:-1]
    return len(given) == len(takes) and all(None in (g, t) or g == t for g, t in zip(given, takes))


def check_targets(model, y, sample_weight, loss=None):
    """Raises ValueError for targets and weights that no loss of this model can mean.

    That is: class numbers that are no whole numbers; targets with an axis more than the model's
    output, or weights with one that the targets do not have, which Keras would broadcast against
    other examples; strings.

    Args:
      model: the Keras model.
      y, sample_weight: as given to `gradient_moments`.
      loss: likewise; None for the one that the model was compiled with.
    """
    if y is not None and not tf.nest.flatten(y):
        raise ValueError(f"y={y!r}: expected the targets of x")
    y, weight = _array(y), _array(sample_weight)
    if y is None:
        return
    output = _output(model)
    kind = _keras_loss(model.loss if loss is None and hasattr(model, "loss") else loss)
    if kind is not None:
        if y.dtype.kind not in "buif":
            return  # strings are a loss's own matter: Keras has some that take them
        if "sparse" in kind.lower() and y.dtype.kind == "f":
            wrong = np.argwhere(y != np.floor(y))  # NaN among them
            if len(wrong):
                raise ValueError(
                    f"y: the label of example {wrong[0][0]} is {y[tuple(wrong[0])]}; the loss "
                    f"{kind} expected whole numbers, one for each class"
                )
        if output is not None and y.ndim > len(output):
            raise ValueError(
                f"y has the shape {y.shape} and the model's output {(None, *output[1:])}: "
                f"the loss {kind} expected targets of no more axes"
            )
    if weight is not None and weight.ndim > 1:
        known = [y.shape[1:], () if output is None else output[1:]]
        for axis, length in enumerate(weight.shape[1:]):
            lengths = {shape[axis] for shape in known if len(shape) > axis} | {1}
            if None not in lengths and output is not None and length not in lengths:
                raise ValueError(
                    f"sample_weight has the shape {weight.shape}: expected ({len(weight)},), a "
                    f"factor for each example, or one for each target, {y.shape}"
                )


def _array(value) -> Any:
    """A single array of numbers or strings, as numpy sees it; None of anything else."""
    if isinstance(value, tf.Tensor):
        return value.numpy() if tf.executing_eagerly() and value.dtype != tf.string else None
    return value if isinstance(value, np.ndarray) and value.ndim else None


def _output(model) -> tuple | None:
    """The shape of the model's one output, where it is known."""
    outputs = getattr(model, "outputs", None) or []
    return tuple(outputs[0].shape) if len(outputs) == 1 and outputs[0].shape is not None else None


def _keras_loss(loss) -> str | None:
    """The name of a loss of Keras's own that compares target and output entry by entry."""
    if isinstance(loss, str):
        loss = getattr(keras.losses, loss, None) or loss
    cls = loss if inspect.isclass(loss) else type(loss)
    name = getattr(loss, "__name__", cls.__name__)
    for home in (loss, cls):
        if getattr(home, "__module__", "").startswith("keras.") and name != "str":
            return None if any(part in name.lower() for part in ("ctc", "cosine")) else name
    return None


def check_labels(model, y, start, error):
    """Raises ValueError if the error comes of a label outside the classes, with its example.

    Args:
      y: the targets of a micro-batch that begins at example `start`.
    """
    if "label" not in str(error):
        return
    labels = tf.nest.flatten(y)
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != len(labels):  # not known which are whose
        return
    for one, output in zip(labels, outputs):
        classes = output.shape[-1]
        if not isinstance(one, tf.Tensor) or not one.dtype.is_integer or classes is None:
            continue
        one = one.numpy()
        wrong = np.argwhere((one < 0) | (one >= classes))
        if len(wrong):
            n = int(wrong[0][0])
            raise ValueError(
                f"y: the label of example {start + n} is {one[tuple(wrong[0])]}; "
                f"expected 0 to {classes - 1}, the model has {classes} outputs"
            ) from error
