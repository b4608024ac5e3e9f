"""`ProgressBar`: Keras's own, with a few of our numbers instead of all."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from tf_gsnr import checks, shown

NUMBERS = ("gsnr", "osgr", "gsnr/mean", "gsnr/osgr_predicted")


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, on one line: of the numbers of this package it shows these only.

    `GSNRModel` puts it in by itself (its argument `progress`). Beside a `GSNRCallback` give it to
    `fit`, after the callback; History and all other callbacks see all numbers as ever.

    Args:
      numbers: which of the names in the logs to show.

    Raises:
      ValueError: a name that is none of ours.

    Example:

    >>> bar = ProgressBar(["gsnr/mean"])
    >>> bar.without_others({"loss": 1.0, "gsnr/mean": 0.1, "gsnr/noise_scale": 8.0})
    {'loss': 1.0, 'gsnr/mean': 0.1}
    """

    async_safe = True  # as Keras takes its own to be

    def __init__(self, numbers: tuple = NUMBERS):
        super().__init__()
        check("numbers", numbers)
        self._numbers = frozenset(numbers)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, self.without_others(logs))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, self.without_others(logs))

    def without_others(self, logs) -> dict:
        """What the bar shows of these logs."""
        if logs is not None:
            checks.instance("logs", logs, Mapping, "a dict of numbers, or None")
        return {k: v for k, v in (logs or {}).items() if k in self._numbers or not is_ours(k)}


def is_ours(name: str) -> bool:
    """Whether it is the name of a number of this package, in `fit` or in a callback's logs."""
    return name in shown.IN_FIT or name.startswith(("gsnr/", "gsnr_plain/"))


def check(argument: str, numbers):
    """Raises ValueError for what is no list of names of ours."""
    expected = f"a tuple of {', '.join(shown.IN_FIT)}, or names that begin with gsnr/"
    checks.names(argument, numbers, is_ours, expected)
