"""`GSNRCallback`: measures an ordinary Keras model on a fixed set of examples while it trains.

What it measures is in `probe.py`, when in `schedule.py`.
"""

from __future__ import annotations

import math

import keras
import tensorflow as tf
from absl import logging

from tf_gsnr import checks, environment, keras_internals, metrics, shown
from tf_gsnr.gradients import engines, losses, measure
from tf_gsnr.gradients import examples as data
from tf_gsnr.records import RunDirectory
from tf_gsnr.training import gap, probe, schedule, tensorboard


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
    `test_data` also, for one step of the real optimiser at each measurement, by the losses before
    and after it:

        gsnr/osgr_measured    decrease of the test loss over that of the probe's, (23); a ratio of
                              sums over the epoch's measured steps, NaN where the probe's loss did
                              not fall
        gsnr/gap              by how much the gap between the test loss and the probe's has grown
                              since the first measured step began
        gsnr/gap_predicted    the same by (14), added up over all steps since then; each step that
                              is not measured counts as the last that was. For optimisers with a
                              diagonal preconditioner an approximation, see `gap.py`

    The two gaps are of the same moment: the end of the last measured step, or of the epoch that was
    measured. The probe set stands for the training set: give training examples, all or a random
    part.

    The columns are the same in every epoch. Until something is measured they say NaN, and between
    measurements the last numbers stay.

    Args:
      x, y: the probe set, as `gradient_moments` takes it; a dataset, which holds its own targets,
        is read once and kept.
      sample_weight: `[examples]` factors of the examples' losses.
      every_epochs: measure at the end of every so many-th epoch; the default is 1.
      every_steps: measure before step 0, k, 2k, ...
      schedule: measure before the steps that it names: `linear`, `logarithmic` or `listed` of
        `tf_gsnr.training.schedule`, or any callable `step -> bool`. Give one of the three only.
      test_data: `(x, y)`, or a dataset of them, that are not trained on.
      examples: N, the number of training examples; default: the size of the probe set.
      per_layer: also `gsnr/<variable path>` and `gsnr/gap_share/<layer>`.
      sign_counts: whether to measure `same_sign`.
      run_dir: a directory for config.json and records.jsonl, as the experiments write.
      overwrite: whether an earlier run in `run_dir` may be thrown away.
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
            self._test = data.collect(*pair)[:2]
        self._due_epoch, self._due_step, self.cadence = _cadence(
            every_epochs, every_steps, schedule
        )
        engines.check_name(engine)
        checks.positive_integer("batch_size", batch_size)
        if examples is not None:
            checks.positive_integer("examples", examples)
        for name, value in (("per_layer", per_layer), ("sign_counts", sign_counts)):
            checks.boolean(name, value)
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
        self._per_layer = per_layer
        self._run_dir, self._overwrite, self._log_dir = run_dir, overwrite, log_dir
        self._directory = self._writer = self._losses = None
        self._step = 0  # steps done since the start of all training
        self._latest = {}
        self._untold = {}  # by reason, which columns of the epoch's last measurement are NaN
        self._before = None  # (moments, record, probe loss, test loss) before the measured step
        self._decreases = []  # of the (test, probe) loss in this epoch's measured steps
        self._growth = 0.0  # predicted, per step
        self._first_gap = None  # test loss minus probe loss where the first measured step began
        self._gap_predicted = 0.0  # grown since then

    def on_train_begin(self, logs=None):
        losses.of_batch(self.model, self._options["loss"])  # raises where there is none
        probe.check_fits(self.model, self._x, "x")
        if self._test is not None:
            probe.check_fits(self.model, self._test[0], "test_data")
            self._losses = probe.loss_function(self.model, self._options["loss"])
            if not gap.supported(self.model.optimizer):
                logging.info("gsnr/gap_predicted is not known for this optimiser")
        self._latest = dict.fromkeys(self._columns(), math.nan) | self._latest
        if self.model.built:
            self._refuse_what_cannot_be_measured()
        if self._run_dir is not None and self._directory is None:
            self._directory = RunDirectory(
                self._run_dir, self._settings(), overwrite=self._overwrite
            )
            self._directory.write_config(environment.found())
        if self._log_dir is not None and self._writer is None:
            self._writer = tensorboard.open_writer(self._log_dir)

    def _refuse_what_cannot_be_measured(self):
        """Measures one micro-batch, so that what is refused is refused before training."""
        batch = next(iter(data.micro_batches(self._x, self._y, None, self._batch_size)))
        if data.is_stream(self._x):
            x, y = data.Batches([batch[:3]]), None
        else:
            x, y = (data.rows(v, slice(0, self._batch_size)) for v in (self._x, self._y))
        measure.gradient_moments(self.model, x, y, **dict(self._options, sample_weight=None))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._decreases, self._untold = [], {}
        self._epoch_step = self._due_epoch(epoch + 1) and self._test is not None

    def on_train_batch_begin(self, batch, logs=None):
        due = self._due_step(self._step)
        if due or self._epoch_step:
            measurement = self._measure(record=due and self._test is None)
            if self._test is not None:
                self._before = (*measurement, *self._both_losses())
        self._epoch_step = False
        self._batch = batch

    def on_train_batch_end(self, batch, logs=None):
        steps = keras_internals.steps_of_execution(self.model, self._batch, batch)
        self._step += steps
        if self._before is not None:
            self._after(steps)
        else:
            self._gap_predicted += steps * self._growth
        self._into(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._due_epoch(epoch + 1):
            _, record = self._measure(record=False)
            if self._first_gap is not None:
                record = record | self._gaps(*self._both_losses())
            self._record(record)
        for why, names in self._untold.items():
            logging.warning("epoch %d: %s: %s", epoch + 1, ", ".join(names), why)
        self._into(logs)

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.flush()

    def _measure(self, record: bool):
        try:
            moments, record_of_moments = probe.measure(
                self.model, self._x, self._y, **self._options
            )
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(
                f"the probe set does not fit model {self.model.name!r}: {error.message}"
            ) from error
        record_of_moments["osgr_predicted"] = metrics.osgr(moments, self._examples)
        self._latest |= {
            shown.in_logs(k): v for k, v in record_of_moments.items() if self._is_logged(k)
        }
        self._untold = {}
        for why, names in metrics.why_nan(moments, self.model, record_of_moments).items():
            names = [shown.in_logs(name) for name in names if self._is_logged(name)]
            if names:
                self._untold[f"{why}; a larger probe set tells more"] = names
        if record:
            self._record(record_of_moments)
        if self._writer is not None:
            tensorboard.write_tensorboard(
                self._writer, moments, self.model, self._step, record=record_of_moments
            )
        return moments, record_of_moments

    def _columns(self):
        """The names of all that will ever be logged."""
        lacking = set() if self._options["sign_counts"] else {"signs"}
        lacking |= set() if self._test is not None else {"test"}
        numbers = [n for n in shown.NUMBERS.values() if n.in_records and not lacking & set(n.needs)]
        names = [number.in_records for number in numbers]
        if self._per_layer:
            paths = [v.path for v in self.model.trainable_variables]
            names += [f"gsnr/{path}" for path in paths]
            names += [f"gap_share/{layer}" for layer in metrics.by_layer(paths)]
        return [shown.in_logs(name) for name in names]

    def _is_logged(self, name):
        return shown.in_logs(name) in self._latest

    def _both_losses(self):
        size = self._batch_size
        return self._losses(self._x, self._y, size), self._losses(*self._test, size)

    def _after(self, steps):
        """What the step that was just made did to the losses."""
        moments, record, probe_before, test_before = self._before
        self._before = None
        probe_loss, test_loss = self._both_losses()
        self._decreases.append((test_before - test_loss, probe_before - probe_loss))
        if self._first_gap is None:
            self._first_gap = test_before - probe_before
        growth = math.nan
        if gap.supported(self.model.optimizer):
            growth = probe.predicted_growth(moments, self.model.optimizer, self._examples)
        self._growth = growth
        self._gap_predicted += steps * growth
        gaps = self._gaps(probe_loss, test_loss)
        test_falls, probe_falls = map(sum, zip(*self._decreases))
        measured = {"osgr_measured": test_falls / probe_falls if probe_falls > 0 else math.nan}
        self._latest |= {shown.in_logs(name): value for name, value in measured.items()}
        self._record(
            record
            | measured
            | gaps
            | {
                "step_probe_decrease": probe_before - probe_loss,
                "step_test_decrease": test_before - test_loss,
                "step_gap_growth_predicted": steps * growth,
            }
        )

    def _gaps(self, probe_loss, test_loss):
        """The gap as it has grown until now, measured and predicted, into the logs."""
        measured = test_loss - probe_loss - self._first_gap
        gaps = {"gap": measured, "gap_predicted": self._gap_predicted}
        self._latest |= {shown.in_logs(name): value for name, value in gaps.items()}
        return gaps

    def _record(self, numbers):
        if self._directory is not None:
            self._directory.append({"epoch": self._epoch, "step": self._step, **numbers})

    def _into(self, logs):
        if logs is not None:
            logs.update(self._latest)

    def _settings(self):
        optimizer = self.model.optimizer
        return {
            "experiment": "callback",
            "model": self.model.name,
            "parameters": self.model.count_params(),
            "optimizer": type(optimizer).__name__,
            "learning_rate": float(tf.convert_to_tensor(optimizer.learning_rate)),
            "probe_examples": data.count(self._x),
            "test_examples": data.count(self._test[0]) if self._test else 0,
            "examples": self._examples,
            "cadence": self.cadence,
            "engine": self._options["engine"],
        }


def _cadence(every_epochs, every_steps, due):
    """Two rules, `epoch -> bool` and `step -> bool`, and their description."""
    given = [v for v in (every_epochs, every_steps, due) if v is not None]
    if len(given) > 1:
        raise ValueError("give one of every_epochs, every_steps and schedule, not several")
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
