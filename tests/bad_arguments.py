"""A table of bad arguments: for each argument of each public function, values of the wrong kinds.

What is wanted of each is an error of ours, one line that names the argument and says what is
expected. What is fine after all stands in the table as `Fine(value, why)`. The table is read by
`test_bad_arguments.py`, and by `benchmarks/bad_arguments.py`, which prints all that was said.
"""

from __future__ import annotations

import decimal
import fractions
import functools
import itertools
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import tf_gsnr
from tf_gsnr import Moments, data, experiments, metrics, models
from tf_gsnr.experiments.framework.settings import fields
from tf_gsnr.gradients import engines, losses, measure, recalibration
from tf_gsnr.gradients.layerwise import rules
from tf_gsnr.training import gap, schedule, tensorboard

OURS = str(Path(tf_gsnr.__file__).parent)


class Fine(NamedTuple):
    """A value that looks bad and is not."""

    value: Any
    why: str


class Attempt(NamedTuple):
    """A call with one bad argument.

    Attributes:
      function, argument, value: which, and with what.
      call: makes it.
      fine: why it is no error, if it is none.
    """

    function: str
    argument: str
    value: Any
    call: Callable
    fine: str = ""

    def __str__(self):
        try:
            text = repr(self.value)
        except Exception:  # moments of nonsense
            text = f"<{type(self.value).__name__}>"
        value = " ".join(re.sub(r" at 0x\w+", "", text).split())
        return f"{self.function}({self.argument}={value[:70]})"


def outcome(attempt: Attempt) -> tuple[str, str]:
    """`(verdict, message)`: clear, foreign, silent, or accepted as the table says."""
    try:
        attempt.call()
    except Exception as error:
        message = str(error)
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = place.startswith(OURS) and isinstance(error, (ValueError, TypeError, ImportError))
        return verdict_of(message, attempt.argument, ours), f"{type(error).__name__}: {message}"
    return ("accepted" if attempt.fine else "silent"), ""


def verdict_of(message: str, argument: str, ours: bool = True) -> str:
    """Whether a message is one line that names the argument and says what is expected."""
    named = re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", message)
    helps = re.search(r"expected|available|pass |set |call |look for|measure|choose", message, re.I)
    clear = ours and named and helps and "\n" not in message and len(message) < 700
    return "clear" if clear else "foreign"


NAN, INF = float("nan"), float("inf")
BOOLEAN = ["False", "", 1, 0, 0.5, NAN, None, [True], np.array([True, False]), {}]
INTEGER = [1.5, NAN, INF, -INF, "3", "", True, [3], np.array([1, 2]), np.float32(2.5), 10**30, 1j]
INTEGER += [{}, object(), b"3", np.zeros([0], int), tf.constant(1.5), -(10**30)]
COUNT = [*INTEGER, 0, -1, np.int64(-3)]
NUMBER = [NAN, INF, -INF, "0.1", "", None, True, [0.1], np.array([0.1, 0.2]), 1j, {}, 10**400]
RATE = [*NUMBER, -1, np.float32(-0.1)]
CHOICE = ["", "nonsense", "AUTO ", 1, ["auto"], NAN, b"auto", np.array(["auto", "x"]), {}, 2.0]
PATH = ["", 5, 1.5, NAN, True, ["runs"], {}, object(), "a\0b", np.zeros(3)]
NAMES = ["gsnr", "", ["nonsense"], [1], 5, None, ("gsnr", "gsnr"), {"gsnr": 1}, NAN, [None], [[]]]
# Of kinds that hardly anybody thinks of.
ODD = [decimal.Decimal("3"), fractions.Fraction(7, 2), np.float16(3.5), np.datetime64("2020")]
ODD += [complex(3, 0), ..., NotImplemented, slice(3), range(3), bytearray(b"3"), lambda: 3, {3}]
ODD += [iter([3]), tf.constant("3"), tf.constant([3]), memoryview(b"3"), Exception("3")]
LONG = ["x" * 300, "\udcff", "a\nb", "\t", "/dev/null/x"]
N = 8


def _all() -> list[Attempt]:
    attempts: list[Attempt] = []
    for part in (of_measuring, of_metrics, of_moments, of_training, of_looking, of_adding):
        attempts += part()
    attempts += of_recalibration() + of_data() + of_settings()
    return attempts + of_streams() + of_user_code() + of_oddities()


@functools.cache
def all_attempts() -> tuple[Attempt, ...]:
    """The table, made once."""
    return tuple(_all())


def tries(function: str, call: Callable, /, **arguments) -> list[Attempt]:
    """The attempts of one function: `call(argument=value)` for each value of each argument."""
    attempts = []
    for argument, values in arguments.items():
        for given in values:
            value, fine = given if isinstance(given, Fine) else (given, "")
            one = functools.partial(call, **{argument: value})
            attempts.append(Attempt(function, argument, value, one, fine))
    return attempts


def named(argument: str, attempts: list[Attempt]) -> list[Attempt]:
    """The attempts, of an argument that messages call otherwise, as the flag for it is called."""
    return [one._replace(argument=argument) for one in attempts]


@functools.cache
def network(outputs=3, name="net"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input([4]), keras.layers.Dense(outputs, name="dense")], name=name
    )
    model.compile("sgd", "mse")
    return model


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[N, 4]).astype(np.float32)
    return x, rng.normal(size=[N, 3]).astype(np.float32), rng.integers(0, 3, N)


@functools.cache
def moments(outputs=3, n=N, dtype=np.float32):
    rng = np.random.default_rng(outputs + n)
    gradients = [rng.normal(1, 1, size=[n, *v.shape]) for v in network(outputs).trainable_variables]
    gradients = [g.astype(dtype) for g in gradients]
    return Moments.of(gradients, np.zeros(n), sign_counts=True).numpy()


def bad_models():
    frozen = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)], name="frozen")
    frozen.trainable = False
    unbuilt = keras.Sequential([keras.layers.Dense(3)], name="unbuilt")
    return [None, "model", 5, NAN, {}, [network()], keras.Model, keras.layers.Dense(1), unbuilt] + [
        frozen,
        lambda x: x,
        np.zeros(3),
    ]


def bad_moments():
    good = moments()
    return [None, 5, "moments", {}, (1, 2), NAN, np.zeros(3), Moments, [1, 2]] + [
        Moments.empty(network().trainable_variables).numpy(),
        good._replace(mean=good.mean[:1]),
        good._replace(count=np.int64(-3)),
        good._replace(count=np.float64(2.5)),
        good._replace(count=NAN),
        good._replace(count="8"),
        good._replace(mean=[np.zeros(3), np.zeros(2)]),
        good._replace(m2=[-v for v in good.m2]),
        good._replace(m2=None),
        good._replace(mean=["a", "b"]),
        good._replace(mean=[], m2=[]),
        good._replace(positives=good.positives[:1]),
    ]


BAD_X = [None, "text", 3.0, 5, object(), [], {}, NAN, True, lambda: 0, np.float32(1)] + [
    np.zeros([0, 4], np.float32),
    np.zeros([N, 5], np.float32),
    np.zeros([N, 4, 2], np.float32),
    np.zeros([N], np.float32),
    np.zeros([N + 1, 4], np.float32),
    np.full([N, 4], NAN, np.float32),
    np.full([N, 4], INF, np.float32),
    np.full([N, 4], "a"),
    np.zeros([N, 4], complex),
    np.array([object()] * N),
    [[0.0] * 4] * N,
    [np.zeros([N, 4], np.float32)] * 2,
    {"nonsense": np.zeros([N + 2, 4], np.float32)},
    (np.zeros([N, 4], np.float32), None, None, None),
    np.zeros([N, 4], "datetime64[s]"),
]
BAD_Y = ["text", 3.0, 5, object(), {}, NAN, True, lambda: 0] + [
    np.zeros([0, 3], np.float32),
    np.zeros([N, 4], np.float32),
    np.zeros([N, 2], np.float32),
    np.zeros([N, 1, 3], np.float32),
    np.zeros([N, 3, 1, 1], np.float32),
    np.zeros([N, 3, 3], np.float32),
    Fine(np.zeros([N, 1], np.float32), "one target for all outputs of an example"),
    np.zeros([N], np.float32),
    np.zeros([N - 1, 3], np.float32),
    np.full([N, 3], NAN, np.float32),
    np.full([N, 3], INF, np.float32),
    np.full([N, 3], "a"),
    np.zeros([N, 3], complex),
    [[0.0] * 3] * N,
    [np.zeros([N, 3], np.float32)] * 2,
    {"nonsense": np.zeros([N, 3], np.float32)},
    np.array([object()] * N),
]
BAD_LABELS = [
    np.full([N], 0.5),
    np.full([N], 1.5, np.float32),
    np.full([N], NAN, np.float32),
    np.full([N], 3),
    np.full([N], -1),
    np.full([N], 99.0),
    np.zeros([N, 3], int),
    np.zeros([N, 2, 1], int),
    np.full([N], "a"),
    np.full([N], 10**12),
    tf.fill([N], 0.5),
    Fine(np.zeros([N], np.float32), "whole numbers are classes, whatever their dtype"),
    Fine(np.zeros([N, 1], int), "a column of classes, as Keras takes it"),
    Fine(np.zeros([N], bool), "two classes of the three"),
]
BAD_WEIGHTS = ["text", 3.0, object(), {}, NAN, True, [1.0] * N] + [
    np.ones([N, N], np.float32),
    np.ones([N + 1], np.float32),
    np.ones([N, 2], np.float32),
    np.ones([N, 1, 1, 1], np.float32),
    np.ones([0], np.float32),
    np.full([N], NAN, np.float32),
    np.full([N], INF, np.float32),
    np.full([N], "a"),
    np.full([N], 1j),
    {"nonsense": np.ones([N])},
    [np.ones([N]), np.ones([N])],
    Fine(np.ones([N, 1], np.float32), "a column of weights, as Keras takes it"),
    Fine(np.full([N], -1.0), "a factor as any other: a loss that is to grow"),
]
LOSS = ["nonsense", "", 5, NAN, True, object(), np.zeros(3), keras.losses.Loss, {}, []] + [
    {"nonsense": "mse"},
    ["mse", "mse"],
    lambda: 0,
    lambda y, p: "text",
    lambda y, p: None,
]


def of_measuring():
    x, y, labels = arrays()
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def measured(**given):
        given = {"model": network(), "x": x, "y": y, "loss": "mse"} | given
        return tf_gsnr.gradient_moments(given.pop("model"), given.pop("x"), **given)

    def of_labels(**given):
        return tf_gsnr.gradient_moments(network(), x, loss=sparse, **given)

    def of_labels_in_a_dataset(y):
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
        return tf_gsnr.gradient_moments(network(), batches, loss=sparse)

    def compared(**given):
        return tf_gsnr.check_engine(**{"model": network(), "x": x, "y": y, "loss": "mse"} | given)

    def chosen(**given):
        return measure.chosen_engine(**{"model": network(), "x": x, "y": y, "loss": "mse"} | given)

    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    streams = [dataset, dataset.batch(2).repeat(), tf.data.Dataset.range(3), dataset.take(0)]
    shared = dict(x=BAD_X, y=[None, *BAD_Y], loss=LOSS, sample_weight=BAD_WEIGHTS)
    dtypes = ["int32", "float16", "nonsense", 5, np.int32, tf.int32, "", True, ["float32"], "bool"]
    return [
        *tries("gradient_moments", measured, model=bad_models(), **shared),
        *tries("gradient_moments", functools.partial(measured, y=None), x=streams),
        *tries("gradient_moments of labels", of_labels, y=BAD_LABELS),
        *tries("gradient_moments of a dataset", of_labels_in_a_dataset, y=BAD_LABELS[:6]),
        *tries(
            "gradient_moments",
            measured,
            engine=[*CHOICE, None],
            batch_size=[*COUNT, None, Fine(2**31 - 1, "more than there are: all at once"), 2**40],
            sign_counts=BOOLEAN,
            training=BOOLEAN,
            seed=INTEGER,
            batch_norm=[*CHOICE, None, True],
            contributions=BOOLEAN,
            recalibrate=BOOLEAN,
            dtype=dtypes,
            jit_compile=[*CHOICE, None, 0, np.array([True])],
            strategy=["mirrored", 5, True, [], tf.distribute.get_strategy(), object(), NAN],
        ),
        *tries("check_engine", compared, model=bad_models(), x=BAD_X[:14], y=BAD_Y[:14]),
        *tries(
            "check_engine",
            compared,
            loss=LOSS[:8],
            sample_weight=BAD_WEIGHTS[:12],
            training=BOOLEAN,
            batch_norm=[*CHOICE, None],
        ),
        *tries("explain", tf_gsnr.explain, model=bad_models()),
        *tries("forget", tf_gsnr.forget, model=bad_models()[:8]),
        *tries("chosen_engine", chosen, engine=[*CHOICE, None], model=bad_models()[:8]),
        *tries(
            "engines.build", lambda engine: engines.build(network(), engine=engine), engine=CHOICE
        ),
        *tries("per_example_loss", losses.per_example_loss, loss=LOSS[:8]),
    ]


def of_metrics():
    good, model, other = moments(), network(), network(5)
    only = {"moments": bad_moments()}
    unsigned = good._replace(positives=[], negatives=[])
    lists = [
        None,
        5,
        "x",
        [],
        {},
        [None],
        [good, 5],
        [good, moments(5)],
        [good, moments(3, 9)],
        NAN,
    ]
    lists += [[good, good._replace(mean=good.mean[:1])], np.zeros(3), [[good]]]
    pairs = [
        None,
        5,
        "x",
        [],
        {},
        NAN,
        [1.0, 2.0],
        [[1.0, 2.0, 3.0]],
        [["a", "b"]],
        np.zeros([0, 2]),
    ]
    pairs += [[[NAN, 1.0]] * 2, [[INF, 1.0]] * 2, np.zeros([2, 2, 2]), [[1.0, 2.0], [1.0]]]
    pairs += [np.zeros([3, 2]), np.zeros([1, 2]), np.full([2, 2], 1j), [[None, 1.0]] * 2]
    losses_of_two = np.array([[2.0, 1.0], [2.0, 1.5]])

    def measured(function, **given):
        return function(**{"train_losses": losses_of_two, "test_losses": losses_of_two} | given)

    def with_moments(function, **given):
        return function(**{"moments": good} | given)

    def with_model(function, **given):
        return function(**{"moments": good, "model": model} | given)

    def why(**given):
        return metrics.why_nan(**{"moments": good, "model": model, "record": {}} | given)

    models_ = [*bad_models()[:9], other]
    moments_ = [*bad_moments(), moments(5)]
    attempts = []
    for function in (metrics.gsnr, metrics.same_sign, metrics.noise_scale):
        call = functools.partial(with_moments, function)
        attempts += tries(function.__name__, call, **only, bias_corrected=BOOLEAN)
    for function in (metrics.gradient_diversity, metrics.step_sign, metrics.mean_gsnr):
        attempts += tries(function.__name__, functools.partial(with_moments, function), **only)
    for function in (metrics.same_sign, metrics.step_sign):
        attempts += tries(function.__name__, function, moments=[unsigned])
    for function in (metrics.summarize, metrics.gap_shares):
        call = functools.partial(with_model, function)
        attempts += tries(function.__name__, call, moments=moments_, model=models_)
    for function in (metrics.osgr_predicted, metrics.osgr_predicted_se, metrics.osgr_from_gsnr):
        attempts += tries(function.__name__, function, list_of_moments=lists)
    for function in (metrics.osgr_measured, metrics.osgr_measured_se):
        call = functools.partial(measured, function)
        attempts += tries(function.__name__, call, train_losses=pairs, test_losses=pairs)
    decreases = [5, "x", [], {}, [NAN, 1.0], [1.0], [[1.0, 2.0]], ["a", "b"], [INF, 1.0], [1j, 1]]
    return [
        *attempts,
        *tries(
            "osgr_measured_se",
            functools.partial(measured, metrics.osgr_measured_se),
            test_decreases=decreases,
        ),
        *tries(
            "osgr",
            functools.partial(with_moments, metrics.osgr),
            **only,
            examples=[*COUNT, Fine(10**12, "a training set may be large")],
            bias_corrected=BOOLEAN,
        ),
        *tries(
            "gap_growth",
            lambda **given: metrics.gap_growth(**{"moments": good, "learning_rate": 0.1} | given),
            **only,
            learning_rate=[*RATE, Fine(0, "no step, no growth: a warm-up begins with it")],
        ),
        *tries("why_nan", why, moments=moments_[:6], model=models_, record=[None, 5, "x", [1]]),
        *tries(
            "part_of",
            lambda indices: metrics.part_of(good, indices),
            indices=[None, 5, "x", [7], [-3], [0.5], ["a"], [NAN], [True], {"a": 1}],
        ),
        *tries(
            "ratio_of_sums",
            lambda **given: metrics.ratio_of_sums(
                **{"numerators": [1.0, 2.0], "denominators": [1.0, 2.0]} | given
            ),
            numerators=[None, 5, "x", [], [1.0], [1.0, 2.0, 3.0], ["a", "b"], [[1.0], [2.0]], {}],
            denominators=[None, 5, "x", [], [1.0], ["a", "b"], [[1.0], [2.0]], {}],
        ),
        *tries("by_layer", metrics.by_layer, paths=[None, 5, "net/dense", [1], [None], NAN]),
    ]


def of_moments():
    variables = network().trainable_variables
    g = [np.ones([N, 4, 3], np.float32), np.ones([N, 3], np.float32)]

    def of(**given):
        return Moments.of(**{"gradients": g, "losses": np.zeros(N)} | given)

    def empty(**given):
        return Moments.empty(**{"variables": variables} | given)

    dtypes = ["int32", "nonsense", 5, "bool", "string", object(), NAN, [], tf.int64, np.uint8, True]
    good, plain = moments(), moments()._replace(positives=[], negatives=[])
    others = [
        None,
        5,
        "x",
        [],
        {},
        NAN,
        Moments,
        moments(5),
        plain,
        good._replace(mean=good.mean[:1]),
    ]
    others += [good._replace(count=2.5), good._replace(m2=None), good._replace(mean=["a", "b"])]
    others += [Fine(moments(dtype=np.float64), "numpy makes float64 of both")]
    return [
        *tries(
            "Moments.of",
            of,
            gradients=[None, 5, "x", {}, NAN, ["a", "b"], [np.ones([N, 3], int)], [1.0, 2.0]]
            + [[np.ones([N - 1, 3])], [g[0], np.ones([N + 1, 3])], [None], [[1, 2], [3]]]
            + [[np.ones([N, 3], complex)], np.float32(1), [np.zeros([N], bool)]]
            + [Fine([], "of no variable: they only count")],
            losses=[None, 5.0, "x", {}, np.zeros([N, 2]), np.zeros(N - 1), np.full(N, "a")]
            + [np.zeros([N, 1]), [], np.full(N, 1j), [[1.0], [1.0, 2.0]]],
            valid=[5, "x", {}, True, np.ones(N), np.ones(N, int), np.ones(N - 1, bool)]
            + [np.ones([N, 1], bool), np.full(N, "a"), []],
            sign_counts=BOOLEAN,
        ),
        *tries(
            "Moments.empty",
            empty,
            variables=[None, 5, "x", [5], ["x"], [object()], NAN, [None], {}],
            dtype=dtypes,
            sign_counts=BOOLEAN,
        ),
        *tries("Moments.merge", good.merge, other=others),
        *tries("Moments.variance", good.variance, ddof=[*INTEGER, -1, None, N, N + 3]),
        *tries("Moments.astype", good.astype, dtype=[*dtypes, None, ""]),
    ]


def of_training():
    x, y, _ = arrays()
    model = keras.models.clone_model(network())
    model.compile("sgd", "mse")
    there = tempfile.mkdtemp()
    file = Path(there) / "file"
    file.write_text("x")

    class WithItsOwnStep(keras.Sequential):
        def train_step(self, data):
            return {}

    def wrapped(**given):
        return tf_gsnr.GSNRModel(given.pop("model", model), **given)

    def watched(**given):
        given = {"x": x, "y": y} | given
        return tf_gsnr.GSNRCallback(given.pop("x"), given.pop("y"), **given)

    def begun(**given):
        callback = watched(**given)
        callback.set_model(network())
        callback.set_params({"epochs": 1, "steps": 1})
        callback.on_train_begin()

    one, set_up = watched(), watched()
    set_up.set_model(network())
    pairs = [5, "x", {}, (x,), (x, y, y), (x, y[:3]), (None, y), (x[:0], y[:0]), [x], NAN, True, x]
    pairs += [(x.astype(np.uint8), y), ("a", "b")]
    no_model = [v for v in bad_models() if not isinstance(v, keras.Model)]
    bar = tf_gsnr.ProgressBar()
    numbers = [*NAMES, ["loss"], Fine([], "a bar with none of our numbers")]
    logs = [5, "x", [1], NAN, True, ("a", "b")]
    in_time = [1.5, NAN, "3", None, -1, [1], {}, True]
    return [
        *tries("GSNRModel", wrapped, model=[*no_model, WithItsOwnStep([keras.layers.Dense(1)])]),
        *tries(
            "GSNRModel",
            wrapped,
            engine=[*CHOICE, None, "vectorized"],
            measure_every=[*COUNT, None],
            pool=[*CHOICE, None],
            bias_corrected=BOOLEAN,
            shown=[*NAMES, []],
            per_layer=BOOLEAN,
            examples=COUNT,
            sample=COUNT,
            progress=numbers,
            run_dir=[*PATH, b"runs"],
            overwrite=BOOLEAN,
        ),
        *tries("GSNRCallback", watched, x=[*BAD_X[:12], *BAD_X[15:16], *BAD_X[20:22]]),
        *tries(
            "GSNRCallback",
            watched,
            y=[*BAD_Y[:9], np.zeros([N - 1, 3])],
            sample_weight=[*BAD_WEIGHTS[:7], *BAD_WEIGHTS[8:9], *BAD_WEIGHTS[14:16]],
            every_epochs=COUNT,
            every_steps=COUNT,
            schedule=[5, "linear", [1, 2], NAN, True, {}],
            test_data=pairs,
            examples=COUNT,
            per_layer=BOOLEAN,
            sign_counts=BOOLEAN,
            run_dir=PATH,
            overwrite=BOOLEAN,
            keep=["", "all", True, 5, ["gsnr"], NAN, {}, "gsnr"],
            log_dir=PATH,
            loss=LOSS[:10],
            engine=[*CHOICE, None],
            batch_size=[*COUNT, None],
            training=BOOLEAN,
            batch_norm=[*CHOICE, None],
            contributions=BOOLEAN,
            seed=INTEGER,
            dtype=["int32", "nonsense", 5, np.int32, "", True, ["float32"]],
            jit_compile=[*CHOICE, None],
        ),
        *tries("GSNRCallback, begun", begun, x=[BAD_X[i] for i in (12, 13, 14, 16)], y=BAD_Y[9:16]),
        *tries(
            "GSNRCallback, begun",
            begun,
            test_data=[(x[:, :2], y), (x, y[:, :2]), (np.full_like(x, NAN), y), (x, y[:, None])]
            + [(x, None)],
            run_dir=[file, file / "below"],
            log_dir=[file, file / "below"],
            sample_weight=[np.ones([N, N]), np.full(N, NAN)],
        ),
        *tries("GSNRCallback.set_model", one.set_model, model=no_model),
        *tries("GSNRCallback.on_epoch_begin", one.on_epoch_begin, epoch=in_time),
        *tries("GSNRCallback.on_epoch_end", one.on_epoch_end, epoch=in_time),
        *tries("GSNRCallback.on_train_batch_begin", one.on_train_batch_begin, batch=in_time),
        *tries("GSNRCallback.on_train_batch_end", one.on_train_batch_end, batch=in_time),
        *tries(
            "GSNRCallback.on_epoch_end",
            lambda logs: set_up.on_epoch_end(0, logs),
            logs=logs,
        ),
        *tries("ProgressBar", tf_gsnr.ProgressBar, numbers=numbers),
        *tries("ProgressBar.without_others", bar.without_others, logs=logs),
        *tries("schedule.linear", functools.partial(schedule.linear), every=[*COUNT, None]),
        *tries(
            "schedule.linear", lambda start: schedule.linear(2, start), start=[*INTEGER, None, -1]
        ),
        *tries("schedule.logarithmic", schedule.logarithmic, per_decade=[*COUNT, None]),
        *tries(
            "schedule.listed",
            schedule.listed,
            steps=[5, None, [], "12", [1.5], [-1], ["1"], [NAN], [True], [None], [[1]], [10**30]]
            + [[INF], {}, Fine([1, 1], "a step that is named twice is one step")],
        ),
        *tries("Schedule.__call__", schedule.linear(2), step=[1.5, NAN, "3", None, [1]]),
    ]


def of_looking():
    there = Path(tempfile.mkdtemp())
    file = there / "file"
    file.write_text("x")
    (there / "empty").mkdir()
    (there / "run").mkdir()
    (there / "run" / "config.json").write_text('{"kind": "training", "settings": {}}')
    (there / "run" / "records.jsonl").write_text('{"step": 0, "gsnr/mean": 0.5, "loss": 1.0}\n')
    nowhere = [there / "nowhere", file, there / "empty", str(there / "no" / "where")]
    history = {"loss": [1.0, 0.5], "gsnr/mean": [0.1, 0.2]}
    good, model = moments(), network()

    def written(**given):
        given = {"writer": writer, "moments": good, "model": model, "step": 0} | given
        return tf_gsnr.write_tensorboard(**given)

    writer = tf.summary.create_file_writer(str(there / "logs"))
    sources = [None, 5, NAN, True, [], {}, object(), {"loss": "x"}, {"gsnr/mean": []}, {1: [2.0]}]
    sources += [{"gsnr/mean": [["a"], ["b"]]}, {"nonsense": [1.0]}, {"gsnr/mean": 0.5}, "a\0b", ""]
    sources += [{"gsnr/mean": [[0.1, 0.2], [0.3, 0.4]]}, {"gsnr/mean": [0.1], "step": [1, 2]}]
    sizes = [None, 5, "big", "", (1,), (1, 2, 3), (0, 1), (-1, 2), (NAN, 1), (INF, 1), (1e9, 1)]
    sizes += [("a", 1), {}, [[1, 2]], (True, True), (1j, 2), (1e-9, 1)]
    return [
        *tries("read", tf_gsnr.read, run_dir=[None, *PATH, *nowhere]),
        *tries("read", lambda frame: tf_gsnr.read(there / "run", frame), frame=BOOLEAN[:6]),
        *tries("page", tf_gsnr.page, run_dir=[None, *PATH, *nowhere]),
        *named(
            "run_dir",
            tries(
                "page, another",
                lambda more: tf_gsnr.page(there / "run", more),
                more=[None, *PATH, *nowhere],
            ),
        ),
        *tries(
            "page",
            lambda output: tf_gsnr.page(there / "run", output=output),
            output=[*PATH, there, file / "below"],
        ),
        *tries("plot", tf_gsnr.plot, source=[*sources, *nowhere]),
        *tries("plot", lambda size: tf_gsnr.plot(history, size), size=sizes),
        *tries(
            "write_tensorboard",
            written,
            writer=[None, 5, "logs", object(), there, NAN],
            moments=[*bad_moments(), moments(5)],
            model=[*bad_models()[:9], network(5)],
            step=[1.5, NAN, INF, "3", None, [1], -1, 10**30, {}, True],
            record=[5, "x", [1], {"a": "text"}, {"a": [1, 2]}, {1: 2.0}, {"a": None}, NAN, True],
        ),
        *tries("open_writer", tensorboard.open_writer, log_dir=[None, *PATH, file, file / "below"]),
    ]


def of_adding():
    class Mine(keras.layers.Layer):
        pass

    class Own(keras.optimizers.SGD):
        pass

    classes = [None, 5, "Dense", int, object, keras.layers.Dense(1), [Mine], NAN, {}, lambda: 0]
    functions = [None, 5, "rule", [], {}, NAN, lambda: 0, lambda a, b, c, d, e: 0]
    return [
        *tries("register_rule", tf_gsnr.register_rule, layer_class=classes),
        *tries(
            "register_rule",
            lambda activation: tf_gsnr.register_rule(Mine, activation=activation),
            activation=["", 5, True, ["activation"], NAN, {}, keras.activations.relu, "a b", b"a"],
        ),
        *tries(
            "register_rule",
            lambda function: tf_gsnr.register_rule(Mine)(function),
            function=functions,
        ),
        *tries("register_optimizer", gap.register_optimizer, optimizer_class=classes),
        *tries(
            "register_optimizer",
            lambda function: gap.register_optimizer(Own)(function),
            function=functions,
        ),
    ]


def of_recalibration():
    model = keras.Sequential([keras.Input([4]), keras.layers.BatchNormalization()], name="bn")
    x, _, _ = arrays()

    def forward(**given):
        return recalibration.forward(**{"model": model, "x": tf.constant(x)} | given)

    def whole(**given):
        batches = [(tf.constant(x), None, None, tf.ones([N], tf.bool))]
        given = {"model": model, "batches": lambda: batches} | given
        with recalibration.whole_data_statistics(**given):
            pass

    no_models = bad_models()[:9]
    batches = [None, 5, "x", [], lambda: 5, lambda: [], lambda: [x], lambda: [(x, None)], NAN]
    refresh = recalibration.averaged_statistics(model)
    return [
        *tries(
            "recalibration.forward",
            forward,
            model=no_models,
            x=[None, "x", 5.0, {}, x[:0], x[:, :2], np.full([N, 4], "a"), NAN, x[0], object()],
            valid=["x", 5, True, np.ones(N), np.ones(N - 1, bool), np.ones([N, 1], bool), {}]
            + [np.zeros(N, bool)],
        ),
        *tries("averaged_statistics", recalibration.averaged_statistics, model=no_models),
        *tries(
            "averaged_statistics, refresh",
            lambda batches: refresh(batches),
            batches=[None, 5, "x", [], ["x"], NAN, [x[:, :2]], [None]],
        ),
        *tries("whole_data_statistics", whole, model=no_models, batches=batches),
    ]


def of_data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[N, 4, 4, 1]), np.arange(N) % 3
    pixels = (x * 10).astype(np.uint8)
    source = data.from_arrays((x, y), (x, y))
    pairs = [None, 5, "x", (x,), (x, y, y), [], (x, y[:3]), (x[:0], y[:0]), (x.astype(str), y)]
    pairs += [(x, y + 0.5), (x, y - 1), (np.full_like(x, NAN), y), (np.full_like(x, INF), y)]
    pairs += [(x, np.eye(3)[y]), (x, [None] * N), (x[:, 0, 0, 0], y), (pixels, y), (x[..., 0], y)]
    pairs += [(x, y[:, None]), NAN, {}, (x, np.full(N, NAN))]

    def from_arrays(**given):
        return data.from_arrays(**{"train": (x, y), "test": (x, y)} | given)

    def randomised(**given):
        given = {"y": y, "probability": 0.5, "source": source, "rng": rng} | given
        return data.randomise(**given)

    def built(**given):
        given = dict(name="toy_mlp", input_shape=(2,), outputs=1, width=4, seed=0) | given
        return models.build(**given)

    many = COUNT
    return [
        *tries(
            "from_arrays",
            from_arrays,
            train=pairs,
            test=pairs,
            classes=[*COUNT, 2],
            name=[5, None, "", NAN, ["a"]],
        ),
        *tries(
            "randomise",
            randomised,
            y=[None, 5, "x", {}, NAN, [None]],
            probability=[*NUMBER, -0.1, 1.5],
            source=[None, 5, "toy", {}],
            rng=[None, 5, "x", np.random],
        ),
        *tries("toy", data.toy, input_scale=[*RATE, 0, 1e300], noise_scale=[*RATE, 1e300]),
        *tries(
            "data.load",
            lambda **given: data.load(**{"name": "toy"} | given),
            data_dir=PATH,
            download=BOOLEAN,
        ),
        *named(
            "dataset",
            tries(
                "data.load",
                data.load,
                name=["", None, 5, ["toy"], NAN, "nonsense", "no.such:f", "math:nothing", "a\0b"],
            ),
        ),
        *named(
            "model",
            tries(
                "models.build",
                built,
                name=["", None, 5, ["mlp"], NAN, "nonsense", "no.such:function", "math:nothing"],
            ),
        ),
        *tries(
            "models.build",
            built,
            input_shape=[None, 5, "x", (), (-1,), (0,), (1.5,), ("a",), NAN, (None,), {}],
            outputs=many,
            width=[*many, 10**9],
            seed=[*INTEGER, -1, 2**40],
        ),
    ]


def of_settings():
    attempts = []
    for name in experiments.EXPERIMENTS:
        module = experiments.load(name)
        for field in fields(module.Settings):
            call = functools.partial(_settings, module, field.name)
            values = bad_settings(name, field)
            attempts += [
                one._replace(argument=f"--{field.flag}", call=functools.partial(call, one.value))
                for one in tries(f"{name}.settings", call, **{"value": values})
            ]
        unknown = functools.partial(_settings, module, "widht", 3)
        attempts.append(Attempt(f"{name}.settings", "widht", 3, unknown))
    return attempts


def _settings(module, name, value):
    return module.settings(**{name: value})


def bad_settings(experiment, field) -> list:
    """Values of the wrong kinds for a setting."""
    if field.kind is bool:
        return ["False", 1, 0.5, NAN, [True, False], {}, "", b"x"]
    if field.kind is str:
        return ["", 5, NAN, True, b"mlp", {}, object(), [""], [5]]
    low = ["", "x", True, 1j, {}, object(), NAN, INF, -INF, -1, 10**30, -(10**30), [NAN], ["x"]]
    if field.kind is int:
        low += [1.5, np.float32(2.5), b"3"]
    else:
        low += [b"0.5", [1e300], 10**400]
    if not field.is_list:
        low += [[1, 2]]
    else:
        low += [[[1]], [None], (1, "x"), {1: 2}]
        low.append(
            Fine([1, 1] if field.kind is float else [60, 60], "what stands twice is taken once")
        )
    return low


def of_streams():
    """Data sets, generators and arrays of kinds that are none."""
    x, y, labels = arrays()
    pairs = tf.data.Dataset.from_tensor_slices((x, y))

    def given(x, y=None, **more):
        return tf_gsnr.gradient_moments(network(), x, y, "mse", batch_size=4, **more)

    def generator(*elements):
        return (element for element in elements)

    used = generator((x, y))
    next(used)
    symbolic = keras.Input([4])
    weighted = tf.data.Dataset.from_tensor_slices((x, y, np.ones([N, N]))).batch(4)
    streams = [
        pairs,
        pairs.batch(3).map(lambda a, b: (a, b, a, b)),
        pairs.batch(3).map(lambda a, b: (a[:, :2], b)),
        pairs.batch(3).map(lambda a, b: (a, b[:, None])),
        pairs.batch(3).map(lambda a, b: (a, tf.as_string(b))),
        pairs.batch(3).map(lambda a, b: (a * NAN, b)),
        weighted,
        generator(),
        generator(5),
        generator((x, y), 5),
        generator((x, y), None),
        generator((x, y[:3])),
        generator((x, y), (x[:, :2], y)),
        generator("ab"),
        used,
        iter([(x, y)]),
        zip(x, y),
        map(len, x),
        symbolic,
        open,
        np.ma.masked_array,
        np.array(["2020-01-01"] * N, "datetime64[D]"),
        np.zeros(N, [("a", float), ("b", float)]),
        np.zeros([N, 4], np.longdouble) * 1j,
        (),
        set(),
        range(N),
        b"bytes",
        Path("x"),
    ]
    targets = [symbolic, range(N), set(), b"", np.zeros(N, [("a", float)]), iter([y]), Path("y")]
    two = two_outputs()

    def of_two(**given):
        given = {"y": [y, y], "loss": "mse"} | given
        return tf_gsnr.gradient_moments(two, x, given.pop("y"), given.pop("loss"), **given)

    return [
        *tries(
            "gradient_moments of a stream",
            given,
            x=[v for i, v in enumerate(streams) if i not in (3, 4, 6)],
        ),
        *named("y", tries("gradient_moments of a stream", given, x=streams[3:5])),
        *named("sample_weight", tries("gradient_moments of a stream", given, x=[weighted])),
        *tries("gradient_moments", lambda y: given(x, y), y=targets),
        *tries(
            "gradient_moments of two outputs",
            of_two,
            y=[
                y,
                [y],
                [y, y, y],
                {"a": y},
                {"a": y, "c": y},
                [y, y[:, :2]],
                [y, y[:, None]],
                (),
                5,
            ],
            loss=[["mse"], ["mse"] * 3, {"c": "mse"}, {"a": "mse", "c": "mse"}, [None, None], {}],
            sample_weight=[[np.ones(N)] * 3, {"c": np.ones(N)}, np.ones([N, N])]
            + [[np.ones(N), np.ones([N, N])]],
        ),
    ]


@functools.cache
def two_outputs():
    inputs = keras.Input([4])
    heads = [keras.layers.Dense(3, name=name)(inputs) for name in "ab"]
    return keras.Model(inputs, heads, name="two")


def of_user_code():
    """Functions of the user's that return nonsense."""
    x, y, _ = arrays()

    def ruled(returned):
        class Mine(keras.layers.Dense):
            def call(self, x):
                return super().call(x)

        model = keras.Sequential([keras.Input([4]), Mine(3)])
        tf_gsnr.register_rule(Mine)(lambda call: returned)
        try:
            return tf_gsnr.gradient_moments(model, x, y, "mse")
        finally:
            rules._RULES.pop(Mine)

    def scheduled(returned):
        callback = tf_gsnr.GSNRCallback(x, y, schedule=lambda step: returned)
        callback.set_model(network())
        callback.set_params({"epochs": 1, "steps": 1})
        callback.on_train_begin()
        callback.on_epoch_begin(0)
        callback.on_train_batch_begin(0)

    def lost(loss):
        return tf_gsnr.gradient_moments(network(), x, y, loss)

    def stepped(returned):
        class Own(keras.optimizers.SGD):
            def update_step(self, *args):
                super().update_step(*args)

        gap.register_optimizer(Own)(lambda optimizer, k, slot, gradients: returned)
        model = keras.models.clone_model(network())
        model = tf_gsnr.GSNRModel(model)
        try:
            model.compile(Own(), "mse")
            model.fit(x, y, verbose=0)
        finally:
            gap._STEPS.pop(Own)

    variable = network().trainable_variables[0]
    returned = [5, "x", [5], [(1, 2)], [(variable, 5)], {}, True, [(variable,)], NAN]
    bad_losses = [
        lambda y, p: {},
        Fine(lambda y, p: (p, p), "Keras takes the mean of both"),
        lambda y, p: tf.reduce_mean(p, -1) * NAN,
        Fine(lambda y, p: 5, "a number, of which no gradient is"),
        lambda: 1,
        lambda y: 1,
        lambda y, p, q: 1,
        int,
        Fine(keras.losses.MeanSquaredError(reduction="none"), "one number for one example"),
        keras.metrics.MeanSquaredError,
        keras.layers.Dense(1),
    ]
    return [
        *tries("a rule", lambda rule: ruled(rule), rule=returned),
        *tries(
            "a schedule",
            lambda schedule: scheduled(schedule),
            schedule=["yes", NAN, [], {}, 5, np.array([1, 2]), None, object()],
        ),
        *tries("a loss", lost, loss=bad_losses),
        *tries(
            "an optimizer",
            lambda function: stepped(function),
            function=[5, "x", None, (1,), (1, 2, 3), ("a", None), (1.0, "b")],
        ),
    ]


def of_oddities():
    """Values that are of no kind of the tables above, and calls out of order."""
    x, y, labels = arrays()
    there = Path(tempfile.mkdtemp())
    (there / "run").mkdir()
    (there / "run" / "config.json").write_text('{"kind": "training", "settings": {}}')
    (there / "run" / "records.jsonl").write_text('{"step": 0, "gsnr/mean": 0.5, "loss": 1.0}\n')
    long = [*LONG, there / ("y" * 400)]

    def watched(**given):
        return tf_gsnr.GSNRCallback(x, y, **given)

    def wrapped(**given):
        return tf_gsnr.GSNRModel(keras.models.clone_model(network()), **given)

    def unset(method):
        getattr(watched(), method)()

    def with_params(params):
        callback = watched(run_dir=there / "new")
        callback.set_params(params)
        callback.set_model(network())
        callback.on_train_begin()

    good = moments()
    return [
        *tries(
            "gradient_moments",
            lambda **g: tf_gsnr.gradient_moments(network(), x, y, "mse", **g),
            batch_size=ODD,
            seed=ODD,
            training=ODD,
            engine=ODD,
            dtype=ODD,
            jit_compile=ODD,
            strategy=ODD,
            contributions=ODD,
        ),
        *tries(
            "GSNRCallback",
            watched,
            run_dir=long + ODD,
            log_dir=long,
            every_epochs=ODD,
            every_steps=ODD,
            examples=ODD,
            keep=ODD,
            schedule=[v for v in ODD if not callable(v)],
            test_data=ODD,
            per_layer=ODD,
            sample_weight=ODD,
        ),
        *tries(
            "GSNRModel",
            wrapped,
            run_dir=long + ODD,
            measure_every=ODD,
            sample=ODD,
            shown=ODD + [iter(["gsnr"])],
            progress=ODD,
            pool=ODD,
            examples=ODD,
            bias_corrected=ODD,
        ),
        *tries("osgr", lambda examples: tf_gsnr.osgr(good, examples), examples=ODD),
        *tries(
            "gap_growth",
            lambda learning_rate: tf_gsnr.gap_growth(good, learning_rate),
            learning_rate=[
                Fine(v, "a real number") if isinstance(v, (fractions.Fraction, np.float16)) else v
                for v in ODD
            ]
            + [10**400],
        ),
        *tries("Moments.variance", good.variance, ddof=ODD),
        *tries(
            "schedule.listed",
            schedule.listed,
            steps=[
                itertools.count(),
                ODD,
                range(0),
                np.array(3),
                np.array([[1, 2]]),
                tf.constant(3),
            ],
        ),
        *tries("schedule.linear", schedule.linear, every=ODD),
        *tries(
            "osgr_measured",
            lambda train_losses: tf_gsnr.osgr_measured(train_losses, [[1.0, 0.5]]),
            train_losses=ODD,
        ),
        *tries("osgr_predicted", tf_gsnr.osgr_predicted, list_of_moments=ODD),
        *tries("summarize", lambda moments: tf_gsnr.summarize(moments, network()), moments=ODD),
        *tries("explain", tf_gsnr.explain, model=ODD),
        *tries("read", tf_gsnr.read, run_dir=long + ODD),
        *tries("page", tf_gsnr.page, run_dir=long + ODD),
        *tries(
            "page", lambda output: tf_gsnr.page(there / "run", output=output), output=long + ODD
        ),
        *tries(
            "page, another",
            lambda run_dir: tf_gsnr.page(there / "run", run_dir),
            run_dir=[there / "run"],
        ),
        *tries("plot", tf_gsnr.plot, source=long + ODD),
        *tries(
            "from_arrays",
            lambda classes: data.from_arrays((x, labels), (x, labels), classes=classes),
            classes=ODD,
        ),
        *tries(
            "from_arrays",
            lambda train: data.from_arrays(train, (x, labels)),
            train=[(x, labels + 10**12), (x, labels.astype(bool).astype(object)), ODD],
        ),
        *tries(
            "models.build",
            lambda input_shape: models.build("toy_mlp", input_shape, 1, 3, 0),
            input_shape=ODD + [(10**12,), (2, 10**10)],
        ),
        *named(
            "model",
            tries(
                "GSNRCallback without a model",
                unset,
                method=["on_train_begin", "on_epoch_end", "on_train_batch_begin", "on_train_end"],
            ),
        )[:1],
        *tries("GSNRCallback.set_params", with_params, params=[None, 5, "x", [1]]),
    ]
