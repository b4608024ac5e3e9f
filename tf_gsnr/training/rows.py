"""A row of a training's records: from moments, or from the meter's sums, to flat numbers.

One name means one thing, whichever of the two it comes from; `shown.NUMBERS` has most of them:

    step, epoch             steps done before the measurement; the epoch it falls in, from 0
    seconds                 since training began
    learning_rate, loss, test_loss
    count                   examples behind the numbers
    batch_size              of a step, where it is known
    gsnr/mean, gsnr/median, gsnr/p95, same_sign/mean, noise_scale, osgr_predicted...
    gsnr/least              the least `gsnr/mean` that could be told from zero
    ..._se                  standard error of the number named before
    <number>/<layer path>   gsnr, same_sign, dead (a count), gap_share of each layer

Index letters: j parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tf_gsnr import arrays, metrics, significance
from tf_gsnr.moments import Moments

# log10 of GSNR: what lies beyond counts in the outermost of these bins.
EDGES = np.round(np.arange(-8, 4.01, 0.25), 2)


def of_moments(moments: Moments, model, examples: int, ratios=None) -> dict:
    """The row of a probe set's moments; as `metrics.summarize`, and of each layer, in a few passes.

    Args:
      moments: numpy arrays, of at least two examples.
      model: for the names of layers.
      examples: N, the number of training examples.
      ratios: `metrics.gsnr(moments)`, if they are known.
    """
    ratios = metrics.gsnr(moments) if ratios is None else ratios
    groups = metrics.by_layer([v.path for v in model.trainable_variables])
    sums = _sums(moments, ratios, [range(len(ratios)), *groups.values()])
    n = float(moments.count)
    signal = sums.square - sums.trace / n  # |G|^2
    told, bound = significance.told_from_zero(
        n * signal, sums.trace, sums.trace**2, sums.diagonal, n, 1
    )
    means = arrays.divide(sums.ratio, sums.alive, np.nan)
    shown = np.where(told & significance.mean_told_from_zero(means, bound, n, 1), means, np.nan)
    whole = np.concatenate([np.ravel(r) for r in ratios])
    whole = whole[~np.isnan(whole)]
    median, p95 = np.quantile(whole, [0.5, 0.95]) if whole.size else (np.nan, np.nan)
    hidden = np.isnan(shown[0])
    noise = sums.trace[0] / examples
    se = significance.signal_se(signal[0], sums.trace[0], sums.diagonal[0], n)
    row = {
        "count": int(moments.count),
        "loss": float(moments.loss),
        "gsnr/mean": shown[0],
        "gsnr/median": np.nan if hidden else median,
        "gsnr/p95": np.nan if hidden else p95,
        "gsnr/least": significance.least_mean(bound[0], n, 1),
        "gsnr_plain/mean": (means[0] + 1 / n) * n / (n - 1),  # rho2 = s2 (n - 1) / n
        "noise_scale": sums.trace[0] / signal[0] if told[0] else np.nan,
        "osgr_predicted": signal[0] / (signal[0] + noise) if told[0] else np.nan,
        "osgr_predicted_se": significance.osgr_se(signal[0], noise, se) if told[0] else np.nan,
        "parameters": int(sums.size[0]),
        "dead": int(sums.dead[0]),
    }
    agreement = arrays.divide(sums.agreeing, sums.signed, np.nan)
    shares = arrays.divide(sums.trace, sums.trace[0], np.nan)
    if moments.positives:
        row["same_sign/mean"] = agreement[0]
    for i, layer in enumerate(groups, 1):
        row[f"gsnr/{layer}"] = shown[i]
        if moments.positives:
            row[f"same_sign/{layer}"] = agreement[i]
        row[f"gap_share/{layer}"] = shares[i] if sums.known[i] else np.nan
        row[f"dead/{layer}"] = int(sums.dead[i])
    return {k: v if isinstance(v, int) else float(v) for k, v in row.items()}


class _Sums(NamedTuple):
    """Sums over the parameters of groups of variables, `[groups]` each.

    Attributes:
      square, trace, diagonal: of g_j^2, s2_j and s2_j^2.
      ratio, alive: of r_j, and over how many.
      agreeing, signed: of `metrics.same_sign`, and over how many.
      size, dead: how many there are, and without variance.
      known: how many variables were measured.
    """

    square: np.ndarray
    trace: np.ndarray
    diagonal: np.ndarray
    ratio: np.ndarray
    alive: np.ndarray
    agreeing: np.ndarray
    signed: np.ndarray
    size: np.ndarray
    dead: np.ndarray
    known: np.ndarray


def _sums(moments, ratios, groups) -> _Sums:
    """Over groups, lists of indices of variables; what is NaN was not measured and is left out."""
    agreement = metrics.same_sign(moments) if moments.positives else [np.zeros(0)] * len(ratios)
    free = float(moments.count) - 1
    of_variables = []
    for mean, m2, ratio, share in zip(moments.mean, moments.m2, ratios, agreement):
        mean, s2 = (np.asarray(v, np.float64).ravel() for v in (mean, m2))
        s2 = s2 / free
        known = np.isfinite(s2.sum())
        terms = (mean @ mean, s2.sum(), s2 @ s2) if known else (0.0, 0.0, 0.0)
        alive, signed = ~np.isnan(ratio), ~np.isnan(share)
        pairs = [
            (np.sum(v, where=there), there.sum()) for v, there in ((ratio, alive), (share, signed))
        ]
        dead = np.count_nonzero(s2 == 0)
        of_variables.append([*terms, *pairs[0], *pairs[1], s2.size, dead, known])
    table = np.array(of_variables, np.float64)
    return _Sums(*np.array([table[list(group)].sum(axis=0) for group in groups]).T)


def of_meter(meter, reading) -> dict:
    """The row of what a `GSNRMeter` has added up in `fit`; `reading` is its."""
    shown = {name: float(value) for name, value in meter.result().items()}
    steps = max(reading.steps, 1)
    row = {
        "count": reading.examples,
        "batch_size": reading.examples / steps,
        "steps_measured": reading.steps,
        "gsnr/mean": float(reading.gsnr[0]),
        "gsnr/least": reading.least,
        "same_sign/mean": float(reading.same_sign[0]),
        "dead": round(float(reading.dead[0])),
        "parameters": int(meter.sample.weights.sum().round()),
    }
    names = {"gsnr_median": "gsnr/median", "noise_scale": "noise_scale", "osgr": "osgr_predicted"}
    names["gap_growth"] = "gap_predicted"
    row |= {there: shown[name] for name, there in names.items() if name in shown}
    if "osgr" in shown and reading.signal > 0:
        noise = reading.signal * (1 / shown["osgr"] - 1)  # V / N
        row["osgr_predicted_se"] = significance.osgr_se(reading.signal, noise, reading.signal_se)
    for i, layer in enumerate(meter.layers, 1):
        row[f"gsnr/{layer}"] = float(reading.gsnr[i])
        if meter.sign_counts:
            row[f"same_sign/{layer}"] = float(reading.same_sign[i])
        row[f"gap_share/{layer}"] = float(reading.shares[i])
        row[f"dead/{layer}"] = round(float(reading.dead[i]))
    return row


def histograms_of_moments(ratios: list, model) -> dict:
    """Per layer, how many parameters have a GSNR in each bin of `EDGES`.

    Corrected GSNR of parameters without signal is above or below zero by chance: what is below, and
    what has no variance, is in no bin.

    Args:
      ratios: `metrics.gsnr` of the moments.
    """
    paths = [v.path for v in model.trainable_variables]
    return {
        layer: _counts(np.concatenate([np.ravel(ratios[i]) for i in indices]))
        for layer, indices in metrics.by_layer(paths).items()
    }


def histograms_of_sample(ratios, sample, variables) -> dict:
    """The same of sampled parameters' ratios `[k]`, each as often as it stands for others."""
    groups = metrics.by_layer([v.path for v in variables])
    counts = {}
    for layer, indices in groups.items():
        there = np.isin(sample.owner, indices)
        counts[layer] = _counts(ratios[there], sample.weights[there])
    return counts


def _counts(ratios, weights=None):
    positive = np.isfinite(ratios) & (ratios > 0)
    logarithms = np.clip(np.log10(ratios[positive]), EDGES[0], EDGES[-1])
    weights = None if weights is None else weights[positive]
    return [round(float(n)) for n in np.histogram(logarithms, EDGES, weights=weights)[0]]
