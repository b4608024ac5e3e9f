"""`GSNRCallback`: measures an ordinary Keras model on a fixed set of examples while it trains.

What it measures is in `probe.py`, when in `schedule.py`.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr import checks, keras_internals, metrics, shown
from tf_gsnr.columns import columns
from tf_gsnr.gradients import examples as data
from tf_gsnr.gradients import losses, measure, targets
from tf_gsnr.training import gap, probe, recorder, rows, schedule, tensorboard
from tf_gsnr.training.recorder import Recorder

KEPT = ("gsnr", None)


class GSNRCallback(keras.callbacks.Callback):
    """Measures GSNR on a fixed probe set, at fixed parameters, and touches nothing.

    The training is bit for bit the one without it. What it finds goes into the logs, where History,
    CSVLogger, TensorBoard, EarlyStopping and so on see it: put it before them in `callbacks`.

        gsnr/mean, gsnr/median, gsnr/p95      GSNR of the parameters
        gsnr/same_sign, gsnr/noise_scale      see `summarize`
        gsnr/osgr_predicted                   (19) for N training examples
        gsnr/dead                             parameters without variance
        gsnr_plain/mean                       (25) as the paper has it, too large by about 1/n

    all at the same parameters, corrected for the size of the probe set where they are not called
    plain, and NaN where the signal cannot be told from zero; once an epoch it is logged why. With
    `test_data` also

        gsnr/osgr_measured    decrease of the test loss over that of the probe's, (23), in the step
                              of the real optimiser that follows a measurement; a ratio of sums
                              over the epoch's measured steps, NaN where the probe's loss did not
                              fall
        gsnr/gap              by how much the gap between the test loss and the probe's has grown
                              since the first measurement
        gsnr/gap_predicted    the same by (14), added up over all steps since then; each step that
                              is not measured counts as the last that was. For optimisers with a
                              diagonal preconditioner an approximation, see `gap.py`

    The two gaps are of the moment of the last measurement. The probe set stands for the training
    set: give training examples, all or a random part.

    The columns are the same in every epoch. Until something is measured they say NaN, and between
    measurements the last numbers stay. All that was measured is in `callback.history`, a dict of
    columns, and the last moments in `callback.moments`. With `run_dir` it is also on the disk, and
    on a page to look at while the training goes on: `run_dir/page.html`.

    Args:
      x, y: the probe set, as `gradient_moments` takes it; a dataset, which holds its own targets,
        is read once and kept.
      sample_weight: `[examples]` factors of the examples' losses.
      every_epochs: measure at the end of every so many-th epoch; the default is 1. With test data
        or `run_dir` also where training begins.
      every_steps: measure before step 0, k, 2k, ...
      schedule: measure before the steps that it names: `linear`, `logarithmic` or `listed` of
        `tf_gsnr.training.schedule`, or any callable `step -> bool`. Give one of the three only.
      test_data: `(x, y)`, or a dataset of them, that are not trained on.
      examples: N, the number of training examples; default: the size of the probe set.
      per_layer: also `gsnr/<layer path>` and `gsnr/gap_share/<layer path>`.
      sign_counts: whether to measure `same_sign`.
      run_dir: a directory for the page, page.html, and records.jsonl, a row a measurement, the
        last step among them; see `tf_gsnr.read`. A training that begins anew does not touch the
        records of another; one that goes on from a saved model continues them.
      overwrite: whether an earlier run in `run_dir` may be thrown away.
      keep: "gsnr" to store the GSNR of every parameter at each measurement in `run_dir/gsnr/`.
      log_dir: a directory for TensorBoard, with histograms of the parameters' GSNR per variable.
      loss, engine, batch_size, training, batch_norm, contributions, seed, dtype, jit_compile: of
        `gradient_moments`.

    Raises:
      ValueError: an argument is not usable; or, when training begins, the probe set does not fit
        the model.

    Example:

    >>> import keras, numpy as np, tf_gsnr
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.normal(size=[64, 4])
    >>> callback = tf_gsnr.GSNRCallback(x, x[:, :2])
    >>> history = model.fit(x, x[:, :2], epochs=3, verbose=0, callbacks=[callback]).history
    >>> len(history["gsnr/mean"])
    3
    """

    def __init__(
        self,
        x,
        y=None,
        *,
        sample_weight=None,
        every_epochs: int | None = None,
        every_steps: int | None = None,
        schedule=None,
        test_data=None,
        examples: int | None = None,
        per_layer: bool = False,
        sign_counts: bool = True,
        run_dir=None,
        overwrite: bool = False,
        keep: str | None = None,
        log_dir=None,
        loss=None,
        engine: str = "auto",
        batch_size: int = 256,
        training: bool = False,
        batch_norm: str = "frozen",
        contributions: bool = False,
        seed: int | None = None,
        dtype: str | None = None,
        jit_compile: bool | str = "auto",
    ):
        super().__init__()
        self._x, self._y, sample_weight = data.collect(x, y, sample_weight)
        self._test = None
        if test_data is not None:
            pair = (test_data, None) if data.is_stream(test_data) else test_data
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError("test_data: expected a pair (x, y) of arrays, or a dataset")
            self._test = _named("test_data", data.collect, *pair)[:2]
            _check_same_pixels(self._x, self._test[0])
        self._due_epoch, self._due_step, self.cadence = _cadence(
            every_epochs, every_steps, schedule
        )
        measure.check_options(
            engine=engine,
            batch_size=batch_size,
            training=training,
            seed=seed,
            batch_norm=batch_norm,
            contributions=contributions,
            dtype=dtype,
            jit_compile=jit_compile,
        )
        if loss is not None:
            targets.check_loss(loss)
        if examples is not None:
            checks.positive_integer("examples", examples)
        flags = {"per_layer": per_layer, "sign_counts": sign_counts, "overwrite": overwrite}
        for name, value in flags.items():
            checks.boolean(name, value)
        checks.one_of("keep", keep, KEPT)
        for name, value in (("run_dir", run_dir), ("log_dir", log_dir)):
            if value is not None:
                checks.directory(name, value)
        if keep and run_dir is None:
            raise ValueError(f"keep={keep!r} needs run_dir: pass the directory to keep it in")
        self._options = dict(
            loss=loss,
            sample_weight=sample_weight,
            engine=engine,
            batch_size=batch_size,
            sign_counts=sign_counts,
            training=training,
            batch_norm=batch_norm,
            contributions=contributions,
            seed=seed,
            dtype=dtype,
            jit_compile=jit_compile,
        )
        self._batch_size = batch_size
        self._examples = examples or data.count(self._x)
        self._per_layer, self._keep, self._log_dir = per_layer, keep, log_dir
        self._recorder = None if run_dir is None else Recorder(run_dir, overwrite)
        self._writer = self._losses = self._first_step = None
        self._steps = 0  # since this callback's first training began
        self._rows = []  # all that was measured
        self._latest = {}  # what the logs show
        self._untold = {}  # by reason, which columns of the epoch's last measurement are NaN
        self._decreases = []  # of the losses of (test, probe) examples in this epoch's steps
        self._owed = False  # whether a measurement is due
        self._pending = None  # the row of a measurement whose step is not yet made
        self._kept = None  # the GSNR of its parameters, for the records
        self._growth = 0.0  # predicted, per step
        self._first: Any = None  # losses of (probe, test) examples at the first measurement
        self._gap_predicted = 0.0  # grown since then
        self.moments = None

    @property
    def history(self) -> dict:
        """All that was measured, `{name: array}`, `[measurements]` each."""
        return columns(self._rows)

    @property
    def step(self) -> int:
        """How many steps the model was trained for, as its optimiser counts them."""
        return (self._first_step or 0) + self._steps

    def on_train_begin(self, logs=None):
        checks.keras_model(self.model)
        losses.of_batch(self.model, self._options["loss"])  # raises where there is none
        probe.check_fits(self.model, self._x, "x")
        if self._test is not None:
            probe.check_fits(self.model, self._test[0], "test_data")
            streamed = data.is_stream(self._test[0])
            needed = losses.needs_targets(self.model, self._options["loss"])
            if self._test[1] is None and not streamed and needed:
                raise ValueError("test_data: it has no targets; expected a pair (x, y)")
            self._losses = probe.loss_function(self.model, self._options["loss"])
            if not gap.supported(self.model.optimizer):
                logging.info("gsnr/gap_predicted is not known for this optimiser")
        self._latest = dict.fromkeys(self._columns(), math.nan) | self._latest
        self._epoch = 0
        if self._first_step is None:
            self._first_step = recorder.steps_made(self.model)
        if self.model.built:
            self._refuse_what_cannot_be_measured()
            self._begin_records()
        if self._log_dir is not None and self._writer is None:
            self._writer = tensorboard.open_writer(self._log_dir)

    def _begin_records(self):
        if self._recorder is None:
            return
        new = not self._recorder.open
        settings, layers = self._settings(), recorder.layers_of(self.model)
        about = {
            "epochs": self.params.get("epochs"),
            "steps_per_epoch": self.params.get("steps"),
            "optimizer_is_known": gap.supported(self.model.optimizer),
        }
        self._recorder.begin(settings, layers, self._first_step if new else self.step, about)
        if new and self._recorder.rows:
            self._rows = list(self._recorder.rows)
            self._gap_predicted = self._rows[-1].get("gap_predicted", 0.0)

    def _refuse_what_cannot_be_measured(self):
        """Measures one micro-batch, so that what is refused is refused before training."""
        self._measure_some(*self._first_batch(self._x, self._y), slice(0, self._batch_size))
        if not data.is_stream(self._x):
            n = data.not_finite((self._x, self._y))[: self._batch_size]
            if n.size:  # which a loss may well leave out
                try:
                    self._measure_some(*data.rows((self._x, self._y), n), n)
                except data.NotFinite as error:
                    raise data.NotFinite(
                        f"x or y of example {n[0]} is not finite, and neither is what comes of it; "
                        "expected finite numbers, or such as the loss leaves out"
                    ) from error
        if self._test is not None:
            _named("test_data", self._refuse_test_data)

    def _measure_some(self, x, y, taken):
        weight = self._options["sample_weight"]
        weight = None if weight is None else data.rows(weight, taken)
        measure.gradient_moments(self.model, x, y, **dict(self._options, sample_weight=weight))

    def _first_batch(self, x, y):
        """The first micro-batch, as `gradient_moments` takes it."""
        batch = next(iter(data.micro_batches(x, y, None, self._batch_size)))
        if data.is_stream(x):
            return data.Batches([batch[:3]]), None
        return tuple(data.rows(v, slice(0, self._batch_size)) for v in (x, y))

    def _refuse_test_data(self):
        """Raises ValueError where the first micro-batch of it has no finite losses."""
        x, y = self._first_batch(*self._test)
        each = self._losses(x, y, self._batch_size)
        if not np.isfinite(each).all() and self._is_finite():
            n = int(np.argmin(np.isfinite(each)))
            raise data.NotFinite(
                f"the loss of example {n} is not finite: look for NaN or inf in x or y there"
            )

    def _is_finite(self) -> bool:
        """Whether the model's weights are."""
        return all(np.isfinite(v.numpy()).all() for v in self.model.trainable_variables)

    def set_params(self, params):
        super().set_params(checks.instance("params", params, dict, "a dict, as fit gives it"))

    def set_model(self, model):
        super().set_model(checks.keras_model(model))

    def on_epoch_begin(self, epoch, logs=None):
        checks.integer("epoch", epoch, 0)
        self._epoch = epoch
        self._decreases, self._untold = [], {}

    def on_train_batch_begin(self, batch, logs=None):
        batch = checks.integer("batch", batch, 0)
        first = self._due_step is _never and not self._rows and self._wants_start()
        self._owed |= first or checks.boolean("schedule", self._due_step(self._steps))
        if self._owed and self.model.built:  # else as soon as it is
            self._measure()
        self._batch = batch

    def _wants_start(self):
        return self.model.built and (self._test is not None or self._recorder is not None)

    def on_train_batch_end(self, batch, logs=None):
        batch = checks.integer("batch", batch, 0)
        steps = keras_internals.steps_of_execution(self.model, self._batch, batch)
        self._steps += steps
        if self._recorder is not None and not self._recorder.open:
            self._begin_records()  # the model was not built before
        if self._test is not None and self._pending is not None:
            self._look_at_the_step(steps)
        self._gap_predicted += steps * self._growth
        self._write_pending()
        self._into(logs)

    def on_epoch_end(self, epoch, logs=None):
        epoch = checks.integer("epoch", epoch, 0)
        if logs is not None:
            checks.instance("logs", logs, MutableMapping, "a dict of numbers, or None")
        if self._due_epoch(epoch + 1):
            self._measure()
        for why, names in self._untold.items():
            logging.warning("epoch %d: %s: %s", epoch + 1, ", ".join(names), why)
        self._into(logs)

    def on_train_end(self, logs=None):
        recorded = self._recorder is not None and self._recorder.open
        seen = bool(self._rows) and self._rows[-1]["step"] == self.step
        if recorded and self._pending is None and not seen:
            self._measure()  # the last step has a row
        self._write_pending()
        if recorded:
            self._recorder.end("done")
        if self._writer is not None:
            self._writer.flush()

    def _measure(self):
        """Measures at the parameters as they are; the row waits for the next step, if it is due."""
        self._write_pending()
        self._owed = False
        try:
            self.moments = measure.gradient_moments(self.model, self._x, self._y, **self._options)
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(
                f"the probe set does not fit model {self.model.name!r}: {error.message}"
            ) from error
        except data.NotFinite as error:
            if self.step == 0 and self._is_finite():
                raise  # it is the probe set's, and nothing is lost yet
            # The training diverged, or seems to, and goes on as it would have.
            self._latest = dict.fromkeys(self._latest, math.nan)
            self._untold = {str(error): list(self._latest)}
            return
        ratios = metrics.gsnr(self.moments)
        row = {
            "step": self.step,
            "epoch": self._epoch,
            "learning_rate": recorder.learning_rate(self.model),
            **rows.of_moments(self.moments, self.model, self._examples, ratios),
        }
        if self._test is not None:
            row |= self._losses_and_gap()
        if self._recorder is not None:
            self._kept = ratios
        self._show(row)
        self._untold = {}
        for why, names in metrics.why_nan(self.moments, self.model, row).items():
            names = [shown.in_logs(name) for name in names if self._is_logged(name)]
            if names:
                self._untold[f"{why}; a larger probe set tells more"] = names
        self._pending = row

    def _losses_and_gap(self) -> dict:
        size = self._batch_size
        now = self._losses(self._x, self._y, size), self._losses(*self._test, size)
        probe_loss, test_loss = (float(each.mean()) for each in now)
        self._now = now
        numbers = {"loss": probe_loss, "test_loss": test_loss}
        if self._first is None and self._rows and "test_loss" in self._rows[0]:
            start = self._rows[0]  # of the training that this one continues
            grown = test_loss - probe_loss - (start["test_loss"] - start["loss"])
            numbers |= {"gap": grown}
        else:
            self._first = self._first or now
            grown = [after - before for after, before in zip(now, self._first)]
            numbers["gap"], numbers["gap_se"] = probe.growth_of_gap(*grown[::-1], self._is_whole())
        return numbers | {"gap_predicted": self._gap_predicted}

    def _is_whole(self) -> bool:
        """Whether the probe set is the whole training set."""
        return self._examples == data.count(self._x)

    def _look_at_the_step(self, steps):
        """What the step that was just made did to the losses."""
        row, size = self._pending, self._batch_size
        before = self._now
        after = self._losses(self._x, self._y, size), self._losses(*self._test, size)
        probe_falls, test_falls = (b - a for b, a in zip(before, after))
        self._decreases.append((test_falls, probe_falls))
        self._growth = math.nan
        if gap.supported(self.model.optimizer):
            self._growth = probe.predicted_growth(
                self.moments, self.model.optimizer, self._examples
            )
        test, train = (sum(falls) for falls in zip(*self._decreases))
        row["osgr_measured"], row["osgr_measured_se"] = probe.ratio_of_decreases(
            test, train, self._is_whole()
        )
        row["step_probe_decrease"] = float(probe_falls.mean())
        row["step_test_decrease"] = float(test_falls.mean())
        row["step_gap_growth_predicted"] = steps * self._growth
        self._show({"osgr_measured": row["osgr_measured"]})

    def _write_pending(self):
        row, self._pending = self._pending, None
        if row is None or self._rows and row["step"] <= self._rows[-1]["step"]:
            return
        self._rows.append(row)
        if self._writer is not None:
            tensorboard.write_tensorboard(
                self._writer, self.moments, self.model, row["step"], record=row
            )
        if self._recorder is not None and self._recorder.open:
            self._recorder.add(row, rows.histograms_of_moments(self._kept, self.model))
            if self._keep:
                paths = [v.path for v in self.model.trainable_variables]
                self._recorder.keep(row["step"], dict(zip(paths, self._kept)))
        self._kept = None

    def _columns(self):
        """The names of all that will ever be logged."""
        lacking = set() if self._options["sign_counts"] else {"signs"}
        lacking |= set() if self._test is not None else {"test"}
        numbers = [n for n in shown.NUMBERS.values() if n.in_records and not lacking & set(n.needs)]
        names = [number.in_records for number in numbers]
        if self._per_layer:
            layers = metrics.by_layer([v.path for v in self.model.trainable_variables])
            names += [f"{kind}/{layer}" for kind in ("gsnr", "gap_share") for layer in layers]
        return [shown.in_logs(name) for name in names]

    def _is_logged(self, name):
        return shown.in_logs(name) in self._latest

    def _show(self, numbers):
        self._latest |= {shown.in_logs(k): v for k, v in numbers.items() if self._is_logged(k)}

    def _into(self, logs):
        if logs is not None:
            logs.update(self._latest)

    def _settings(self):
        return recorder.about_training(
            self.model,
            measured_by="GSNRCallback",
            probe_examples=data.count(self._x),
            test_examples=data.count(self._test[0]) if self._test else 0,
            examples=self._examples,
            cadence=self.cadence,
            engine=self._options["engine"],
            batch_norm=self._options["batch_norm"],
            contributions=self._options["contributions"],
            probe_data=recorder.digest((self._x, self._y)),
            test_data=recorder.digest(self._test),
            seed=keras_internals.global_seed(),
        )


def _named(name, function, *arguments):
    """What the function returns; a ValueError of it begins with the name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_same_pixels(x, other):
    """Raises ValueError where the one is bytes and the other floating-point numbers."""

    def dtypes(data_):
        data_ = data_.batches[0][0] if isinstance(data_, data.Batches) else data_
        return [tf.as_dtype(v.dtype) for v in tf.nest.flatten(data_) if v is not None]

    for one, of_test in zip(dtypes(x), dtypes(other)):
        if tf.uint8 in (one, of_test) and (one.is_floating or of_test.is_floating):
            raise ValueError(
                f"test_data: its examples are {of_test.name} and x is {one.name}; expected one "
                "dtype, lest the ones be scaled and the others not"
            )


def _cadence(every_epochs, every_steps, due):
    """Two rules, `epoch -> bool` and `step -> bool`, and their description."""
    given = [v for v in (every_epochs, every_steps, due) if v is not None]
    if len(given) > 1:
        raise ValueError("expected one of every_epochs, every_steps and schedule, not several")
    for name, value in (("every_epochs", every_epochs), ("every_steps", every_steps)):
        if value is not None:
            checks.positive_integer(name, value)
    if due is not None:
        if not callable(due):
            raise ValueError(
                f"schedule={due!r}: expected linear(...), logarithmic(...) or listed(...) of "
                "tf_gsnr.training.schedule, or a callable step -> bool"
            )
        return _never, due, getattr(due, "name", "schedule")
    if every_steps is not None:
        return _never, schedule.linear(int(every_steps)), f"every {every_steps} steps"
    every = int(every_epochs or 1)
    return (lambda epoch: epoch % every == 0), _never, f"every {every} epochs"


def _never(_):
    return False
