"""What `GSNRModel` shows: a Keras metric whose state is Moments, and whose results are ratios.

Index letters: n the number of examples in the moments, j parameter, N of training examples.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, metrics
from tf_gsnr.moments import Moments
from tf_gsnr.training import gap

SHOWN = ("gsnr", "gsnr_median", "same_sign", "noise_scale", "osgr", "gap_growth")
MEDIAN_SAMPLE = 16384  # parameters: sorting all of a large model at every step would cost too much


class GSNRMeter(keras.metrics.Metric):
    """A Keras metric over `Moments`: they are merged first, ratios are formed from the whole.

        gsnr         mean over j of r_j (25), parameters without variance left out
        gsnr_median  their median (of at most 16,384 evenly spaced ones)
        same_sign    mean over j of max(n+, n-) / (n+ + n-)
        noise_scale  tr(Sigma) / |G|^2, in examples
        osgr         |G|^2 / (|G|^2 + tr(Sigma) / N), which is (19) for the N training examples
        gap_growth   1/N sum_steps sum_j P_j rho2_j, (14) accumulated; see `gap.py`

    Args:
      network: the model that is measured, built.
      shown: which of these.
      pool: "epoch" merges the batches of an epoch, "batch" keeps the last.
      bias_corrected: whether the estimates are unbiased at small n: r_j = g_j^2 / s2_j - 1/n and
        |G|^2 = |g|^2 - sum_j s2_j / n, s2 with ddof 1.
      per_layer: also `gsnr/<layer path>`, the mean over each layer's parameters.
      examples: N, where it is known.
    """

    def __init__(
        self, network, shown, *, pool, bias_corrected, per_layer, examples=None, name="gsnr_meter"
    ):
        super().__init__(name=name)
        self.shown = tuple(shown)
        self._pool = pool
        self._bias_corrected = bias_corrected
        measured = network.trainable_variables
        self._indices = _by_layer(measured) if per_layer else {}

        def scalar(name, dtype="float32", value=0):
            initial = keras.initializers.Constant(value)
            return self.add_variable((), initial, dtype, "only_first_replica", name)

        def state(name, dtype=None):
            return [
                self.add_variable(
                    v.shape, "zeros", dtype or v.dtype, "only_first_replica", f"{name}_{index}"
                )
                for index, v in enumerate(measured)
            ]

        self.steps = scalar("steps", "int64")  # training steps since the start
        self.seen = scalar("seen", "int64")  # examples in this epoch
        self.examples = scalar("examples", "int64", examples or 0)  # N as told; 0 if not
        self._learnt = scalar("learnt", "int64")  # N as counted in the longest epoch so far
        self._gap = scalar("gap", "float64")  # N times gap_growth
        names = [*self._ratios(), *(f"gsnr/{layer}" for layer in self._indices)]
        self._last = {k: scalar(k.replace("/", "_"), value=np.nan) for k in names}
        self._count = scalar("count", "int64")
        self._mean, self._m2 = [], []
        if pool == "epoch":
            self._mean, self._m2 = state("mean"), state("m2")
        signs = pool == "epoch" and self.sign_counts
        self._positives, self._negatives = [
            state(k, "int64") if signs else [] for k in ("positives", "negatives")
        ]

    @property
    def sign_counts(self) -> bool:
        """Whether the moments are to come with sign counts."""
        return "same_sign" in self.shown

    def _ratios(self):
        names = {"gsnr": ["gsnr"], "gsnr_median": ["gsnr_median"], "same_sign": ["same_sign"]}
        names |= {"noise_scale": ["trace", "signal"], "osgr": ["trace", "signal"]}
        return dict.fromkeys(name for k in self.shown for name in names.get(k, []))

    def update_state(self, moments: Moments, optimizer, every: int = 1):
        """Merges a batch's moments and forms the ratios anew.

        Args:
          moments: of the global batch.
          optimizer: after the step, for `gap_growth`.
          every: how many steps this one stands for.
        """
        if "gap_growth" in self.shown:
            factors = gap.preconditioner(optimizer, moments.mean)
            self._gap.assign_add(every * gap.expected(moments.variance(1), factors))
        if self._pool == "epoch":
            moments = self._merged(moments)
        ddof = 1 if self._bias_corrected else 0
        variance = moments.variance(ddof)
        if any(k in self._last for k in ("gsnr", "gsnr_median")) or self._indices:
            ratios = metrics.gsnr(moments, self._bias_corrected)
            self._form("gsnr", lambda: arrays.mean(arrays.flat(ratios)))
            self._form("gsnr_median", lambda: arrays.quantile(_spaced(ratios), 0.5))
            for layer, indices in self._indices.items():
                of_layer = arrays.flat([ratios[i] for i in indices])
                self._form(f"gsnr/{layer}", lambda values=of_layer: arrays.mean(values))
        if "same_sign" in self._last:
            self._form("same_sign", lambda: arrays.mean(arrays.flat(metrics.same_sign(moments))))
        if "trace" in self._last:
            trace = arrays.total(variance)
            signal = arrays.total([g**2 for g in moments.mean])
            if self._bias_corrected:
                signal -= trace / tf.cast(moments.count, signal.dtype)
            self._last["trace"].assign(trace)
            self._last["signal"].assign(signal)

    def _form(self, name, value):
        if name in self._last:
            self._last[name].assign(value())

    def _merged(self, moments):
        def values(variables):
            return [tf.convert_to_tensor(v.value) for v in variables]

        before = Moments(
            tf.convert_to_tensor(self._count.value),
            tf.zeros([], tf.float64),
            *map(values, (self._mean, self._m2, self._positives, self._negatives)),
        )
        after = before.merge(moments)
        self._count.assign(after.count)
        for name in ("mean", "m2", "positives", "negatives"):
            for variable, value in zip(getattr(self, f"_{name}"), getattr(after, name)):
                variable.assign(value)
        return after

    def advance(self, batch):
        """Counts a step of so many examples, measured or not."""
        self.steps.assign_add(1)
        self.seen.assign_add(tf.cast(batch, tf.int64))

    def result(self) -> dict:
        """The latest numbers, in the order of `shown`; NaN before the first measured step."""
        known, learnt, seen = (
            tf.convert_to_tensor(v.value) for v in (self.examples, self._learnt, self.seen)
        )
        n = tf.cast(tf.where(known > 0, known, tf.maximum(learnt, seen)), tf.float32)
        results = {}
        for name in self.shown:
            if name == "gap_growth":
                results[name] = tf.cast(self._gap.value, tf.float32) / n
            elif name in ("noise_scale", "osgr"):
                trace, signal = (tf.convert_to_tensor(self._last[k]) for k in ("trace", "signal"))
                if name == "osgr":
                    results[name] = arrays.divide(signal, signal + trace / n, np.nan)
                else:
                    results[name] = arrays.divide(trace, tf.maximum(signal, 0.0), np.inf)
            else:
                results[name] = tf.convert_to_tensor(self._last[name])
        for layer in self._indices:
            results[f"gsnr/{layer}"] = tf.convert_to_tensor(self._last[f"gsnr/{layer}"])
        return results

    @property
    def result_names(self) -> list:
        return [*self.shown, *(f"gsnr/{layer}" for layer in self._indices)]

    def reset_state(self):
        """At an epoch's start: the moments are emptied, what counts from the start is kept."""
        self._learnt.assign(tf.maximum(self._learnt.value, self.seen.value))
        for variable in [self.seen, self._count, *self._mean, *self._m2]:
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        for variable in [*self._positives, *self._negatives]:
            variable.assign(tf.zeros(variable.shape, variable.dtype))

    def save_own_variables(self, store):
        for name in ("steps", "_learnt", "_gap"):
            store[name.strip("_")] = getattr(self, name).numpy()

    def load_own_variables(self, store):
        for name in ("steps", "_learnt", "_gap"):
            getattr(self, name).assign(store[name.strip("_")][()])


def _by_layer(variables) -> dict:
    layers = {}
    for index, variable in enumerate(variables):
        layers.setdefault(variable.path.rpartition("/")[0] or variable.path, []).append(index)
    return layers


def _spaced(ratios):
    """At most `MEDIAN_SAMPLE` of all entries, evenly spaced, in one vector."""
    size = sum(int(np.prod(r.shape)) for r in ratios)
    stride = -(-size // MEDIAN_SAMPLE)
    return arrays.flat([tf.reshape(r, [-1])[::stride] for r in ratios])
