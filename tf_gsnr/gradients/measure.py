"""`gradient_moments`: the gradients of all examples of a data set, streamed into `Moments`.

An engine measures micro-batches of one fixed shape, and what it finds of each is merged, so memory
does not grow with the number of examples.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from tf_gsnr import checks
from tf_gsnr.gradients import (
    conservation,
    distributed,
    engines,
    examination,
    examples,
    losses,
    network,
    onednn,
    recalibration,
    targets,
)
from tf_gsnr.gradients.stream import Stream
from tf_gsnr.moments import Moments

_ONE_AT_A_TIME = threading.RLock()  # of several threads


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

    Calls from several threads wait for each other. Meanwhile other threads may run the model in
    inference mode (not while it is recalibrated), but neither train it nor draw from its seeds.

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
    tried = engines.tried(engine)
    check_options(
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
    )
    network.check(model)
    if loss is not None:
        losses.check(model, loss)
    onednn.warn_if_off(model)
    if strategy is not None:
        distributed.check_strategy(strategy, model)
    if recalibrate and training and batch_norm == "batch":
        raise ValueError(
            f"recalibrate=True with training=True and batch_norm={batch_norm!r}: recalibrated "
            "statistics are moving statistics, which that mode does not use; set "
            "batch_norm='frozen'"
        )
    # Padding would be part of a batch's statistics; without it the ragged end is traced once more.
    coupled = training and batch_norm == "batch" and bool(network.batch_norms(model))
    coupled = coupled or contributions
    fixed = network.fixed_batch_size(model)
    batch_size = fixed or batch_size
    given = examples.as_fit_gives_them(model, x, y, sample_weight, batch_size)
    if given[1] is None and not examples.is_stream(given[0]) and losses.needs_targets(model, loss):
        raise ValueError("y=None: expected the targets of x (only a dataset has its own)")
    data = functools.partial(
        _checked, model, loss, examples.micro_batches, *given, batch_size, not coupled, fixed
    )
    windows = functools.partial(_checked, model, loss, examples.windows, *given, batch_size, fixed)
    one_pass = examples.is_stream(given[0]) and not isinstance(given[0], tf.data.Dataset)
    options = dict(
        sign_counts=sign_counts,
        training=training,
        batch_norm=batch_norm,
        contributions=contributions,
    )
    compiled = engines.resolve_jit_compile(jit_compile)
    statistics: Any = contextlib.nullcontext()
    if recalibrate:
        statistics = recalibration.whole_data_statistics(model, data)
    with _ONE_AT_A_TIME, examination.kept_variables(model, loss), statistics:
        if contributions and len(tried) > 1:
            tried = tried[:1]  # the reference engine runs examples alone: it has none
        unfit = None
        for name in tried:
            stream = Stream(
                model, loss, name, engines.ENGINES[name], compiled, dtype, options, strategy, seed
            )
            if name != tried[-1] and stream.entry.unfit:
                continue
            try:
                moments, bad = stream.all(
                    data if coupled or not stream.loops else windows, again=not one_pass
                )
            except conservation.NotConserved as error:
                if name == tried[-1]:
                    raise
                unfit = stream.entry
                logging.warning("engine='auto' uses the reference engine: %s", error)
                continue
            examples.check_finite(model, moments, int(bad))
            if unfit is not None:  # which is known of numbers only that are finite
                unfit.unfit = True
            return moments.numpy()
    raise AssertionError("the last engine returns or raises")


def check_options(*, engine, batch_size, seed, batch_norm, dtype, jit_compile, **switches):
    """Raises ValueError for an option of `gradient_moments` that is none; the message names it."""
    engines.check_name(engine)
    checks.positive_integer("batch_size", batch_size, most=2**31 - 1)
    for name, value in switches.items():
        checks.boolean(name, value)
    if seed is not None:
        checks.integer("seed", seed)
    network.check_batch_norm(batch_norm)
    checks.one_of("dtype", dtype, ("float32", "float64", None))
    checks.one_of("jit_compile", jit_compile, (True, False, "auto"))


def _checked(model, loss, batches, *given):
    """Micro-batches, with inputs that the model takes and labels that are classes."""
    known = None
    for batch in targets.whole_labels(model, loss, batches(*given)):
        shapes = [None if v is None else v.shape for v in tf.nest.flatten(batch[0])]
        if shapes != known:  # a generator may change its mind
            network.check_inputs(model, batch[0])
            known = shapes
        yield batch


def chosen_engine(model, x, y, loss=None, engine: str = "auto") -> str:
    """The engine that measures this model right, tried on a few of its examples.

    Raises:
      ValueError: the engine asked for does not.
    """
    tried = engines.tried(engine)
    for name in tried:
        try:
            gradient_moments(model, x, y, loss, engine=name)
            return name
        except conservation.NotConserved:
            if name == tried[-1]:
                raise
    raise AssertionError("the last engine returns or raises")
