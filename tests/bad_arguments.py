"""A table of bad arguments of the public functions, and what comes of each.

Each case is a call with one argument replaced by something that it cannot be. Wanted is an
exception of ours with a line that names the argument: "clear". "foreign" is somebody else's error,
or one that does not name it; "silent" is a call that goes through.
`python benchmarks/bad_arguments.py` prints the counts; `test_bad_arguments.py` holds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import tf_gsnr
from tf_gsnr import metrics

PACKAGE = Path(tf_gsnr.__file__).parent
NAN, INF = float("nan"), float("inf")
rng = np.random.default_rng(0)
X = rng.normal(size=[20, 4]).astype("float32")
LABELS = rng.integers(0, 3, 20)
TARGETS = rng.normal(size=[20, 3]).astype("float32")


def network(units=5):
    keras.utils.set_random_seed(0)
    layers = [keras.Input([4]), keras.layers.Dense(units, "relu"), keras.layers.Dense(3)]
    return keras.Sequential(layers)


MODEL, OTHER = network(), network(6)
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
MSE = keras.losses.MeanSquaredError()

# What an argument of each kind cannot be.
POSITIVE_INTEGER = [0, -1, 1.5, NAN, INF, "3", True, [1], (), {}, object(), 2j, b"1", np.ones(2)]
INTEGER = [1.5, NAN, INF, "3", [1], (), {}, object(), 2j, b"1"]
BOOLEAN = ["False", "yes", 0, 1, 2.0, [], (), {}, object(), NAN]
CHOICE = ["", "nonsense", 3, 1.5, [], {}, object(), b"auto", NAN]
NUMBER = [-1, NAN, INF, -INF, "0.1", [], {}, object(), 2j, True]
PATH = [3, 1.5, [], {}, object(), True, "", NAN]
MOMENTS = [None, 3, "moments", [], {}, object(), X, np.nan]
MODELS = [None, 3, "model", [], {}, object(), X, keras.layers.Dense(1), keras.Model]
DATA = [None, 3, "x", [], {}, object(), X[:0], X[:5], np.float32(1), [1.0, 2.0], ["a"] * 20]
LIST = [None, 3, "numbers", object(), ["nonsense"], [3], {"a": 1}, NAN]


class Case(NamedTuple):
    """A call, the argument that is wrong, its value."""

    function: str
    argument: str
    value: Any
    call: Callable


def _of(name, function, good: dict, bad: dict) -> Iterator[Case]:
    """A case for each bad value of each argument; the others are good."""
    for argument, values in bad.items():
        for value in values:
            given = good | {argument: value}
            yield Case(name, argument, value, lambda given=given: function(**given))


def cases() -> Iterator[Case]:
    """All of them."""
    labels = [LABELS + 7, LABELS - 7, LABELS + 0.5, LABELS[:, None, None], LABELS[:3]]
    weights = [np.ones([20, 20]), np.ones(3), np.ones([20, 7]), 3, "w", object(), X * NAN]
    measured = {
        "engine": CHOICE,
        "batch_size": POSITIVE_INTEGER,
        "sign_counts": BOOLEAN,
        "training": BOOLEAN,
        "contributions": BOOLEAN,
        "recalibrate": BOOLEAN,
        "seed": INTEGER,
        "batch_norm": [*CHOICE, None, True],
        "dtype": ["int32", "float16", "float", 3, [], {}, object(), np.float64, NAN],
        "jit_compile": ["", "true", 3, 1.5, [], {}, object(), None, NAN],
        "strategy": ["mirrored", 3, [], {}, object(), True],
        "loss": [3, 1.5, [], {}, object(), "nonsense", True, NAN, b"mse", [3]],
    }
    good = dict(model=MODEL, x=X, y=LABELS, loss=SPARSE)
    yield from _of(
        "gradient_moments",
        tf_gsnr.gradient_moments,
        good,
        measured
        | {
            "model": MODELS,
            "x": [*DATA, X[:, :2], X * NAN, X.astype(str)],
            "y": [*labels, 3, "y", [], {}, object(), LABELS * NAN, ["a"] * 20],
            "sample_weight": weights,
        },
    )
    regression = good | dict(y=TARGETS, loss=MSE)
    bad = {"y": [TARGETS[:, None], TARGETS[:, :, None], TARGETS[:5], TARGETS * NAN, TARGETS * INF]}
    yield from _of("gradient_moments, mse", tf_gsnr.gradient_moments, regression, bad)
    yield from _of("explain", tf_gsnr.explain, {}, {"model": MODELS})
    bad = {"model": MODELS, "x": [*DATA[:8], X * NAN], "y": [LABELS + 7, LABELS[:3], "y"]}
    bad |= {"loss": [3, object(), "nonsense", True], "training": BOOLEAN}
    yield from _of("check_engine", tf_gsnr.check_engine, good, bad)
    yield from _of_moments()
    yield from _of_training(measured)
    yield from _of_records()


def _of_moments():
    moments = tf_gsnr.gradient_moments(MODEL, X, LABELS, SPARSE, sign_counts=True)
    others = tf_gsnr.gradient_moments(OTHER, X, LABELS, SPARSE, sign_counts=True)
    unsigned = tf_gsnr.gradient_moments(MODEL, X, LABELS, SPARSE)
    fewer = tf_gsnr.gradient_moments(MODEL, X[:9], LABELS[:9], SPARSE)
    one = tf_gsnr.gradient_moments(MODEL, X[:1], LABELS[:1], SPARSE)
    for name in ("gsnr", "same_sign", "noise_scale"):
        bad = {"moments": [*MOMENTS, *([] if name == "same_sign" else [one])]}
        yield from _of(
            name, getattr(metrics, name), dict(moments=moments), bad | {"bias_corrected": BOOLEAN}
        )
    unsigned_only = {"moments": [*MOMENTS, unsigned]}
    yield from _of("step_sign", metrics.step_sign, {}, unsigned_only)
    bad = {"moments": [*MOMENTS, one], "examples": POSITIVE_INTEGER, "bias_corrected": BOOLEAN}
    yield from _of("osgr", metrics.osgr, dict(moments=moments), bad)
    yield from _of("gradient_diversity", metrics.gradient_diversity, {}, {"moments": MOMENTS})
    bad = {"moments": [*MOMENTS, one], "learning_rate": [*NUMBER, None]}
    yield from _of("gap_growth", metrics.gap_growth, dict(moments=moments, learning_rate=1), bad)
    for name in ("gap_shares", "summarize"):
        bad = {"moments": [*MOMENTS, others, one], "model": [*MODELS[:7], OTHER]}
        yield from _of(name, getattr(metrics, name), dict(moments=moments, model=MODEL), bad)
    lists = [*MOMENTS, [moments, others], [moments, fewer], [moments, 3], [one]]
    bad = {"list_of_moments": lists}
    for name in ("osgr_predicted", "osgr_predicted_se", "osgr_from_gsnr"):
        yield from _of(name, getattr(metrics, name), {}, bad)
    pairs = [[2.0, 1.0]] * 3
    losses = [None, 3, "x", [], [1.0, 2.0], [[1.0, 2.0, 3.0]] * 3, pairs[:1], [[NAN, 1.0]] * 3]
    losses += [[["a", "b"]] * 3, object(), [[INF, 1.0]] * 3, [[1.0, 2.0], [1.0]]]
    for name in ("osgr_measured", "osgr_measured_se"):
        good = dict(train_losses=pairs, test_losses=pairs)
        bad = {"train_losses": losses, "test_losses": losses}
        yield from _of(name, getattr(metrics, name), good, bad)
    yield from _of("Moments.merge", moments.merge, {}, {"other": [*MOMENTS, others, unsigned]})
    yield from _of(
        "Moments.variance", moments.variance, {}, {"ddof": [2, -1, 0.5, NAN, "1", None, []]}
    )
    of = dict(gradients=[X[:, None]], losses=np.zeros(20))
    bad = {"losses": [np.zeros(3), np.zeros([20, 2])], "gradients": [[X[:3]], [np.zeros([3, 4])]]}
    yield from _of("Moments.of", tf_gsnr.Moments.of, of, bad | {"valid": [np.ones(3, bool)]})
    bad = {"moments": [*MOMENTS, others], "step": [*INTEGER, None], "writer": [None, 3, "dir", []]}
    import tensorflow as tf

    writer = tf.summary.create_noop_writer()
    good = dict(writer=writer, moments=moments, model=MODEL, step=0)
    yield from _of("write_tensorboard", tf_gsnr.write_tensorboard, good, bad)


def _of_training(measured):
    from tf_gsnr.training import gap

    bad = {
        "model": MODELS[:8],
        "engine": CHOICE,
        "measure_every": POSITIVE_INTEGER,
        "pool": CHOICE,
        "bias_corrected": BOOLEAN,
        "shown": [None, 3, "gsnr", object(), ["nonsense"], [3], NAN],
        "examples": POSITIVE_INTEGER,
        "sample": [v for v in POSITIVE_INTEGER if v is not None],
        "per_layer": BOOLEAN,
        "run_dir": PATH,
        "overwrite": BOOLEAN,
        "progress": LIST,
    }
    yield from _of("GSNRModel", tf_gsnr.GSNRModel, dict(model=MODEL), bad)
    bad = {k: v for k, v in measured.items() if k in ("engine", "batch_size")} | {
        "x": DATA,
        "y": [LABELS[:3], 3, "y", object()],
        "sample_weight": [np.ones(3), 3, "w", object()],
        "every_epochs": POSITIVE_INTEGER,
        "every_steps": POSITIVE_INTEGER,
        "schedule": [3, "often", [], object()],
        "test_data": [3, "test", X, (X,), (X, LABELS, LABELS), (X, LABELS[:3]), object()],
        "examples": POSITIVE_INTEGER,
        "per_layer": BOOLEAN,
        "sign_counts": BOOLEAN,
        "run_dir": PATH,
        "overwrite": BOOLEAN,
        "keep": CHOICE,
        "log_dir": PATH,
        "training": BOOLEAN,
        "contributions": BOOLEAN,
        "batch_norm": [*CHOICE, None, True],
        "dtype": ["int32", 3, object()],
        "seed": INTEGER,
        "jit_compile": ["", "true", 3, object()],
    }
    yield from _of("GSNRCallback", tf_gsnr.GSNRCallback, dict(x=X, y=LABELS), bad)
    yield from _of("ProgressBar", tf_gsnr.ProgressBar, {}, {"numbers": LIST})
    classes = [None, 3, "Dense", [], object(), keras.Model, int, keras.layers.Dense(1)]
    bad = {"layer_class": [c for c in classes if c is not keras.Model]}  # which is a layer
    yield from _of("register_rule", tf_gsnr.register_rule, {}, bad)
    bad = {"optimizer_class": classes}
    yield from _of("register_optimizer", gap.register_optimizer, {}, bad)
    yield from _of("forget", tf_gsnr.forget, {}, {"model": MODELS[:7]})


def _of_records():
    missing = [*PATH, "/no/such/directory"]
    yield from _of("read", tf_gsnr.read, {}, {"run_dir": missing})
    yield from _of("page", tf_gsnr.page, {}, {"run_dir": missing})
    yield from _of("plot", tf_gsnr.plot, {}, {"source": [*missing, None]})


# Names by which a message may speak of an argument.
SPOKEN = {
    "x": "x|examples|data",
    "y": "y|targets?|labels?|dataset",
    "loss": "loss",
    "moments": "moments",
    "other": "other|moments",
    "model": "model",
    "gradients": "gradients|losses",
    "losses": "losses|gradients",
    "test_data": "test_data|x|y",
    "list_of_moments": "list_of_moments|moments",
    "numbers": "numbers",
    "run_dir": "run_dir|directory",
    "source": "source|run_dir",
    "layer_class": "register_rule",
    "optimizer_class": "register_optimizer",
}


def outcome(case: Case) -> str:
    """ "clear", or "foreign: ..." or "silent: ..." with what happened."""
    try:
        case.call()
    except (ValueError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else ""
        named = SPOKEN.get(case.argument, re.escape(case.argument))
        if re.search(rf"(?<![a-z_]){named}(?![a-z])", first) and _is_ours(error):
            return "clear"
        return f"foreign: {type(error).__name__}: {first[:160]}"
    except Exception as error:
        return f"foreign: {type(error).__name__}: {str(error)[:160]}"
    return "silent"


def _is_ours(error) -> bool:
    """Whether it was raised by a line of this package."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return PACKAGE in Path(trace.tb_frame.f_code.co_filename).parents


def described(case: Case) -> str:
    value = case.value
    shown = f"array {value.shape}" if isinstance(value, np.ndarray) else repr(value)[:50]
    return f"{case.function}({case.argument}={shown})"
