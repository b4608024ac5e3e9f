"""`GSNRModel`: a Keras model that trains as before and shows its GSNR while it does.

The step itself is in `step.py`, what is shown in `meter.py`.
"""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr import gradients
from tf_gsnr.gradients import contract, distributed, losses
from tf_gsnr.moments import Moments
from tf_gsnr.training import gap, step
from tf_gsnr.training.meter import SHOWN, GSNRMeter

POOLS = ("epoch", "batch")


@keras.saving.register_keras_serializable(package="tf_gsnr")
class GSNRModel(keras.Model):
    """Wraps a Keras model so that `fit` measures the GSNR of its parameters.

    `compile`, `fit`, `evaluate`, `predict` and `save` are used as before, and the training is the
    same: the optimiser is given the mean of the per-example gradients. Beside the loss and metrics,
    the progress bar, `History` and every callback see:

        gsnr          mean of r_j = g_j^2 / rho2_j over the parameters (25)
        gsnr_median   their median
        same_sign     mean share of the examples whose gradient has the majority's sign
        noise_scale   tr(Sigma) / |G|^2, in examples
        osgr          one-step generalisation ratio that is predicted, (19)
        gap_growth    the generalisation gap that is expected from the steps so far, from the
                      training data alone: 1/N sum_steps lambda sum_j rho2_j, (14)

    `gap_growth` adds up, over all steps, by how much the gap between the loss on unseen data and
    the loss on the N training examples is expected to widen. Per step this is lambda sum_j
    rho2_j / N for SGD at any batch size, to first order in lambda, and an approximation for
    optimisers with a diagonal preconditioner (Adam, AdamW, RMSprop, Adagrad), where lambda is
    replaced by lambda / sqrt(v_j) and the like; see `tf_gsnr/training/gap.py`. With any other
    optimiser it is not shown. An unmeasured step counts as much as the measured one before it.

    Only `fit` measures: `evaluate` and `predict` are the inner model's. Sample and class weights
    weigh an example's gradient. Weight penalties train but are not part of any example's gradient.

    Args:
      model: the model to train, built or not. It stays an ordinary model, which saves and loads
        without this package: `gsnr_model.inner.save(...)`. If it is compiled already, its
        optimizer, loss and metrics are taken over and `compile` need not be called.
      engine: see `gradient_moments`.
      measure_every: measure at every so many-th step; the steps between are plain Keras.
      pool: "epoch" merges the moments of all measured batches of an epoch, "batch" shows the last
        batch alone. Over an epoch the estimates are far less noisy, but the parameters move.
      bias_corrected: whether the estimates are corrected for the bias of small batches: without it
        a batch of 32 shows a GSNR of at least 1/32, more than its usual value.
      shown: which of the numbers above.
      per_layer: also show `gsnr/<layer path>` for each layer.
      examples: N, the number of training examples, for `osgr` and `gap_growth`. By default it is
        the length of the arrays given to `fit`, or else what the longest epoch had so far.

    Raises:
      ValueError: an argument is not usable; or, in `fit`, a model or loss that cannot be measured.

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

    def __init__(
        self,
        model: keras.Model,
        *,
        engine: str = "auto",
        measure_every: int = 1,
        pool: str = "epoch",
        bias_corrected: bool = True,
        shown: tuple = SHOWN,
        per_layer: bool = False,
        examples: int | None = None,
        name: str | None = None,
        **kwargs,
    ):
        _check(model, measure_every, pool, shown, examples)
        gradients.check_engine_name(engine)
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(name=name or f"gsnr_{model.name}", **kwargs)
        self.autocast = False  # the inner model converts its own inputs
        self.inner = model
        self.engine, self.measure_every, self.pool = engine, int(measure_every), pool
        self.bias_corrected, self.shown = bool(bias_corrected), tuple(shown)
        self.per_layer, self.fixed_examples = bool(per_layer), examples
        self._meter = None
        self._told = examples or 0
        self._evaluating = False
        self._way = "either"  # of the two steps, which one a graph that is traced now is to be
        self.built = model.built
        if model.compiled:
            self.compile(**model._compile_config.config)

    def call(self, inputs, training=None):
        return self.inner(inputs)  # Keras passes `training` on to the layers inside

    @property
    def output_names(self):
        return self.inner.output_names

    @property
    def metrics(self):
        metrics = super().metrics
        shown = getattr(self, "_meter", None) is not None and not self._evaluating
        return [*metrics, self._meter] if shown else metrics

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, metrics=None, **kwargs):
        """As `keras.Model.compile`; the loss is needed, one value per example."""
        if loss is None:
            raise ValueError(
                "compile(loss=None): GSNRModel needs the loss here, one value per example; what "
                "add_loss or a train_step of the model's own compute has no per-example form"
            )
        super().compile(optimizer, loss, loss_weights, metrics, **kwargs)
        if self.inner.built and self.trainable_variables:
            self._make_meter()

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.inner.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, *args, **kwargs):
        """As `keras.Model.fit`."""
        distributed.check_fit(self.distribute_strategy)
        if self.fixed_examples is None:
            known = y is not None  # so x and y are arrays
            self._told = _length(x, kwargs.get("validation_split") or 0.0) if known else 0
        if self._meter is not None:
            self._meter.examples.assign(self._told)
        return super().fit(x, y, *args, **kwargs)

    def make_train_function(self, force=False):
        """As Keras's; with two graphs, measured and plain, where the choice can be made outside."""
        if self.train_function is not None and not force:
            return
        super().make_train_function(force=True)
        if self.measure_every == 1 or self.steps_per_execution > 1:
            return
        ways = {"measured": self.train_function}
        super().make_train_function(force=True)
        ways["plain"] = self.train_function
        steps, shown = None, {}

        def train_function(iterator):
            nonlocal steps, shown
            if steps is None:
                steps = 0 if self._meter is None else int(self._meter.steps.numpy())
            self._way = "measured" if steps % self.measure_every == 0 else "plain"
            hidden = self._without_meter() if self._way == "plain" else contextlib.nullcontext()
            try:
                with hidden:
                    logs = ways[self._way](iterator)  # when it is first called, it is traced
            finally:
                way, self._way = self._way, "either"
            steps += 1
            if way == "measured":
                shown = {name: logs[name] for name in self._meter.result_names}
                return logs
            return logs | (shown or self._meter.result())

        self.train_function = train_function

    def train_step(self, data):
        meter = self._prepared(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._way == "plain":
            logs = super().train_step(data)
            meter.advance(_global_batch(x))
            return logs
        of_loss = [v for metric in self._compile_loss.metrics for v in metric.variables]
        state = [*self.inner.non_trainable_variables, *of_loss]
        due = tf.equal(meter.steps.value % self.measure_every, 0)

        def measured():
            return step.measured(self, self._measure, self.inner, state, x, y, sample_weight)

        def plain():
            return step.plain(self, state, x, y, sample_weight)._replace(moments=self._nothing())

        if self._way == "measured" or self.measure_every == 1:
            found, due = measured(), tf.constant(True)
        else:
            found = step.either(due, measured, plain)
        for variable, value in zip(state, found.updates):
            variable.assign(value)
        batch = tf.shape(tf.nest.flatten(x)[0])[0]
        self._loss_tracker.update_state(found.loss * step.replicas(), sample_weight=batch)
        self.optimizer.apply_gradients(zip(found.gradients, self.trainable_variables))
        self._show(found, _global_batch(x), due)
        return self.compute_metrics(x, y, found.predictions, sample_weight=sample_weight)

    def _show(self, found, batch, due):
        """Updates what is shown, from a step's moments where they were `due`."""
        self._meter.advance(batch)
        due &= batch > 1  # a ragged last batch of one example has no variance
        if step.loss_scale(self.optimizer) is not None:
            # The optimiser skips a step whose scaled gradients overflow, and so does the meter.
            due &= _all_finite(found.gradients)

        def update(moments):
            # Out of a tf.cond they come without shapes, as `_nothing` has others.
            shaped = {
                name: [
                    tf.reshape(m, v.shape)
                    for m, v in zip(getattr(moments, name), self.trainable_variables)
                ]
                for name in ("mean", "m2", "positives", "negatives")
            }
            moments = moments._replace(**shaped)
            if step.replicas() > 1:
                moments = distributed.all_reduce(moments)
            self._meter.update_state(moments, self.optimizer, self.measure_every)

        distributed.where(due, update, found.moments)

    def evaluate(self, *args, **kwargs):
        """As `keras.Model.evaluate`, without the numbers that only training has."""
        with self._without_meter():
            return super().evaluate(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """As `keras.Model.test_on_batch`."""
        with self._without_meter():
            return super().test_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _without_meter(self):
        # Never within a step: the replicas' threads would leave each other's.
        before, self._evaluating = self._evaluating, True
        try:
            yield
        finally:
            self._evaluating = before

    def _prepared(self, data):
        """Builds, while a step is traced, what is not built yet; returns the meter."""
        built = self.inner.built and self._compile_loss.built
        if not built:
            self._symbolic_build(data_batch=data)
        if not self.trainable_variables:
            contract.check_model(self.inner)
        if self._meter is None:
            self._make_meter()
        return self._meter

    def _make_meter(self):
        shown = self.shown
        if "gap_growth" in shown and not gap.supported(self.optimizer):
            logging.info(
                "gap_growth is not shown: %s is not one of %s",
                type(self.optimizer).__name__,
                ", ".join(gap.SUPPORTED),
            )
            shown = [name for name in shown if name != "gap_growth"]
        with tf.init_scope():
            meter = GSNRMeter(
                self.inner,
                shown,
                pool=self.pool,
                bias_corrected=self.bias_corrected,
                per_layer=self.per_layer,
                examples=self._told,
            )
        measure = gradients.build_engine(
            self.inner,
            losses.per_example_loss(None, self),
            engine=self.engine,
            sign_counts=meter.sign_counts,
            training=True,
            batch_norm="batch",
        )
        for name, value in (("_meter", meter), ("_measure", measure)):
            object.__setattr__(self, name, value)  # Keras's tracking is closed once it is built

    def _nothing(self):
        """Moments of no examples: in a plain step, in place of those that were not measured.

        Where it can be, each entry is empty, lest zeros as large as the model be filled in.
        """
        variables = self.trainable_variables
        if not self.jit_compile:
            variables = [np.zeros([0], v.dtype) for v in variables]
        return Moments.empty(variables, sign_counts=self._meter.sign_counts)

    def get_config(self):
        return {
            "model": keras.saving.serialize_keras_object(self.inner),
            "engine": self.engine,
            "measure_every": self.measure_every,
            "pool": self.pool,
            "bias_corrected": self.bias_corrected,
            "shown": list(self.shown),
            "per_layer": self.per_layer,
            "examples": self.fixed_examples,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(model, **config)


def _check(model, measure_every, pool, shown, examples):
    if not isinstance(model, keras.Model):
        raise ValueError(f"model={model!r}: expected a keras.Model, got {type(model).__name__}")
    if isinstance(model, GSNRModel):
        raise ValueError(f"model {model.name!r} is a GSNRModel already; pass the model inside it")
    for method in ("train_step", "compute_loss"):
        if getattr(type(model), method) is not getattr(keras.Model, method):
            raise ValueError(
                f"model {model.name!r} has a {method} of its own, which GSNRModel would pass over: "
                "give the loss to compile() instead, or keep the model as it is and measure it "
                "with GSNRCallback"
            )
    if isinstance(measure_every, bool) or not isinstance(measure_every, (int, np.integer)):
        raise ValueError(f"measure_every={measure_every!r}: expected a positive integer")
    if measure_every < 1:
        raise ValueError(
            f"measure_every={measure_every}: expected a positive integer, 1 for every step; to "
            "measure nothing, train the model without GSNRModel"
        )
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; available: {', '.join(POOLS)}")
    unknown = [name for name in shown if name not in SHOWN]
    if unknown or not shown:
        raise ValueError(f"shown: unknown {unknown}; available: {', '.join(SHOWN)}")
    if examples is not None and examples < 1:
        raise ValueError(f"examples={examples}: expected the number of training examples")


def _global_batch(x):
    """How many examples all replicas have."""
    batch = tf.shape(tf.nest.flatten(x)[0])[0]
    if step.replicas() == 1:
        return batch
    return tf.distribute.get_replica_context().all_reduce("SUM", batch)


def _all_finite(gradients):
    """Whether all are finite, on all replicas."""
    values = [getattr(g, "values", g) for g in gradients if g is not None]  # dense or sparse
    wrong = tf.add_n([tf.math.count_nonzero(~tf.math.is_finite(v)) for v in values])
    if step.replicas() > 1:
        wrong = tf.distribute.get_replica_context().all_reduce("SUM", wrong)
    return tf.equal(wrong, 0)


def _length(x, validation_split) -> int:
    n = len(tf.nest.flatten(x)[0])
    return int(n * (1 - validation_split))
