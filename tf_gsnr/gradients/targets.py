"""Targets and weights that do not fit the outputs of a model, as far as Keras's losses tell.

Keras broadcasts what it can: targets [n, 1, 3] against outputs [n, 3] are a loss, and nonsense; and
it cuts labels of 0.5 off to 0. Of a loss of the user's own nothing is known, and nothing refused.
Index letters: n example.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import checks

_ALIKE = """
MeanSquaredError MeanAbsoluteError MeanAbsolutePercentageError MeanSquaredLogarithmicError Huber
LogCosh Poisson KLDivergence CategoricalCrossentropy CategoricalFocalCrossentropy Dice Tversky
BinaryCrossentropy BinaryFocalCrossentropy CosineSimilarity Hinge SquaredHinge CategoricalHinge
""".split()
ALIKE = {getattr(keras.losses, name) for name in _ALIKE}  # that compare entry by entry
OF_LABELS = {keras.losses.SparseCategoricalCrossentropy}
# The function by which Keras means one of the classes.
_FUNCTIONS = {kind: getattr(kind(), "fn", None) for kind in ALIKE | OF_LABELS}
AS_COMPILED = ("crossentropy", "ce")  # which `compile` takes for the one that fits
EXPECTED = "a Keras loss, its name, or a callable (y_true, y_pred) -> [batch]"


def check_loss(loss: Any, outputs: int | None = None):
    """Raises ValueError for what `compile(loss=...)` makes no loss of.

    Args:
      outputs: how many the model has, where that is known.
    """
    whole = callable(loss) or isinstance(loss, str)
    leaves = [loss] if whole else keras.tree.flatten(loss)
    if not any(callable(leaf) or isinstance(leaf, str) for leaf in leaves):
        checks.refuse("loss", loss, EXPECTED)
    for leaf in leaves:
        if leaf is not None:
            _check_leaf(leaf)
    if isinstance(loss, (list, tuple)) and outputs is not None and len(loss) != outputs:
        raise ValueError(f"loss: a list of {len(loss)}; expected one for each of {outputs} outputs")


def _check_leaf(leaf):
    abstract = keras.losses.Loss in (leaf, type(leaf))
    if abstract or not (callable(leaf) or isinstance(leaf, str)):
        checks.refuse("loss", leaf, EXPECTED)
    if isinstance(leaf, str) and leaf in AS_COMPILED:
        return
    if isinstance(leaf, str):
        try:
            keras.losses.get(leaf)
        except ValueError:
            checks.refuse("loss", leaf, EXPECTED)
        if not leaf:
            checks.refuse("loss", leaf, EXPECTED)
    elif isinstance(leaf, type) and not issubclass(leaf, keras.losses.Loss):
        checks.refuse("loss", leaf, EXPECTED)
    elif not isinstance(leaf, (type, keras.losses.Loss)):
        checks.function("loss", leaf, 2, EXPECTED)


def losses_of(model, loss=None):
    """The losses given, or compiled with; None where the model has a `compute_loss` of its own."""
    if loss is not None:
        return loss
    if model.__class__.compute_loss is not keras.Model.compute_loss:
        return None
    return getattr(model, "loss", None)


def kinds(loss) -> list:
    """The class of each of these losses; None where it is none of Keras's."""
    if loss is None:
        return []
    whole = callable(loss) or isinstance(loss, str)
    return [_kind(leaf) for leaf in ([loss] if whole else keras.tree.flatten(loss))]


def _kind(leaf):
    if leaf is None or isinstance(leaf, (list, tuple, dict)) or leaf in AS_COMPILED:
        return None
    if isinstance(leaf, str):
        leaf = keras.losses.get(leaf)
    if isinstance(leaf, type):
        return leaf
    if isinstance(leaf, keras.losses.Loss):
        return type(leaf)
    return next((kind for kind, function in _FUNCTIONS.items() if function is leaf), None)


def check(owner, y, predictions, sample_weight):
    """Raises ValueError where targets or weights do not fit the predictions, by their shapes.

    Args:
      owner: whose `compute_loss` it is.
      y, sample_weight, predictions: tensors, nested, with a leading axis of examples.
    """
    losses = losses_of(owner)
    if losses is None:
        return
    outputs = _by_name(owner, predictions)
    if outputs is None:  # nested deeper
        return
    if isinstance(losses, dict):
        known = {*outputs, *(getattr(owner, "output_names", None) or ())}
        unknown = [name for name in losses if name not in known]
        if unknown:
            raise ValueError(
                f"loss: the model has no output {', '.join(map(repr, unknown))}; expected that of "
                f"{_names_of(outputs)}"
            )
    y = _of_the_only_loss(losses, y, outputs)
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            _check_structure(name, value, outputs)
    for place, name in enumerate(outputs):
        if (
            y is not None
            and _part(losses, name, place) is not None
            and _part(y, name, place) is None
        ):
            raise ValueError(f"y: none for the output {name}; expected targets of each loss")
    for place, (name, output) in enumerate(outputs.items()):
        kind = _kind(_part(losses, name, place))
        target = _part(y, name, place)
        if target is not None and kind in ALIKE | OF_LABELS:
            _check_target(kind, target, output)
        weight = _part(sample_weight, name, place)
        if weight is not None and kind in ALIKE | OF_LABELS:
            _check_weight(weight, output)


def _of_the_only_loss(losses, y, outputs):
    """The targets by output, where one array is given and one output of several has a loss."""
    one = y[0] if isinstance(y, (list, tuple)) and len(y) == 1 else y
    if len(outputs) < 2 or not isinstance(losses, (list, tuple, dict)) or not tf.is_tensor(one):
        return y
    with_loss = [n for i, n in enumerate(outputs) if _part(losses, n, i) is not None]
    return {with_loss[0]: one} if len(with_loss) == 1 else y


def _by_name(owner, predictions) -> dict | None:
    """`{name or place: output}`; None where outputs are nested deeper than a list or dict."""
    if isinstance(predictions, dict):
        outputs = {name: predictions[name] for name in sorted(predictions)}  # as Keras flattens it
    elif isinstance(predictions, (list, tuple)):
        names = getattr(owner, "output_names", None) or range(len(predictions))
        outputs = dict(zip(names, predictions))
        if len(outputs) != len(predictions):
            return None
    else:
        names = getattr(owner, "output_names", None) or [0]
        outputs = {names[0]: predictions}
    return outputs if all(tf.is_tensor(v) for v in outputs.values()) else None


def _part(nested, name, place):
    """What belongs to one of the outputs."""
    if isinstance(nested, dict):
        return nested.get(name)
    if isinstance(nested, (list, tuple)):
        return nested[place] if place < len(nested) else None
    return nested


def _check_structure(name, value, outputs):
    names = ", ".join(map(str, outputs))
    if isinstance(value, dict):
        if not set(value) <= set(outputs):
            given = ", ".join(map(str, value))
            raise ValueError(f"{name}: a dict of {given}; expected that of {_names_of(outputs)}")
    elif isinstance(value, (list, tuple)):
        if len(value) != len(outputs):
            count = f"{len(outputs)}, one for each output"
            raise ValueError(f"{name}: {len(value)} arrays; expected {count}")
    elif len(outputs) > 1 and name == "y":
        raise ValueError(f"{name}: one array; expected one for each output: {names}")


def _names_of(outputs) -> str:
    return ", ".join(map(str, outputs)) if 0 not in outputs else "the only output, and no dict"


def _check_target(kind, y, output):
    if not isinstance(y, tf.Tensor):
        return
    if not (y.dtype.is_floating or y.dtype.is_integer or y.dtype.is_bool):
        raise ValueError(f"y: targets of dtype {y.dtype.name}; expected numbers")
    given, made = _dimensions(y), _dimensions(output)
    if given is None or made is None:
        return
    if kind in OF_LABELS:
        fits = _same(given, made[:-1]) or _same(given, [*made[:-1], 1])
        expected = "a class for each row of outputs, a whole number"
    else:
        fits = _same(given, made, or_one=True) or _same(given, [*made, 1])
        fits = fits or made[-1:] == [1] and _same(given, made[:-1])
        expected = "targets of the shape of the outputs"
    if not fits:
        raise ValueError(
            f"y: targets of shape {_text(given)} of an example against outputs of shape "
            f"{_text(made)}; the loss {kind.__name__} expected {expected}"
        )


def _check_weight(weight, output):
    given, made = _dimensions(weight), _dimensions(output)
    if given is None or made is None:
        return
    fits = len(given) <= max(1, len(made)) and all(
        None in (a, b) or a in (1, b) for a, b in zip(given, made or [1])
    )
    if not fits:
        raise ValueError(
            f"sample_weight: of shape {_text(given)} of an example against outputs of shape "
            f"{_text(made)}; expected [examples], or a weight for each output of an example"
        )


def _dimensions(v):
    """Of an example; None where they are not known."""
    if not isinstance(v, tf.Tensor) or v.shape.rank is None:
        return None
    return list(v.shape)[1:]


def _same(given, made, or_one=False) -> bool:
    """Whether the sizes agree; or are one, which Keras broadcasts within an example."""
    fits = (None in (g, m) or g == m or or_one and g == 1 for g, m in zip(given, made))
    return len(given) == len(made) and all(fits)


def _text(shape):
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def whole_labels(model, loss, batches):
    """The micro-batches; ValueError at a label that is no class, though a floating-point number.

    Of integers the loss itself says so.

    Args:
      model: for the number of its outputs.
      loss: the one given, or None for the model's own.
      batches: `(x, y, sample_weight, valid)`.
    """
    losses = losses_of(model, loss)
    known = kinds(losses)
    labels = bool(OF_LABELS & set(known))
    ignored = _ignored(losses) if labels else []
    outputs = getattr(model, "outputs", None) or []
    sizes = [v.shape[-1] for v in outputs] if len(outputs) == len(known) else [None] * len(known)
    start = 0
    for batch in batches:
        if labels:
            _check_whole(known, sizes, ignored, batch[1], start)
            start += int(np.prod(batch[-1].shape))
        yield batch


def _ignored(losses) -> list:
    """The classes that losses are told to ignore."""
    losses = [v for v in keras.tree.flatten(losses) if isinstance(v, keras.losses.Loss)]
    return [loss.get_config().get("ignore_class") for loss in losses if type(loss) in OF_LABELS]


def _check_whole(known, sizes, ignored, y, start):
    leaves = [v for v in tf.nest.flatten(y) if v is not None]
    if len(leaves) != len(known):
        return
    for kind, classes, leaf in zip(known, sizes, leaves):
        if kind not in OF_LABELS or not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
            continue
        values = leaf.numpy()
        most = np.inf if classes is None else classes - 1
        values = np.where(np.isin(values, [v for v in ignored if v is not None]), 0, values)
        wrong = np.argwhere(~((values == np.floor(values)) & (values >= 0) & (values <= most)))
        if len(wrong):
            last = "" if classes is None else f" from 0 to {most}"
            raise ValueError(
                f"y: the label of example {start + int(wrong[0][0])} is "
                f"{values[tuple(wrong[0])]}; expected a class, a whole number{last}"
            )
