"""Per-example gradients of a Keras model, streamed into `Moments`.

`gradient_moments` is what users call; `accumulate` is the same stream inside a graph, for a
training loop. Both run an engine (`ENGINES`, the contract is in `contract.py`) on micro-batches of
one fixed shape and merge what it finds, so memory does not grow with the number of examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr.gradients import (
    conservation,
    contract,
    distributed,
    examples,
    layerwise,
    losses,
    recalibration,
    vectorized,
)
from tf_gsnr.gradients.examples import stack_chunks  # noqa: F401  (for `accumulate`)
from tf_gsnr.moments import Moments

ENGINES = {"layerwise": layerwise.build, "vectorized": vectorized.build}


def build_engine(model, loss=None, *, engine: str = "auto", **options) -> Callable:
    """Returns the `measure` function (see `contract`) of the named engine.

    Args:
      model: a built Keras model.
      loss: see `gradient_moments`.
      engine: a key of `ENGINES`, or "auto" for the layer-wise one. Whether that is right for this
        model is seen on data only: see `chosen_engine`.
      **options: `sign_counts`, `training`, `batch_norm`, ..., as in `gradient_moments`.

    Raises:
      ValueError: unknown engine; a model or loss that cannot be measured.
    """
    check_engine_name(engine)
    contract.check_model(model)
    build = ENGINES["layerwise" if engine == "auto" else engine]
    return build(model, losses.of_batch(model, loss), **options)


def chosen_engine(model, x, y, loss=None, engine: str = "auto") -> str:
    """The engine that measures this model right, tried on a few of its examples.

    Raises:
      ValueError: the engine asked for does not.
    """
    _, chosen = _measured(model, x, y, loss, engine=engine)
    return chosen


def check_engine_name(engine: str):
    if engine != "auto" and engine not in ENGINES:
        names = ", ".join(["auto", *sorted(ENGINES)])
        raise ValueError(f"unknown engine {engine!r}; available: {names}")


def resolve_jit_compile(jit_compile: bool | str) -> bool:
    """Whether to compile by XLA: "auto" means on an accelerator and not on a CPU.

    XLA makes convolutions 2.5 to 4.7 times slower on a CPU, the plain step included.
    """
    if jit_compile not in (True, False, "auto"):
        raise ValueError(f"jit_compile={jit_compile!r}: expected True, False or 'auto'")
    if jit_compile != "auto":
        return bool(jit_compile)
    accelerators = tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU")
    chosen = bool(accelerators)
    device = accelerators[0].device_type if chosen else "CPU"
    logging.log_first_n(logging.INFO, "jit_compile='auto': %s on %s", 1, chosen, device)
    return chosen


def accumulate(measure: Callable, model, chunks, *, seed=None, dtype=None, sign_counts=False):
    """Streams stacked micro-batches through an engine, inside a graph: one loop, one shape.

    Args:
      measure: what `build_engine` returns.
      model: the model it measures.
      chunks: `(x, y, valid)`, each with leading axes `[chunks, batch]`; see `stack_chunks`.
      seed: integer, for random layers.
      dtype: in which moments are merged; None for the variables' own.
      sign_counts: as the engine was built.

    Returns:
      `Moments` of all valid examples.
    """
    x, y, valid = chunks
    empty = Moments.empty(model.trainable_variables, dtype, sign_counts)

    def body(i, total):
        one_x, one_y, one_valid = tf.nest.map_structure(lambda v: v[i], (x, y, valid))
        found = measure(one_x, one_y, None, one_valid, contract.seeds_for(model, seed, i)).moments
        return i + 1, total.merge(found if dtype is None else found.astype(dtype))

    loop = tf.while_loop(
        lambda i, _: i < tf.shape(valid)[0], body, (0, empty), parallel_iterations=1
    )
    return loop[1]


def gradient_moments(
    model: keras.Model,
    x: Any,
    y: Any = None,
    loss: Any = None,
    *,
    sample_weight: Any = None,
    engine: str = "auto",
    batch_size: int = 256,
    sign_counts: bool = False,
    training: bool = False,
    seed: int | None = None,
    batch_norm: str = "frozen",
    contributions: bool = False,
    recalibrate: bool = False,
    dtype: str | None = None,
    jit_compile: bool | str = "auto",
    strategy: tf.distribute.Strategy | None = None,
) -> Moments:
    """Mean and variance of the gradients of every single example, for each trainable variable.

    With g[n] the gradient of example n's own loss, which is what Keras's loss returns for a batch
    of example n alone, `mean = 1/n sum g[n]` (5) and `variance = 1/n sum (g[n] - mean)^2`, the
    sample-wise gradient variance of section 2.1 (equation numbers are those of Liu et al., ICLR
    2020). Sample weights multiply an example's loss. Weight regularisers are not part of it: they
    are the same for all examples, so they would shift the mean and never change the variance.

    The data are streamed in micro-batches of one fixed shape, so memory does not depend on how
    many examples there are. The model is left as it was: no variable, seed or layer changes. On the
    first micro-batch the mean is compared, variable by variable, with the ordinary gradient.

    Args:
      model: a built Keras model: Sequential, functional or subclassed.
      x: array or tensor `[examples, ...]` (or a list or dict of them, as the model takes it), or a
        finite `tf.data.Dataset` of batches `(x, y)` or `(x, y, sample_weight)`.
      y: targets `[examples, ...]`, nested as the loss takes them; None where x is a Dataset.
      loss: whatever `compile(loss=...)` takes; default: the model's own `compute_loss`, so the loss
        that it was compiled with.
      sample_weight: `[examples]` factors of the examples' losses.
      engine: "layerwise" (one forward and backward pass and a rule per layer), "vectorized" (the
        reference, slow and large) or "auto": the former, and the latter for a model of which it
        cannot measure some variable. Such a model goes to the reference engine with all of its
        variables: where a layer mixes examples, g[n] of the whole batch and of example n alone
        are two things, and the variables of one result must not differ in which they mean.
      batch_size: examples a micro-batch; it changes speed and memory, not the result.
      sign_counts: also count, per parameter, the examples with positive and negative gradient.
      training: whether layers run in training mode. Dropout then draws a mask per example.
      seed: of the random layers; None for the model's own current seeds. A given seed and
        batch_size give the same masks again.
      batch_norm: with training=True, what `BatchNormalization` layers use; with training=False it
        is always their moving statistics.
        "frozen": the moving statistics, too, while dropout is active. They are constants, so g[n]
        depends on example n alone: the g[n] of examples that were drawn independently are
        independent, and `variance` is that of the gradient of a fixed function. Its mean is not
        the gradient of a training step, in which the statistics are the batch's.
        "batch": the statistics of the micro-batch, with the gradient flowing through them
        (engine="layerwise"). g[n] is then example n's own contribution to the micro-batch's
        gradient: the mean is exactly the gradient that training uses, but the contributions of
        one micro-batch are no independent draws, since each example moves the statistics that
        the others meet. Their variance describes how the sum is made up; only as batches grow
        does it become the sampling variance of the gradient. `batch_size` is then part of what
        is measured, and each example must be measured in company: the reference engine refuses.
      contributions: where examples act on each other, through the loss (a contrastive one) or a
        layer (minibatch statistics), there is no gradient of an example's own, and such a model is
        refused. With True the loss L of each whole micro-batch of B examples is differentiated, and
        g[n] is B times the part of dL/dW that passes through example n's rows: its contribution.
        The mean is the gradient of L; `batch_size` is then part of what is measured.
      recalibrate: before measuring, replace the moving statistics by the exact mean and variance
        over all of `x`, layer by layer (appendix A.2); afterwards the model has its own again.
        The layers must use their moving statistics: training=False or batch_norm="frozen".
      dtype: in which the moments are merged, "float32" or "float64"; default: the variables' own.
      jit_compile: whether to compile with XLA; "auto": on an accelerator and not on a CPU.
      strategy: a `MirroredStrategy` or `MultiWorkerMirroredStrategy` in whose scope the model was
        made: its replicas share out the micro-batches. Every process is given the same data and
        returns the same moments, those of one device up to rounding.

    Returns:
      `Moments` of numpy arrays, lists in the order of `model.trainable_variables`.

    Raises:
      ValueError: an argument is not usable (the message names it and what would be accepted), or a
        loss or gradient is not finite (the message names the example or the variable).

    Example:

    >>> import keras, numpy as np, tf_gsnr
    >>> keras.utils.set_random_seed(0)
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    >>> x, y = np.random.normal(size=[100, 3]), np.random.normal(size=[100, 1])
    >>> moments = tf_gsnr.gradient_moments(model, x, y, "mse")
    >>> int(moments.count), [v.shape for v in moments.variance()]
    (100, [(3, 1), (1,)])
    """
    moments, _ = _measured(
        model,
        x,
        y,
        loss,
        sample_weight=sample_weight,
        engine=engine,
        batch_size=batch_size,
        sign_counts=sign_counts,
        training=training,
        seed=seed,
        batch_norm=batch_norm,
        contributions=contributions,
        recalibrate=recalibrate,
        dtype=dtype,
        jit_compile=jit_compile,
        strategy=strategy,
    )
    return moments


def _measured(
    model,
    x,
    y,
    loss,
    *,
    sample_weight=None,
    engine="auto",
    batch_size=256,
    sign_counts=False,
    training=False,
    seed=None,
    batch_norm="frozen",
    contributions=False,
    recalibrate=False,
    dtype=None,
    jit_compile="auto",
    strategy=None,
) -> tuple[Moments, str]:
    """`(moments, name of the engine)`; see `gradient_moments`."""
    check_engine_name(engine)
    examples.check_batch_size(batch_size)
    contract.check_model(model)
    contract.check_batch_norm(batch_norm)
    if strategy is not None:
        distributed.check_strategy(strategy, model)
    if recalibrate and training and batch_norm == "batch":
        raise ValueError(
            f"recalibrate=True with training=True and batch_norm={batch_norm!r}: recalibrated "
            "statistics are moving statistics, which that mode does not use; set "
            "batch_norm='frozen'"
        )
    # Padding would be part of a batch's statistics; without it the ragged end is traced once more.
    coupled = training and batch_norm == "batch" and bool(contract.batch_norm_layers(model))
    coupled = coupled or contributions
    fixed = examples.fixed_batch_size(model)
    batch_size = fixed or batch_size
    given = examples.as_fit_gives_them(model, x, y, sample_weight, batch_size)
    if given[1] is None and not examples.is_stream(given[0]) and losses.needs_targets(model, loss):
        raise ValueError("y=None: expected the targets of x (only a dataset has its own)")
    data = functools.partial(
        examples.micro_batches, *given, batch_size, fill=not coupled, size=fixed
    )
    options = dict(
        sign_counts=sign_counts,
        training=training,
        batch_norm=batch_norm,
        contributions=contributions,
    )
    compiled = resolve_jit_compile(jit_compile)
    statistics = contextlib.nullcontext()
    if recalibrate:
        statistics = recalibration.whole_data_statistics(model, data)
    with conservation.kept_variables(model), statistics:
        engines = ["layerwise", "vectorized"] if engine == "auto" else [engine]
        for name in engines:
            stream = _Stream(model, loss, name, compiled, dtype, options, strategy, seed)
            if name != engines[-1] and stream.entry.unfit:
                continue
            try:
                moments, bad = stream.all(data())
            except conservation.NotConserved as error:
                stream.entry.unfit = True
                if name == engines[-1]:
                    raise
                logging.warning("engine='auto' uses the reference engine: %s", error)
                continue
            examples.check_finite(model, moments, int(bad))
            return moments.numpy(), name
    raise AssertionError("the last engine returns or raises")


_ENTRIES = weakref.WeakKeyDictionary()  # model -> {options: _Entry}: a step is traced once


@dataclasses.dataclass
class _Entry:
    """What is known of a model under certain options.

    Attributes:
      step: traced, by whether moments are wide.
      loss, strategy: kept, or their ids could become another's.
      pending: the variables that are still to be compared with their ordinary gradient.
      unfit: whether this engine was found not to measure the model right.
      wide: whether squares of the gradients would underflow in float32.
    """

    loss: Any
    strategy: Any
    pending: set
    step: dict = dataclasses.field(default_factory=dict)
    unfit: bool = False
    wide: bool = False


class _Stream:
    """Micro-batches through one engine, the first of them checked."""

    def __init__(self, model, loss, engine, jit_compile, dtype, options, strategy, seed):
        self.model, self.engine, self.jit_compile, self.dtype = model, engine, jit_compile, dtype
        self.options, self.strategy = options, strategy
        self.seed = None if seed is None else tf.constant(seed, tf.int64)
        used = loss
        if loss is None:
            used = getattr(model, "_compile_loss", None)  # made anew by each compile
        variables = model.trainable_variables
        key = (
            id(used),
            id(strategy),
            engine,
            jit_compile,
            dtype,
            *sorted(options.items()),
            *(id(v) for v in variables),
        )
        entries = _ENTRIES.setdefault(model, {})
        if key not in entries:
            pending = set(range(len(variables))) if engine == "layerwise" else {-1}
            entries[key] = _Entry(used, strategy, pending)
        self.entry = entries[key]
        self.given_loss = loss
        self.loss = losses.of_batch(model, loss)

    def all(self, batches):
        """`(moments, first example that is not finite or -1)`."""
        state = None
        batches = iter(batches)
        for index, batch in enumerate(batches):
            if state is None or self.entry.pending:
                found = self._checked(index, batch)
                state = found if state is None else _merged(state, found)
                if self.strategy is not None:
                    break
            else:
                state = self._one(self._step(), *state, index, batch)
        if state is None:
            raise ValueError("x has no examples; expected at least one")
        if self.strategy is not None:
            rest = distributed.stream(
                self.strategy, self._step(), self._empty(), self.seed, batches, start=1
            )
            state = _merged(state, rest)
        return state

    def _empty(self):
        dtype = "float64" if self.entry.wide else self.dtype
        variables = self.model.trainable_variables
        empty = Moments.empty(variables, dtype, self.options["sign_counts"])
        return empty, tf.constant(-1, tf.int64)

    def _one(self, step, moments, bad, index, batch):
        try:
            return step(moments, bad, tf.constant(index, tf.int64), self.seed, *batch)
        except tf.errors.InvalidArgumentError as error:
            rows = examples.count(batch)
            examples.check_labels(self.model, batch[1], index * rows, error)
            raise

    def _checked(self, index, batch):
        """The state after one micro-batch alone, compared with the ordinary gradient.

        Raises:
          NotConserved: a variable's gradients do not add up.
          ValueError: examples act on each other.
        """
        first = index == 0 or self.engine == "layerwise"
        examined = self._examined(index, batch) if first and self.entry.pending else None
        if examined is not None:
            self._refuse(examined)
            self.entry.wide = self.entry.wide or _is_tiny(examined.gradients)
        state = self._one(self._step(single=True), *self._empty(), index, batch)
        if examined is None:
            return state
        if self.engine != "layerwise":
            self.entry.pending = set()
        elif int(state[1]) < 0 and all(
            g is None or np.isfinite(g).all() for g in examined.gradients
        ):
            self._compare(state[0], examined)
        return state

    def _examined(self, index, batch):
        options = self.options
        if options["training"] and options["batch_norm"] == "frozen":
            modes = contract.frozen_batch_norm(self.model)
        else:
            modes = contextlib.nullcontext()
        seeds = contract.seeds_for(self.model, self.seed, index)
        try:
            return conservation.examine(
                self.model,
                self.loss,
                batch,
                [np.asarray(s) for s in seeds],
                modes,
                training=options["training"],
                contributions=options["contributions"],
            )
        except tf.errors.OpError as error:
            examples.check_labels(self.model, batch[1], index * examples.count(batch), error)
            if options["contributions"] or not self._works_whole(batch):
                raise
            raise ValueError(
                f"the loss {losses.name_of(self.loss)!r} of model {self.model.name!r} cannot be "
                "computed for one example at a time. To measure each example's contribution to "
                "the gradient of its micro-batch instead, pass contributions=True"
            ) from error

    def _works_whole(self, batch) -> bool:
        """Whether Keras computes the loss of the whole micro-batch."""
        x, y, sample_weight, _ = batch
        try:
            with keras.StatelessScope():
                self.loss(x, y, self.model(x, training=False), sample_weight)
        except Exception:
            return False
        return True

    def _refuse(self, examined):
        """Raises where an example has no gradient of its own, or its rows cannot be told."""
        name, options = self.model.name, self.options
        if options["contributions"]:
            return
        way_out = (
            "so an example has no gradient of its own. To measure each example's contribution to "
            "the gradient of its micro-batch instead, pass contributions=True"
        )
        if examined.loss_acts:
            raise ValueError(
                f"the loss {losses.name_of(self.loss)!r} of model {name!r} lets the examples of a "
                f"batch act on each other, {way_out}"
            )
        asked = options["training"] and options["batch_norm"] == "batch"
        if examined.mixing is not None and not asked:
            layer = examined.mixing
            raise ValueError(
                f"layer {layer.name!r} ({type(layer).__name__}) of model {name!r} lets the "
                f"examples of a batch act on each other, {way_out}"
            )
        if examined.scrambled is not None and self.engine == "layerwise":
            raise conservation.NotConserved(
                f"model {name!r}: the rows of layer {examined.scrambled.name!r} are not those of "
                "the examples in turn, so their gradients cannot be told apart: use "
                "engine='vectorized', or engine='auto', which does so by itself"
            )

    def _compare(self, moments, examined):
        n = int(moments.count)
        variables = self.model.trainable_variables
        means = [np.asarray(m, np.float64) for m in moments.mean]
        spreads = [
            np.sqrt(np.max(np.asarray(s) / n + mean**2, initial=0))
            for s, mean in zip(moments.m2, means)
        ]
        noise = conservation.by_layer(variables, spreads)
        precision = conservation.precision_of(self.model)
        wrong = []
        for j, variable in enumerate(variables):
            ordinary = examined.gradients[j]
            if ordinary is None:
                ordinary = np.zeros_like(means[j])
                if not spreads[j]:
                    self.entry.pending.discard(j)  # there is nothing to compare
                    continue
            found = conservation.compared(precision, means[j], ordinary / n, noise[j])
            if found == conservation.DIFFERS:
                wrong.append(variable.path)
            elif found == conservation.AGREES:
                self.entry.pending.discard(j)
        if wrong:
            raise conservation.NotConserved(
                f"model {self.model.name!r}: the per-example gradients of {', '.join(wrong)} do "
                "not add up to the ordinary gradient: the variable is used outside the call of its "
                "own layer, or a rule is wrong; use engine='vectorized', or engine='auto', which "
                "does so by itself"
            )

    def _step(self, single=False):
        """A traced `(moments, bad, index, seed, x, y, weight, valid) -> (moments, bad)`.

        It holds the model by a weak reference only, so that the cache keeps no model alive.
        """
        wide = self.entry.wide
        replicated = self.strategy is not None and not single
        if (wide, replicated) in self.entry.step:
            return self.entry.step[wide, replicated]
        reference = weakref.ref(self.model)
        measure = build_engine(
            weakref.proxy(self.model),
            self.given_loss,
            engine=self.engine,
            wide=wide,
            **self.options,
        )
        dtype = "float64" if wide else self.dtype

        @tf.function(jit_compile=self.jit_compile, autograph=False, reduce_retracing=False)
        def step(total, bad, index, seed, x, y, weight, valid):
            seeds = contract.seeds_for(reference(), seed, index)
            found = measure(x, y, weight, valid, seeds)
            wrong = valid & ~tf.math.is_finite(found.losses)
            here = index * tf.size(valid, tf.int64) + tf.argmax(wrong, output_type=tf.int64)
            bad = tf.where((bad < 0) & tf.reduce_any(wrong), here, bad)
            moments = found.moments if dtype is None else found.moments.astype(dtype)
            return total.merge(moments), bad

        if replicated:
            step = distributed.replicated(self.strategy, step)
        self.entry.step[wide, replicated] = step
        return step


TINY = 1e-12  # squares of gradients below may underflow in float32


def _is_tiny(gradients) -> bool:
    sizes = [np.abs(g).max() for g in gradients if g is not None and g.size]
    return any(0 < size < TINY for size in sizes)


def _merged(a, b):
    """Two states `(moments, bad)` as one."""
    return a[0].merge(b[0]), tf.where(a[1] < 0, b[1], a[1])
