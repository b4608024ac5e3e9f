"""What stands between `fit` and the meter of a `GSNRModel`: it empties, shows and records it."""

from __future__ import annotations

import time

import keras
from absl import logging

from tf_gsnr import keras_internals, metrics
from tf_gsnr.training import gap, recorder, rows

# Within an epoch a row is due when this share of the training's time has gone by, and so long.
ROW_SHARE, ROW_SECONDS = 0.05, 10.0


class Epochs(keras.callbacks.Callback):
    """Empties the meter when an epoch begins; shows it when it ends, or says why it cannot.

    It is the first of the callbacks, which all are given the same logs.

    Args:
      training: of `model.py`; what is asked of it: `meter`, `plan`, `given`, `read`, `learn`.
    """

    def __init__(self, training):
        super().__init__()
        self.training = training

    def on_epoch_begin(self, epoch, logs=None):
        if self.training.meter is not None:
            self.training.meter.reset_state()

    def on_epoch_end(self, epoch, logs=None):
        if self.training.meter is None:  # there was no step
            return
        self.training.learn({})
        if logs is not None:
            logs |= {k: float(v) for k, v in self.training.read().items()}
        for reason in self.training.meter.reasons():
            logging.warning("epoch %d: %s", epoch + 1, reason)


class RecordedEpochs(Epochs):
    """The same, which also writes a row at the end of each epoch, and within long ones.

    Args:
      recorder: a `Recorder`.
      measure_every: of the steps.
    """

    def __init__(self, training, recorder, measure_every):
        super().__init__(training)
        self.recorder, self.every = recorder, measure_every

    def on_train_begin(self, logs=None):
        self._before = self._last = time.monotonic()
        self._epoch = 0
        self._first_step = recorder.steps_made(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._epoch = epoch
        self._begin()

    def on_train_batch_end(self, batch, logs=None):
        self._begin()  # as soon as there is a meter, so that what is refused is refused early
        now = time.monotonic()
        if now - self._last < max(ROW_SECONDS, ROW_SHARE * (now - self._before)):
            return
        self._row(logs or {})

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._begin()
        if self.recorder.running:
            self._row(logs or {})

    def _begin(self):
        if self.recorder.running or self.training.meter is None:
            return
        model, plan = self.model, self.training.plan
        settings = recorder.about_training(
            model,
            measured_by="GSNRModel",
            measure_every=self.every,
            pool=self.training.meter_options["pool"],
            parameters_measured=self.training.meter.sample.size,
            **self.training.given,
            seed=keras_internals.global_seed(),
        )
        about = {
            "epochs": self.params.get("epochs"),
            "steps_per_epoch": self.params.get("steps"),
            "optimizer_is_known": gap.supported(model.optimizer),
            "contributions": plan.contributions,
        }
        layers, since = recorder.layers_of(model), self._before
        self.recorder.begin(settings, layers, self._first_step, about, since)

    def _row(self, logs):
        training, model = self.training, self.model
        self._last = time.monotonic()
        reading = training.meter.reading()
        row = {
            "step": recorder.steps_made(model),
            "epoch": self._epoch,
            "learning_rate": recorder.learning_rate(model),
            **rows.of_meter(training.meter, reading),
            "examples": training.meter.known_examples(),
        }
        for name, here in (("loss", "loss"), ("val_loss", "test_loss")):
            if name in logs:
                row[here] = float(logs[name])
        variables, sample = model.trainable_variables, training.meter.sample
        unmeasured = {}
        for path, indices in metrics.by_layer([v.path for v in variables]).items():
            whys = [training.plan.unmeasured.get(id(variables[i])) for i in indices]
            if any(whys):
                unmeasured[path] = next(filter(None, whys))
        histograms = rows.histograms_of_sample(reading.ratios, sample, variables)
        self.recorder.add(
            row, histograms, unmeasured=unmeasured, contributions=training.plan.contributions
        )


def looks_at_batches(callback) -> bool:
    """Whether a callback does something at the end of a batch."""
    names = ("on_batch_end", "on_train_batch_end")
    theirs = [getattr(type(callback), name, None) for name in names]
    same = [t is getattr(keras.callbacks.Callback, name) for t, name in zip(theirs, names)]
    return not all(same) or any(name in vars(callback) for name in names)
