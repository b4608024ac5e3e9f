"""What `GSNRModel` shows: sums over an epoch's steps, and the ratios of these sums.

At each step the parameters are elsewhere, so moments of different steps are not merged: that would
count the parameters' way as variance. What is added up is what each step knows without bias.

Index letters: k measured step (1..K), B its number of examples, j sampled parameter, v variable,
N of training examples. g_j the mean gradient of a step, s2_j the unbiased variance, w_j the number
of parameters for which one stands, tr = sum_j w_j s2_j.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, metrics, shown, significance
from tf_gsnr.training import gap
from tf_gsnr.training.sample import Sample

SHOWN = shown.IN_FIT
MEDIAN_SAMPLE = 2**14  # parameters: sorting all of a large model would cost too much
# Rows of `_sums`: S and V; then, of u_k = B |g|^2 - tr_k and tr_k, what `told_from_zero` asks for.
SIGNAL, NOISE, TRACE, SQUARES, DIAGONAL, PRODUCTS, SIGNALS_SQUARED = range(7)


class Reading(NamedTuple):
    """What a meter has added up: of the model, then of each of its `layers`, `[1 + layers]`.

    Attributes:
      examples, steps: that were measured, together.
      signal, signal_se, noise: S and V of the model, and the standard error of S.
      least: the least `gsnr` of the model that could be told from zero.
      gsnr, same_sign: means over the parameters.
      shares: of each in V.
      dead: how many parameters have no variance, made up from the sample.
      ratios: r_j of the sampled parameters `[k]`, NaN without variance.
    """

    examples: int
    steps: int
    signal: float
    signal_se: float
    noise: float
    least: float
    gsnr: np.ndarray
    same_sign: np.ndarray
    shares: np.ndarray
    dead: np.ndarray
    ratios: np.ndarray


class GSNRMeter(keras.metrics.Metric):
    """Sums over steps of unbiased signals and of variances, apart; ratios where they are read.

    Each step counts by its number of examples: the signal of one is as uncertain as of another.

        S_j = sum_k B (g_j^2 - s2_j / B),   V_j = sum_k B s2_j      per parameter, r_j = S_j / V_j
        S = sum_j w_j S_j,   V = sum_j w_j V_j

        gsnr         mean over j of r_j, parameters without variance left out
        gsnr_median  their median (of a random 16,384, where there are twice as many)
        same_sign    the chance that the gradients of two examples of a step have the same sign, the
                     mean over steps and over parameters where two examples have one
        noise_scale  V / S = tr(Sigma) / |G|^2, in examples
        osgr         S / (S + V / N) = |G|^2 / (|G|^2 + tr(Sigma) / N): (19) for N training examples
        gap_growth   1/N sum_steps sum_j w_j P_j s2_j, (14) accumulated; see `gap.py`

    NaN where the signal cannot be told from zero (`significance.py`), and before the first measured
    step; `reasons` says why.

    Args:
      variables: those that are measured, built.
      names: which of these numbers; see `tf_gsnr.shown`.
      pool: "epoch" sums from the epoch's start, "batch" keeps the last measured step alone.
      bias_corrected: False shows the paper's plain estimates, of sums of g_j^2 and rho2_j and of
        max(n+, n-) / n, untested.
      per_layer: also `gsnr/<layer path>`, the mean over each layer's parameters.
      layers: whether layers are added up one by one, shown or not.
      examples: N, where it is known.
      paths: of the variables, if not their own.
      sample: a `Sample` of their parameters; None for all.
    """

    def __init__(
        self,
        variables,
        names,
        *,
        pool,
        bias_corrected,
        per_layer,
        layers=False,
        examples=None,
        paths=None,
        sample=None,
        name="gsnr_meter",
    ):
        super().__init__(name=name)
        self.shown = tuple(names)
        self._needs = shown.needed(names)
        self._last_only = pool == "batch"
        self._bias_corrected = bias_corrected
        self.sample = sample or Sample([v.shape for v in variables])
        paths = [v.path for v in variables] if paths is None else list(paths)
        groups = metrics.by_layer(paths) if per_layer or layers else {}
        self.layers = list(groups)
        self._layers_shown = self.layers if per_layer else []
        whole = range(len(paths))
        # Which variables belong to the whole model, and to each layer: [1 + layers, variables].
        self._members = np.array(
            [[i in group for i in whole] for group in (whole, *groups.values())], np.float64
        )

        def state(name, shape=(), dtype="int64", value=0):
            initial = keras.initializers.Constant(value)
            return self.add_variable(shape, initial, dtype, "only_first_replica", name)

        self.steps = state("steps")  # training steps since the start
        self.seen = state("seen")  # examples in this epoch
        self.examples = state("examples", value=examples or 0)  # N as told; 0 if not
        # The worst that comparisons with the ordinary gradient found; see `conservation`.
        self.status = state("status", [len(paths)], "int32")
        self._learnt = state("learnt")  # N as counted in the longest epoch so far
        self._gap = state("gap", dtype="float64")  # N times gap_growth
        self._growth = state("growth", dtype="float64", value=np.nan)  # of it, in the last step
        # From here on: since the epoch's start, or of the last measured step.
        self._measured = state("measured")  # K
        self._counted = state("counted")  # examples in these steps
        self._alone = state("alone")  # steps of fewer than two examples
        self._sums = state("sums", [7, len(self._members)], "float64")
        self._agreement = state("agreement", [2, len(self._members)], "float64")
        self._signal = self._noise = None
        if "ratios" in self._needs or groups:
            self._signal = state("signal", [self.sample.size], "float64")
            self._noise = state("noise", [self.sample.size], "float64")

    @property
    def sign_counts(self) -> bool:
        """Whether the moments are to come with sign counts."""
        return "signs" in self._needs

    @property
    def needs_optimizer(self) -> bool:
        """Whether a step of the optimiser is looked at."""
        return "optimizer" in self._needs

    def update_state(self, moments, optimizer, every=1, totals=None, gradients=None):
        """Adds a step.

        Args:
          moments: of the global batch: arrays whose entries are, in order, the sampled parameters.
            What was not measured is NaN. Of fewer than two examples they add nothing.
          optimizer: after the step, for `gap_growth`.
          every: how many steps this one stands for in `gap_growth`.
          totals: float64 `[2, v]`, |g|^2 and the sum over the parameters of `m2`, where they are
            known of whole variables; NaN where they are to be made up from the sample.
          gradients: of the step, if `gap.preconditioner` needs them.
        """
        count = tf.cast(moments.count, tf.float64)
        usable = count > 1
        free = tf.where(usable, 1 / tf.maximum(count - 1, 1), 0)  # 1 / (B - 1); 0: adds nothing
        keep = tf.where(usable, 0.0, 1.0) if self._last_only else tf.constant(1.0)
        keep = tf.cast(keep, tf.float64)
        mean, m2 = (
            arrays.flat([tf.cast(v, tf.float64) for v in values])
            for values in (moments.mean, moments.m2)
        )
        square = tf.square(mean)
        # |g|^2, sum m2 and sum m2^2 of each variable: [v] each.
        squares, spreads, diagonal = (
            self.sample.sums(self.sample.weights * v) for v in (square, m2, tf.square(m2))
        )
        if totals is not None:
            known = tf.math.is_finite(totals) & tf.math.is_finite(squares)
            squares, spreads = tf.unstack(tf.where(known, totals, tf.stack([squares, spreads])))
        if self.needs_optimizer:
            factors = gap.preconditioner(optimizer, gradients, self.sample)
            growth = free * gap.expected(m2, spreads, factors, self.sample)
            self._grow(tf.where(usable, growth, self._growth.value), every)  # else: as before
        # signal B g^2 - s2 = a g^2 - b m2; noise B s2 = c m2. Plain: B g^2 and B rho2 = m2.
        a = tf.where(usable, count, 0)
        b, c = (free, count * free) if self._bias_corrected else (0 * free, tf.where(usable, 1, 0))
        c = tf.cast(c, tf.float64)
        if self._signal is not None:
            for into, added in ((self._signal, a * square - b * m2), (self._noise, c * m2)):
                _add(into, keep, added)
        self._add_sums(squares, spreads, diagonal, a, b, c, free, keep)
        if self.sign_counts:
            share, counted = _agreement(moments, self.sample.weights, self._bias_corrected)
            _add(self._agreement, keep, a * self._added_up([counted * share, counted]))
        one, kept = tf.cast(usable, tf.int64), tf.cast(keep, tf.int64)
        self._measured.assign(kept * self._measured.value + one)
        self._counted.assign(kept * self._counted.value + one * moments.count)
        self._alone.assign_add(1 - one)

    def _added_up(self, values):
        """Sums over the parameters of the model and of each layer, of each of these `[k]`."""
        if not self.layers:
            return tf.reduce_sum(tf.stack(values), axis=1, keepdims=True)
        return tf.matmul(self.sample.sums(tf.stack(values, 1)), self._members, True, True)

    def _grow(self, growth, every):
        self._growth.assign(growth)
        self._gap.assign_add(
            every * tf.where(tf.math.is_nan(growth), tf.zeros_like(growth), growth)
        )

    def _add_sums(self, squares, m2, diagonal, a, b, c, free, keep):
        """S, V and what `significance.told_from_zero` asks for, of the model and of each layer."""
        known = tf.math.is_finite(squares) & tf.math.is_finite(m2)
        values = tf.where(known, tf.stack([squares, m2, diagonal]), 0)
        squares, m2, diagonal = tf.unstack(tf.matmul(values, self._members, transpose_b=True))
        trace = free * m2
        u = a * squares - trace
        rows = [None] * 7
        rows[SIGNAL], rows[NOISE] = a * squares - b * m2, c * m2
        rows[TRACE], rows[SQUARES], rows[DIAGONAL] = trace, trace**2, free**2 * diagonal
        rows[PRODUCTS], rows[SIGNALS_SQUARED] = u * trace, u**2
        _add(self._sums, keep, tf.stack(rows))

    def advance(self, batch):
        """Counts a step of so many examples, measured or not."""
        self.steps.assign_add(1)
        self.seen.assign_add(tf.cast(batch, tf.int64))

    def result(self) -> dict:
        """The numbers, in the order of `shown`; NaN as the class says."""
        known, learnt, seen = (
            tf.convert_to_tensor(v.value) for v in (self.examples, self._learnt, self.seen)
        )
        n = tf.cast(tf.where(known > 0, known, tf.maximum(learnt, seen)), tf.float64)
        sums = tf.convert_to_tensor(self._sums.value)
        told, bound = self._told(sums)
        gap = tf.where(
            tf.math.is_nan(self._growth.value), tf.constant(np.nan, tf.float64), self._gap.value
        )
        means, median = [None], None
        if self._signal is not None:
            means, median = self._ratios(told, bound)
            means = tf.unstack(means)
        added_up = shown.Sums(
            signal=sums[SIGNAL][0],
            noise=sums[NOISE][0],
            told=told[0],
            examples=n,
            mean_ratio=means[0],
            median_ratio=median,
            agreeing=self._agreement.value[0, 0],
            pairs=self._agreement.value[1, 0],
            gap=gap,
        )
        results = {name: shown.NUMBERS[name].in_fit(added_up) for name in self.shown}
        results |= {f"gsnr/{layer}": v for layer, v in zip(self._layers_shown, means[1:])}
        return {name: tf.cast(value, tf.float32) for name, value in results.items()}

    def _told(self, sums):
        """Of the model and of each layer: whether |G|^2 is told from zero, and the bound."""
        if not self._bias_corrected:
            return sums[SIGNAL] > 0, None
        terms = (sums[i] for i in (SIGNAL, TRACE, SQUARES, DIAGONAL))
        n, k = self._examples_and_steps()
        return significance.told_from_zero(*terms, n, k, (sums[PRODUCTS], sums[SIGNALS_SQUARED]))

    def _examples_and_steps(self):
        counts = (self._counted, self._measured)
        return (tf.cast(tf.maximum(v.value, 1), tf.float64) for v in counts)

    def _ratios(self, told, bound):
        """Means over the model and over each layer `[1 + layers]`, and the model's median."""
        pair = (tf.convert_to_tensor(v.value) for v in (self._signal, self._noise))
        ratios = arrays.divide(*pair, np.nan)
        alive = ~tf.math.is_nan(ratios)
        weights = tf.where(alive, self.sample.weights, 0)
        sums = self.sample.sums(tf.stack([tf.where(alive, weights * ratios, 0), weights], 1))
        totals, counts = tf.unstack(tf.matmul(self._members, sums), axis=1)
        means = arrays.divide(totals, counts, np.nan)
        if self._bias_corrected:
            told &= significance.mean_told_from_zero(means, bound, *self._examples_and_steps())
        means = tf.where(told, means, np.nan)
        if self.sample.size > 2 * MEDIAN_SAMPLE:
            some = np.random.default_rng(0).choice(self.sample.size, MEDIAN_SAMPLE, replace=False)
            ratios, weights = tf.gather(ratios, some), tf.gather(weights, some)
        return means, tf.where(told[0], arrays.weighted_median(ratios, weights), np.nan)

    def known_examples(self) -> int:
        """N: as told, or as counted in the longest epoch so far."""
        told, learnt, seen = (int(v.numpy()) for v in (self.examples, self._learnt, self.seen))
        return told or max(learnt, seen)

    def reading(self) -> Reading:
        """All that is known, layer by layer; outside a graph."""
        sums, agreement = self._sums.numpy(), self._agreement.numpy()
        examples, steps = (float(v) for v in self._examples_and_steps())
        told, bound = self._told(tf.convert_to_tensor(self._sums.value))
        signal, noise = self._signal.numpy(), self._noise.numpy()
        ratios = arrays.divide(signal, noise, np.nan)
        means, _ = self._ratios(told, bound)
        weights = self.sample.weights
        dead = np.bincount(
            self.sample.owner, np.where(noise == 0, weights, 0), self._members.shape[1]
        )
        least = error = np.nan
        if bound is not None and examples > steps + 2:
            least = float(significance.least_mean(float(bound[0]), examples, steps))
            error = float(bound[0]) / 2 * sums[TRACE, 0]
            if steps < significance.STEPS:  # the bound is of no signal: what there is adds to it
                signal, trace = max(sums[SIGNAL, 0], 0), sums[TRACE, 0]
                more = 4 * signal * trace / steps / significance.DIRECTIONS
                error = float(np.hypot(error, np.sqrt(more)))
        return Reading(
            examples=int(self._counted.numpy()),
            steps=int(self._measured.numpy()),
            signal=sums[SIGNAL, 0],
            signal_se=error,
            noise=sums[NOISE, 0],
            least=least,
            gsnr=means.numpy(),
            same_sign=arrays.divide(*agreement, np.nan),
            shares=arrays.divide(sums[NOISE], sums[NOISE, 0], np.nan),
            dead=self._members @ dead,
            ratios=ratios,
        )

    @property
    def result_names(self) -> list:
        return [*self.shown, *(f"gsnr/{layer}" for layer in self._layers_shown)]

    def reasons(self) -> list:
        """Why what is NaN is NaN, a line for each reason; at an epoch's end, outside a graph."""
        steps, counted, alone = (
            int(v.numpy()) for v in (self._measured, self._counted, self._alone)
        )
        groups = {f"gsnr/{layer}": i for i, layer in enumerate(self.layers, 1)}
        varied = self._sums.numpy()[NOISE] > 0
        by_reason = {}
        for name, value in self.result().items():
            if not np.isnan(value):
                continue
            if alone and not steps:
                why = (
                    "a step of one example has no variance; take a batch_size of 2 or more, or "
                    "measure with GSNRCallback"
                )
            elif not steps:
                why = "no step was measured"
            elif name == "gap_growth":
                why = "no growth is known of any step so far"
            elif not varied[groups.get(name, 0)]:
                why = significance.NOTHING_VARIES
            elif name == "same_sign":
                why = "no parameter has a gradient for two examples of a step"
            else:
                why = (
                    f"{significance.why_not_told(counted, steps)}; larger or more batches tell "
                    "more, as does GSNRCallback on a large probe set"
                )
            by_reason.setdefault(why, []).append(name)
        return [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]

    def reset_state(self):
        """At an epoch's start: the sums are emptied, what counts from the start is kept."""
        self._learnt.assign(tf.maximum(self._learnt.value, self.seen.value))
        self.seen.assign(0)
        self._empty()

    def _empty(self):
        sums = [self._measured, self._counted, self._alone, self._sums, self._agreement]
        for variable in (*sums, self._signal, self._noise):
            if variable is not None:
                variable.assign(tf.zeros(variable.shape, variable.dtype))

    def forget(self):
        """Takes back all that was measured, of steps of which that turns out to have been wrong."""
        self._empty()
        self._gap.assign(0)
        self._growth.assign(np.nan)

    def save_own_variables(self, store):
        for name in _KEPT:
            store[name.strip("_")] = getattr(self, name).numpy()

    def load_own_variables(self, store):
        there = set(store.keys())  # none in the file of a model that was not watched
        for name in _KEPT:
            if name.strip("_") in there:
                getattr(self, name).assign(store[name.strip("_")][()])


_KEPT = ("steps", "_learnt", "_gap", "_growth")


def _add(variable, keep, added):
    """`keep` 0 forgets what was there, NaN too."""
    before = tf.convert_to_tensor(variable.value)
    variable.assign(tf.math.multiply_no_nan(before, keep) + added)


def _agreement(moments, weights, bias_corrected):
    """Per parameter `metrics.same_sign`, and for how many it counts; float64 `[k]`."""
    positive, negative = (
        arrays.flat([tf.cast(v, tf.float32) for v in counts])
        for counts in (moments.positives, moments.negatives)
    )
    n = positive + negative
    if bias_corrected:
        pairs = n * n - n
        apart = 2 * tf.math.divide_no_nan(positive * negative, pairs)
        share, there = 1 - apart, pairs > 0
    else:
        share, there = tf.math.divide_no_nan(tf.maximum(positive, negative), n), n > 0
    return tf.cast(share, tf.float64), tf.where(there, weights, 0)
