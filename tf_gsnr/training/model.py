"""`GSNRModel`: gives a Keras model a training step that shows its GSNR, and changes nothing else.

The step itself is in `step.py`, what is shown in `meter.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import weakref

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr import checks, keras_internals
from tf_gsnr.gradients import distributed, engines, examples, network, onednn
from tf_gsnr.shown import needed
from tf_gsnr.training import bar, epochs, gap, plan, step
from tf_gsnr.training.bar import ProgressBar
from tf_gsnr.training.meter import SHOWN, GSNRMeter
from tf_gsnr.training.recorder import Recorder, digest
from tf_gsnr.training.sample import LEAST, LEAST_OF_LAYERS, SIZE, Sample

LEARN_EVERY = 16  # steps, after which it is read what the comparisons found
LOOK_EVERY = 0.1  # seconds, between two numbers that the progress bar shows
POOLS = ("epoch", "batch")
ENGINES = ("auto", "layerwise")


def GSNRModel(  # noqa: N802 (one line of a script, in the place of a class)
    model: keras.Model,
    *,
    engine: str = "auto",
    measure_every: int = 1,
    pool: str = "epoch",
    bias_corrected: bool = True,
    shown: tuple = SHOWN,
    per_layer: bool = False,
    examples: int | None = None,
    sample: int | None = SIZE,
    progress: tuple = bar.NUMBERS[:2],
    run_dir=None,
    overwrite: bool = False,
) -> keras.Model:
    """Makes `fit` measure the GSNR of a model's parameters; returns the same model object.

    It stays the user's own: its class, its `compute_loss`, `compute_metrics`, `test_step`,
    `predict_step`, its layers, how it is saved, loaded, cloned and pickled; what is saved is the
    plain model and needs nothing of this package. Only its training step is another one, which
    trains as Keras's does. Beside the loss and metrics, `History` and every callback see:

        gsnr          mean of r_j = g_j^2 / rho2_j over the parameters (25)
        gsnr_median   their median
        same_sign     the chance that the gradients of two examples have the same sign
        noise_scale   tr(Sigma) / |G|^2, in examples
        osgr          one-step generalisation ratio that is predicted, (19)
        gap_growth    the generalisation gap that is expected from the steps so far, from the
                      training data alone: 1/N sum_steps lambda sum_j rho2_j, (14)

    They are NaN where they cannot be told from zero; the reason is logged once an epoch. How each
    is added up over the steps is in `GSNRMeter`.

    Of a large model a sample of its parameters is measured, the same at every step, with every
    variable in proportion: what is a mean or a median over parameters needs no more. At the default
    size a GSNR is off by about 1 / 20 of its value. The sums in `noise_scale` and `osgr` are exact
    for dense layers, tables and what is small; of convolutions, and of layers that act at many
    positions, they are made up from the sample too, and off by about 1 / 15.

    The optimiser is given the gradient that Keras gives it. The sum of what is measured is compared
    with it, variable by variable, everywhere on the first batch and at the sampled parameters
    ever after. What does not agree is not measured (NaN, and left out of the numbers of the whole),
    and is named once in a warning.

    Where examples act on each other, through batch statistics or a contrastive loss, what is shown
    is of each example's contribution to the batch's gradient; the first fit says so.

    `gap_growth` adds up, over all steps, by how much the gap between the loss on unseen data and
    the loss on the N training examples is expected to widen. Per step this is lambda sum_j
    rho2_j / N for SGD at any batch size, to first order in lambda, and an approximation for
    optimisers with a diagonal preconditioner (Adam, AdamW, RMSprop, Adagrad), where lambda is
    replaced by lambda / sqrt(v_j) and the like; see `tf_gsnr/training/gap.py`. With any other
    optimiser it is not shown. An unmeasured step counts as much as the measured one before it.

    Args:
      model: the model to train, built or not, compiled or not. A `train_step` of its own is
        refused: measure such a model by `GSNRCallback`.
      engine: "auto" or "layerwise", which are the same here.
      measure_every: measure at every so many-th step; the steps between are plain Keras.
      pool: "epoch" adds up all measured batches of an epoch, "batch" shows the last batch alone.
      bias_corrected: whether the estimates are corrected for the bias of small batches: without it
        a batch of 32 shows a GSNR of at least 1/32, more than its usual value.
      shown: which of the numbers above.
      per_layer: also show `gsnr/<layer path>` for each layer.
      examples: N, the number of training examples, for `osgr` and `gap_growth`. By default it is
        the length of the arrays given to `fit`, or else what the longest epoch, or the loop over
        `train_on_batch`, had so far.
      sample: about how many parameters to measure, if the model has more; None for all, at several
        times the cost and 16 bytes a parameter.
      progress: which of the numbers the progress bar shows; History has all of them.
      run_dir: a directory for a page to look at while the model trains, page.html, and for
        records.jsonl: a row at the end of each epoch, and within long ones, layer by layer; see
        `tf_gsnr.read`. A training that begins anew does not touch the records of another; one that
        goes on from a saved model continues them.
      overwrite: whether an earlier run in `run_dir` may be thrown away.

    Raises:
      ValueError: an argument is not usable; or, in `fit`, the model has nothing to train.

    Example:

    >>> import keras, numpy as np, tf_gsnr
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> model = tf_gsnr.GSNRModel(model)
    >>> model.compile("sgd", "mse")
    >>> x = np.random.normal(size=[64, 4])
    >>> history = model.fit(x, x[:, :2], epochs=2, verbose=0).history
    >>> [name for name in history if name.startswith("gsnr")]
    ['gsnr', 'gsnr_median']
    """
    _check(model, engine, measure_every, pool, shown, examples, sample)
    switches = dict(bias_corrected=bias_corrected, per_layer=per_layer, overwrite=overwrite)
    for name, value in switches.items():
        checks.boolean(name, value)
    bar.check("progress", progress)
    if run_dir is not None:
        checks.directory("run_dir", run_dir)
    meter = dict(
        pool=pool,
        bias_corrected=bool(bias_corrected),
        per_layer=bool(per_layer),
        layers=run_dir is not None,
        shown=shown,
    )
    recorder = None if run_dir is None else Recorder(run_dir, overwrite)
    _Training(
        model, int(measure_every), examples, sample, meter, tuple(progress), recorder
    ).take_over()
    return model


class _Training:
    """What `GSNRModel` puts in the place of a model's `train_step`, and what belongs to it.

    Of a measured step there are two graphs: that of the first step, which also compares, and that
    of all others, which knows the outcome. A plain step is Keras's own.
    """

    def __init__(self, model, every, examples, sample, meter_options, progress, recorder):
        self.reference = weakref.ref(model)
        self.progress, self.recorder = progress, recorder
        self.given = {}  # what is recorded of the data
        self.every, self.fixed_examples, self.sample = every, examples, sample
        self.meter_options = meter_options
        self.told = examples or 0
        self.meter = self.plan = None
        self.belongs_to = None  # the optimiser and the variables that the meter was made for
        self.way = "called"
        self.unbuilt = True  # may be
        self.shapes = [None]  # of the batches, as far as they are known before
        self.steps = 0  # that were made so far
        self.stale = False  # whether the graphs are to be made anew
        self.look_every = 0.0  # seconds between two looks at the meter in `fit`; None for no look
        self.looked = -np.inf  # when, last
        self.numbers = {}  # that were seen

    @property
    def model(self):
        return self.reference()

    def take_over(self):
        for name in ("train_step", "make_train_function", "fit"):
            keras_internals.set_silently(self.model, name, getattr(self, name))
        keras_internals.set_silently(self.model, "_meter", None)
        keras_internals.set_silently(self.model, "_gsnr_training", self)
        self.model.train_function = None  # of an earlier fit

    def fit(self, *args, **kwargs):
        model = self.model
        distributed.check_fit(model.distribute_strategy)
        fit = type(model).fit
        signature = inspect.signature(fit)
        bound = signature.bind(model, *args, **kwargs)
        kinds = {p.kind: p.name for p in signature.parameters.values()}
        rest = kinds.get(inspect.Parameter.VAR_KEYWORD)
        given = bound.arguments
        if "callbacks" not in signature.parameters and rest:
            given = bound.arguments.setdefault(rest, {})  # a fit of the user's own passes it on
        if self.fixed_examples is None:
            self.told = _length({**bound.arguments, **given})
        if self.meter is not None:
            self.meter.examples.assign(self.told)
        if self.recorder is not None:
            self.given = _about_data({**bound.arguments, **given})
        callbacks = given.get("callbacks")
        verbose = {**bound.arguments, **given}.get("verbose", "auto")
        self.look_every = 0.0
        if isinstance(callbacks, keras.callbacks.CallbackList):
            mine = self.callback()
            mine.set_model(model)
            mine.set_params(callbacks.params)
            callbacks.callbacks.insert(0, mine)
        elif "callbacks" in signature.parameters or rest:
            more = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            more = [c for c in more if c is not None]
            given["callbacks"] = [self.callback(), *more]
            bars = [c for c in more if isinstance(c, keras.callbacks.ProgbarLogger)]
            if verbose != 0 and not bars:
                given["callbacks"].append(ProgressBar(self.progress))
            if not any(map(epochs.looks_at_batches, more)):
                self.look_every = None if verbose in (0, 2) else LOOK_EVERY
        try:
            history = fit(*bound.args, **bound.kwargs)
        except BaseException:
            self.end_records("stopped")
            raise
        finally:
            self.look_every = 0.0
        self.end_records("done")
        return history

    def callback(self):
        """What looks on while `fit` runs."""
        if self.recorder is None:
            return epochs.Epochs(self)
        return epochs.RecordedEpochs(self, self.recorder, self.every)

    def end_records(self, state):
        if self.recorder is not None:
            self.recorder.end(state)

    def look(self) -> dict:
        """What the meter shows, or what it showed a moment ago; nothing where nobody looks."""
        if self.look_every is None:
            return {}
        now = time.monotonic()
        if now - self.looked >= self.look_every:
            self.numbers, self.looked = self.read(), now
        return self.numbers

    def train_step(self, data):
        """One step of the way that is being traced; without one, as the first."""
        model = self.model
        if self.way == "unbuilt":  # Keras's own step, which builds the model as it is traced
            keras_internals.freed_with(model)
            return type(model).train_step(model, step.as_traced(data, _hides(self.shapes)))
        self.prepare()
        if self.way == "plain":
            return self.plain(data)
        if self.way == "either":
            due = tf.equal(self.meter.steps.value % self.every, 0)
            if step.replicas() > 1:
                return self.measured(data, due)
            return tf.cond(due, lambda: self.measured(data), lambda: self.plain(data))
        logs = self.measured(data)
        if self.way == "called":
            logs.pop(plan.CHECKS, None)
            logs |= self.meter.result()
        return logs

    def plain(self, data):
        keras_internals.freed_with(self.model)  # the graph may be that of a branch
        return step.plain(self.model, self.plan, self.meter, data)

    def measured(self, data, due=True):
        keras_internals.freed_with(self.model)
        return step.measured(self.model, self.plan, self.meter, data, every=self.every, due=due)

    def prepare(self):
        """Makes the meter and the plan when the model is built; anew for another optimiser."""
        model = self.model
        variables = model.trainable_variables
        if not variables:
            network.check(model)
        belongs_to = (id(model.optimizer), *(id(v) for v in variables))
        if belongs_to == self.belongs_to:
            return
        self.belongs_to = belongs_to
        onednn.warn_if_off(model)
        self.plan = plan.plan_for(model)
        self.plan.hides_batch_size = _hides(self.shapes)
        self.plan.sizes_vary = any(s is None or None in s[1:] for s in self.shapes)
        options = dict(self.meter_options)
        if "optimizer" in needed(options["shown"]) and not gap.supported(model.optimizer):
            logging.info(
                "gap_growth is not shown: %s is not one of %s",
                type(model.optimizer).__name__,
                gap.names(),
            )
            options["shown"] = [n for n in options["shown"] if "optimizer" not in needed([n])]
        with tf.init_scope(), model.distribute_strategy.scope():
            by_layer = options["per_layer"] or options["layers"]
            least = LEAST_OF_LAYERS if by_layer else LEAST
            sample = Sample([v.shape for v in variables], self.sample, least)
            options |= dict(examples=self.told, sample=sample)
            self.meter = GSNRMeter(variables, options.pop("shown"), **options)
        self.read = tf.function(self.meter.result, autograph=False)
        self.looked = -np.inf
        keras_internals.set_silently(model, "_meter", self.meter)
        self.steps = 0

    def make_train_function(self, force=False):
        """As Keras's, with a graph for each way."""
        model = self.model
        if model.train_function is not None and not force:
            return
        functions = {}

        def function_of(way):
            if way not in functions:
                mine = model.train_function
                type(model).make_train_function(model, force=True)
                functions[way], model.train_function = model.train_function, mine
            return functions[way]

        def run(way, iterator):
            function = function_of(way)
            self.way = way  # where it is first called, it is traced
            try:
                logs = function(iterator)
            finally:
                self.way = "called"
            return logs

        def train_function(iterator):
            if self.plan is None or not self.plan.settled:
                return self.first(run, iterator)
            model = self.model
            several = model.steps_per_execution > 1
            due = self.steps % self.every == 0
            way = "measured"
            if self.every > 1:
                way = "either" if several else "measured" if due else "plain"
            functions.pop("first", None)  # lest its graph stay in memory
            if self.stale:
                functions.clear()
                self.stale = False
            logs = run(way, iterator)
            before, self.steps = self.steps, self.steps + model.steps_per_execution
            if self.steps // LEARN_EVERY > before // LEARN_EVERY:
                self.learn({})
            return logs | self.look()

        model.train_function = train_function

    def first(self, run, iterator):
        """The first execution, step by step on batches of known shapes; what is seen is learnt."""
        logs = None
        for _ in range(self.model.steps_per_execution):
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise StopIteration from None
                break
            self.shapes = _shapes(iterator)
            if not all(layer.built for layer in network.layers(self.model)) and self.unbuilt:
                self.unbuilt = False  # what is built by no step is used by none
                logs = run("unbuilt", _once(data))
                self.prepare()
                self.meter.advance(_size(data))
                self.steps += 1
                continue
            due = self.steps % self.every == 0
            way = "plain" if not due else "measured" if self.plan_is_settled() else "first"
            self.build(data)
            logs = run(way, _once(data))
            self.steps += 1
            self.learn(logs.pop(plan.CHECKS, {}))
        return logs | self.look()

    def build(self, data):
        """Makes the variables of optimiser, metrics and loss, lest the step be traced twice."""
        model = self.model
        self.prepare()
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        if getattr(model, "inputs", None) and not _is_distributed(data):
            plain = tf.nest.map_structure(_none_if_optional, data)
            if all(v is None or isinstance(v, tf.Tensor) for v in tf.nest.flatten(plain)):
                with contextlib.suppress(Exception):  # what is wrong is Keras's step to say
                    keras_internals.build_loss_and_metrics(model, plain)

    def plan_is_settled(self):
        return self.plan is not None and self.plan.settled

    def learn(self, checks):
        """Draws the conclusions from what the steps have seen, and says what is to be said."""
        whole, unmeasured = len(self.plan.whole), len(self.plan.unmeasured)
        first = not self.plan.settled
        checks = tf.nest.map_structure(_local, checks)
        status = self.meter.status.numpy()
        for line in plan.learn(self.model, self.plan, checks, status):
            logging.warning("GSNRModel(%r): %s", self.model.name, line)
        if first and self.plan.misplaced:
            self.meter.forget()
        grown = len(self.plan.whole) > whole or len(self.plan.unmeasured) > unmeasured
        self.stale = self.stale or grown and not first


def _shapes(iterator) -> list:
    """Of the tensors of a batch, None for what is unknown: of Python's iterators, all is."""
    spec = getattr(iterator, "element_spec", None)
    if spec is None:
        return [None]
    shapes = [getattr(leaf, "shape", None) for leaf in tf.nest.flatten(spec)]
    return [None if s is None or s.rank is None else tuple(s) for s in shapes]


def _hides(shapes) -> bool:
    return any(s and s[0] is None for s in shapes)


def _none_if_optional(value):
    return None if isinstance(value, tf.experimental.Optional) else value


def _is_distributed(data) -> bool:
    return any(isinstance(v, tf.distribute.DistributedValues) for v in tf.nest.flatten(data))


def _size(data) -> int:
    """The number of examples of a batch, of all replicas."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    leaves = [v for v in tf.nest.flatten(x) if not isinstance(v, tf.experimental.Optional)]
    distributed = isinstance(leaves[0], tf.distribute.DistributedValues)
    parts = leaves[0].values if distributed else leaves[:1]
    return sum(int(examples.count(part)) for part in parts)


def _once(data):
    yield data


def _local(value):
    """A tensor, of one replica."""
    values = getattr(value, "values", None)
    return values[0] if isinstance(values, tuple) else value


def _check(model, engine, measure_every, pool, shown, examples, sample):
    checks.keras_model(model)
    own = vars(model).get("train_step")
    own = own is not None and not isinstance(getattr(own, "__self__", None), _Training)
    if own or type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"model {model.name!r} has a train_step of its own, which GSNRModel would pass over: "
            "keep the model as it is and measure it with GSNRCallback"
        )
    engines.check_name(engine)
    if engine not in ENGINES:
        raise ValueError(
            f"engine={engine!r}: the reference engine runs each example alone and so never trains; "
            "expected engine='layerwise' or 'auto'. GSNRCallback and gradient_moments take it"
        )
    checks.positive_integer(
        "measure_every",
        measure_every,
        ", 1 for every step; to measure nothing, train the model without GSNRModel",
    )
    checks.choice("pool", pool, POOLS)
    expected = f"a tuple of some of {', '.join(SHOWN)}"
    if not checks.names("shown", shown, SHOWN.__contains__, expected):
        checks.refuse("shown", shown, expected)
    if examples is not None:
        checks.positive_integer("examples", examples, ", the number of training examples")
    if sample is not None:
        checks.positive_integer("sample", sample, ", a number of parameters, or None for all")


def _about_data(given) -> dict:
    """The batch size that `fit` is given, and a digest of the examples, where they are arrays."""
    x, y = given.get("x"), given.get("y")
    arrays = x is not None and not examples.is_stream(x)
    return {
        "batch_size": given.get("batch_size"),
        "training_data": digest((x, y)) if arrays else None,
    }


def _length(given) -> int:
    """The number of training examples that `fit` is given as arrays; 0 if it is not known."""
    x, y = given.get("x"), given.get("y")
    if y is None or examples.is_stream(x):
        return 0
    return int(examples.count(y) * (1 - (given.get("validation_split") or 0.0)))
