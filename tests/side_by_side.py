"""A situation run as plain Keras and with tf_gsnr, and how far the two are apart.

Index letters: n example, j variable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import traceback

import keras
import numpy as np
import tensorflow as tf

import tf_gsnr

MOMENTS_TOLERANCE = 1e-3
EXAMPLES = 6  # in a comparison of moments
PACKAGE = pathlib.Path(tf_gsnr.__file__).resolve().parent


@dataclasses.dataclass
class Trained:
    """What a user is left with after `fit`."""

    start: list | None
    weights: list
    state: list  # of the model, beside its weights: seeds
    history: dict
    evaluated: dict
    predicted: list


@contextlib.contextmanager
def dtype_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def one_fit(model, how, data):
    model.compile(**how)
    return model.fit(**data).history


def trained(situation, wrap: bool, **options) -> Trained:
    """Trains a situation from seed 1, plain or as `GSNRModel` with its options."""
    with dtype_policy(situation.policy):
        keras.utils.set_random_seed(1)
        network = situation.make()
        start = network.get_weights() if network.built else None
        data = dict(epochs=2, verbose=0, shuffle=False) | situation.data()
        x, y = data["x"], data.get("y")
        try:
            model = tf_gsnr.GSNRModel(network, **situation.gsnr, **options) if wrap else network
            history = (situation.use or one_fit)(model, situation.how(), data)
        except Exception as error:
            error.untouched = start is None or same_arrays(start, network.get_weights())
            raise
        evaluated, predicted = {}, []
        if situation.evaluates and not isinstance(x, keras.utils.PyDataset):
            size = {} if y is None and isinstance(x, tf.data.Dataset) else dict(batch_size=8)
            evaluated = model.evaluate(x, y, verbose=0, return_dict=True, **size)
            ragged = isinstance(x, tf.data.Dataset)
            x = next(iter(x))[0] if ragged else x
            predicted = tf.nest.flatten(model.predict(x, verbose=0, **({} if ragged else size)))
    weights = network.get_weights()
    known = {id(v) for v in network.weights}
    state = [np.array(v) for v in network.variables if id(v) not in known and "seed" in v.path]
    return Trained(start, weights, state, history, evaluated, predicted)


def same_arrays(a, b):
    return len(a) == len(b) and all(np.array_equal(v, w) for v, w in zip(a, b))


def is_refusal(error) -> bool:
    """Whether tf_gsnr itself refused, and said what: a ValueError raised in its own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = bool(frames) and PACKAGE in pathlib.Path(frames[-1].filename).resolve().parents
    passed_on = ("Exception encountered when calling", "Graph execution error", "in user code:")
    return (
        isinstance(error, ValueError)
        and own
        and not any(text in str(error) for text in passed_on)
        and len(str(error)) > 30
    )


def check_shown(history, plain_history):
    """What `GSNRModel` adds is finite or NaN; `osgr` is at most one."""
    for name, values in history.items():
        if name in plain_history:
            continue
        values = np.asarray(values, np.float64)
        assert not np.isinf(values).any(), f"{name} is infinite: {values}"
        if name.split("/")[-1].startswith("osgr"):
            assert not (values > 1 + 1e-6).any(), f"{name} above 1: {values}"


def check_same_training(ours: Trained, theirs: Trained, tolerance: float):
    """Weights to `tolerance` of how far training moved them; history, evaluate, predict."""
    assert len(ours.weights) == len(theirs.weights)
    finite = [np.isfinite(w.astype(np.float64)).all() for w in theirs.weights]
    assert all(finite), "plain training diverges: nothing to compare"
    start = theirs.start or [np.zeros_like(w) for w in theirs.weights]
    moved = max([_largest(a, b) for a, b in zip(theirs.weights, start)] or [0.0])
    size = max([np.abs(w.astype(np.float64)).max() for w in theirs.weights if w.size] or [0.0])
    rounding = 4 * np.finfo(np.float64 if tolerance < 1e-7 else np.float32).eps * size
    for j, (a, b) in enumerate(zip(ours.weights, theirs.weights)):
        apart = _largest(a, b)
        message = f"weight {j}, {a.shape}: {apart:.1e} apart; training moves weights by {moved:.1e}"
        assert apart <= tolerance * moved + rounding, message
    assert same_arrays(ours.state, theirs.state), "seeds of random layers have another state"
    missing = set(theirs.history) - set(ours.history)
    assert not missing, f"not in the history: {sorted(missing)}"
    loose = max(1e-5, 10 * tolerance) if tolerance >= 1e-7 else 1e-7
    for name, values in theirs.history.items():
        _close(ours.history[name], values, loose, f"history[{name!r}]")
    assert set(ours.evaluated) == set(theirs.evaluated), "evaluate returns other names"
    for name, value in theirs.evaluated.items():
        _close(ours.evaluated[name], value, loose, f"evaluate: {name}")
    assert len(ours.predicted) == len(theirs.predicted)
    for a, b in zip(ours.predicted, theirs.predicted):
        _close(a, b, loose, "predict")


def _largest(a, b):
    if not a.size:
        return 0.0
    if a.dtype.kind not in "fV":
        return float(np.abs(a.astype(np.int64) - b.astype(np.int64)).max())
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def _close(a, b, tolerance, what):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{what}: {a.shape} and {b.shape}"
    scale = np.abs(b[np.isfinite(b)]).max() if np.isfinite(b).any() else 1.0
    np.testing.assert_allclose(
        a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-3), err_msg=what
    )


# ------------------------------------------------------------------------------------- moments
def few(situation):
    """The first examples of a situation's data: `x, y, sample_weight`."""
    data = situation.data()
    x, y, weight = data["x"], data.get("y"), data.get("sample_weight")
    if isinstance(x, tf.data.Dataset):
        parts = next(iter(x))
        x, y, weight = (*parts, None)[:3] if len(parts) < 4 else parts
    return tuple(
        keras.tree.map_structure(lambda v: take(v, 0, EXAMPLES), p) for p in (x, y, weight)
    )


def take(v, first, last):
    """Rows of anything that has rows."""
    if v is None:
        return None
    if isinstance(v, tf.SparseTensor):
        return tf.sparse.slice(v, [first, 0], [last - first, v.shape[1]])
    return v[first:last]


def loop_moments(model, x, y, weight):
    """Mean loss, and mean and variance of the gradients, of Keras's own loss on batches of one."""
    flat = [v for v in tf.nest.flatten(x) if v is not None]
    count = min(EXAMPLES, int(flat[0].shape[0]))
    variables = model.trainable_variables
    losses, rows = [], []
    for n in range(count):
        one = keras.tree.map_structure(lambda v, n=n: as_tensor(take(v, n, n + 1)), [x, y, weight])
        with tf.GradientTape() as tape:
            prediction = model(one[0], training=False)
            loss = model._compute_loss(one[0], one[1], prediction, one[2], training=False)
            loss = tf.reduce_sum(tf.convert_to_tensor(loss))
            for v in variables:
                if getattr(v, "regularizer", None) is not None:
                    loss = loss - tf.cast(v.regularizer(v), loss.dtype)
        gradients = tape.gradient(loss, [v.value for v in variables])
        losses.append(float(loss))
        rows.append(
            [
                np.zeros(v.shape) if g is None else np.asarray(tf.convert_to_tensor(g), np.float64)
                for g, v in zip(gradients, variables)
            ]
        )
    columns = [np.stack(column) for column in zip(*rows)]
    return np.mean(losses), [c.mean(0) for c in columns], [c.var(0) for c in columns]


def as_tensor(v):
    if v is None or isinstance(v, (tf.SparseTensor, tf.RaggedTensor)):
        return v
    if hasattr(v, "tocoo"):
        return tf.constant(v.toarray())
    return tf.convert_to_tensor(v)


def check_moments(model, x, y, weight, truth, tolerance=MOMENTS_TOLERANCE, **options):
    """`gradient_moments` against `loop_moments`; raises what gradient_moments raises."""
    if weight is not None:
        options["sample_weight"] = weight
    moments = tf_gsnr.gradient_moments(model, x, y, **options)
    loss, mean, variance = truth
    for what, ours, theirs in (
        ("mean", moments.mean, mean),
        ("variance", moments.variance(), variance),
    ):
        largest = max([np.abs(t).max() for t in theirs if t.size] or [0.0])
        for v, a, b in zip(model.trainable_variables, ours, theirs):
            scale = max(np.abs(b).max(initial=0), 1e-2 * largest, 1e-10)
            apart = np.abs(np.asarray(a, np.float64) - b).max(initial=0) / scale
            assert apart < tolerance, f"{what} of {v.path}: relative error {apart:.1e}"
    _close(moments.loss, loss, 1e-4, "mean loss")
