"""`GSNRCallback`: measures an ordinary Keras model on a fixed set of examples while it trains.

What it measures is in `probe.py`, when in `schedule.py`.
"""

from __future__ import annotations

import math
import platform

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import tf_gsnr
from tf_gsnr import gradients
from tf_gsnr.metrics import ratio_of_sums
from tf_gsnr.records import RunDirectory
from tf_gsnr.training import gap, probe, schedule, tensorboard


class GSNRCallback(keras.callbacks.Callback):
    """Measures GSNR on a fixed probe set, at fixed parameters, and touches nothing.

    The training is bit for bit the one without it. What it finds goes into the logs, where History,
    CSVLogger, TensorBoard, EarlyStopping and so on see it: put it before them in `callbacks`.

        gsnr/mean, gsnr/median, gsnr/p95         GSNR of the parameters (25)
        gsnr_corrected/mean, .../median          free of the bias 1/n of a probe set of n examples
        gsnr/same_sign, gsnr/noise_scale, gsnr/osgr_predicted, gsnr/dead         see `summarize`

    With `test_data` also, for one step of the real optimiser at each measurement, by the losses
    before and after it:

        gsnr/osgr_measured    decrease of the test loss over that of the probe's, (23); a ratio of
                              sums over the epoch's measured steps
        gsnr/osgr_predicted   (19) for N training examples, from the gradients before the step
        gsnr/gap              test loss minus the probe's loss, after the step
        gsnr/gap_predicted    (14) added up over all steps so far; each step that is not measured
                              counts as the last that was. For optimisers with a diagonal
                              preconditioner an approximation, see `gap.py`

    The probe set then stands for the training set: give training examples, all or a random part.

    Until something is measured the logs say NaN, and between measurements the last numbers stay.

    Args:
      x, y: the probe set, arrays.
      sample_weight: `[examples]` factors of the examples' losses.
      every_epochs: measure at the end of every so many-th epoch; the default is 1.
      every_steps: measure before step 0, k, 2k, ...
      schedule: measure before the steps that it names: `linear`, `logarithmic` or `listed` of
        `tf_gsnr.training.schedule`, or any callable `step -> bool`. Give one of the three only.
      test_data: `(x, y)` that are not trained on.
      examples: N, the number of training examples; default: the size of the probe set.
      per_layer: also `gsnr/<variable path>` and `gsnr/gap_share/<layer>`.
      sign_counts: whether to measure `same_sign`.
      run_dir: a directory for config.json and records.jsonl, as the experiments write.
      overwrite: whether an earlier run in `run_dir` may be thrown away.
      log_dir: a directory for TensorBoard, with histograms of the parameters' GSNR per variable.
      loss, engine, batch_size, training, batch_norm, seed, jit_compile: of `gradient_moments`.

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
        y,
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
        **options,
    ):
        super().__init__()
        self._x, self._y = _arrays("x", x), _arrays("y", y)
        self._test = test_data
        if test_data is not None and (
            not isinstance(test_data, (tuple, list)) or len(test_data) != 2
        ):
            raise ValueError("test_data: expected a pair (x, y) of arrays")
        self._due_epoch, self._due_step, self.cadence = _cadence(
            every_epochs, every_steps, schedule
        )
        unknown = set(options) - set(_OPTIONS)
        if unknown:
            raise ValueError(f"unknown arguments {sorted(unknown)}; available: {list(_OPTIONS)}")
        gradients.check_engine_name(options.get("engine", "auto"))
        self._options = dict(options, sample_weight=sample_weight, sign_counts=sign_counts)
        self._batch_size = options.get("batch_size", 256)
        self._examples = examples or len(tf.nest.flatten(self._y)[0])
        self._per_layer = per_layer
        self._run_dir, self._overwrite, self._log_dir = run_dir, overwrite, log_dir
        self._directory = self._writer = self._losses = None
        self._step = 0  # steps done since the start of all training
        self._latest = {}
        self._before = None  # (moments, record, probe loss, test loss) before the measured step
        self._decreases = []  # of the (test, probe) loss in this epoch's measured steps
        self._growth = 0.0  # predicted, per step
        self._gap_predicted = 0.0

    def on_train_begin(self, logs=None):
        if self.model.loss is None and self._options.get("loss") is None:
            raise ValueError("the model is not compiled with a loss: pass loss= to GSNRCallback")
        probe.check_fits(self.model, self._x, "x")
        if self._test is not None:
            probe.check_fits(self.model, self._test[0], "test_data")
            self._losses = probe.loss_function(self.model, self._options.get("loss"))
            if not gap.supported(self.model.optimizer):
                logging.info("gsnr/gap_predicted is not known for this optimiser")
        if self._run_dir is not None and self._directory is None:
            self._directory = RunDirectory(
                self._run_dir, self._settings(), overwrite=self._overwrite
            )
            self._directory.write_config(_environment())
        if self._log_dir is not None and self._writer is None:
            self._writer = tensorboard.open_writer(self._log_dir)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._decreases = []
        self._epoch_step = self._due_epoch(epoch + 1) and self._test is not None

    def on_train_batch_begin(self, batch, logs=None):
        due = self._due_step(self._step)
        if due or self._epoch_step:
            found = self._measure(record=due and self._test is None)
            if self._test is not None:
                self._before = (*found, *self._both_losses())
        self._epoch_step = False
        self._batch = batch

    def on_train_batch_end(self, batch, logs=None):
        steps = batch - self._batch + 1  # more than one with steps_per_execution
        self._step += steps
        if self._before is not None:
            self._after(steps)
        self._gap_predicted += steps * self._growth
        if self._test is not None and "gsnr/gap" in self._latest:
            self._latest["gsnr/gap_predicted"] = self._gap_predicted
        self._into(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._due_epoch(epoch + 1):
            self._measure(record=True)
        self._into(logs)

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.flush()

    def _measure(self, record: bool):
        try:
            moments, found = probe.measure(self.model, self._x, self._y, **self._options)
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(
                f"the probe set does not fit model {self.model.name!r}: {error.message}"
            ) from error
        if self._test is not None:
            found["osgr_predicted"] = probe.osgr_for(moments, self._examples)
        self._latest |= {_log_name(k): v for k, v in found.items() if self._is_logged(k)}
        if record:
            self._record(found)
        if self._writer is not None:
            tensorboard.write_tensorboard(
                self._writer, moments, self.model, self._step, record=found
            )
        return moments, found

    def _is_logged(self, name):
        of_a_layer = name.startswith(("gsnr/", "gap_share/"))
        return name in _LOGGED or self._per_layer and of_a_layer

    def _both_losses(self):
        size = self._batch_size
        return self._losses(self._x, self._y, size), self._losses(*self._test, size)

    def _after(self, steps):
        """What the step that was just made did to the losses."""
        moments, found, probe_before, test_before = self._before
        self._before = None
        probe_loss, test_loss = self._both_losses()
        self._decreases.append((test_before - test_loss, probe_before - probe_loss))
        measured = {
            "osgr_measured": ratio_of_sums(*zip(*self._decreases))[0],
            "gap": test_loss - probe_loss,
        }
        self._latest |= {_log_name(name): value for name, value in measured.items()}
        growth = math.nan
        if gap.supported(self.model.optimizer):
            growth = probe.predicted_growth(moments, self.model.optimizer, self._examples)
        self._growth = growth
        self._record(
            found
            | measured
            | {
                "step_probe_decrease": probe_before - probe_loss,
                "step_test_decrease": test_before - test_loss,
                "step_gap_growth_predicted": steps * growth,
                "gap_predicted": self._gap_predicted + steps * growth,
            }
        )

    def _record(self, found):
        if self._directory is not None:
            self._directory.append({"epoch": self._epoch, "step": self._step, **found})

    def _into(self, logs):
        if logs is None:
            return
        if not self._latest:
            names = ["gsnr/mean", "gsnr/median", "gsnr/p95", "gsnr_corrected/mean"]
            logs.update(dict.fromkeys(names, math.nan))
        logs.update(self._latest)

    def _settings(self):
        optimizer = self.model.optimizer
        return {
            "experiment": "callback",
            "model": self.model.name,
            "parameters": self.model.count_params(),
            "optimizer": type(optimizer).__name__,
            "learning_rate": float(tf.convert_to_tensor(optimizer.learning_rate)),
            "probe_examples": len(tf.nest.flatten(self._y)[0]),
            "test_examples": len(tf.nest.flatten(self._test[1])[0]) if self._test else 0,
            "examples": self._examples,
            "cadence": self.cadence,
            "engine": self._options.get("engine", "auto"),
        }


_OPTIONS = (
    "loss",
    "engine",
    "batch_size",
    "training",
    "batch_norm",
    "seed",
    "jit_compile",
    "dtype",
)
_LOGGED = (  # all that is measured would bury the loss in the progress bar
    "gsnr/mean",
    "gsnr/median",
    "gsnr/p95",
    "gsnr_corrected/mean",
    "gsnr_corrected/median",
    "same_sign/mean",
    "noise_scale",
    "osgr_predicted",
    "dead",
)


def _log_name(name):
    name = "same_sign" if name == "same_sign/mean" else name
    return name if name.startswith("gsnr") else f"gsnr/{name}"


def _cadence(every_epochs, every_steps, due):
    """Two rules, `epoch -> bool` and `step -> bool`, and their description."""
    given = [v for v in (every_epochs, every_steps, due) if v is not None]
    if len(given) > 1:
        raise ValueError("give one of every_epochs, every_steps and schedule, not several")
    for name, value in (("every_epochs", every_epochs), ("every_steps", every_steps)):
        if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
            raise ValueError(f"{name}={value!r}: expected a positive integer")
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


def _arrays(name, value):
    if value is None or isinstance(value, tf.data.Dataset):
        raise ValueError(f"{name}={value!r}: expected arrays, a fixed set of examples")
    return tf.nest.map_structure(lambda v: v if tf.is_tensor(v) else np.asarray(v), value)


def _environment():
    devices = [device.device_type for device in tf.config.list_logical_devices()]
    return {
        "versions": {
            "tf_gsnr": tf_gsnr.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
        "devices": devices,
    }
