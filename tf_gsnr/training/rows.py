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

import numpy as np

from tf_gsnr import arrays, metrics
from tf_gsnr.moments import Moments

# log10 of GSNR: what lies beyond counts in the outermost of these bins.
EDGES = np.round(np.arange(-8, 4.01, 0.25), 2)
PLAIN = ("gsnr_plain/mean",)  # of the paper's estimates, what records have


def of_moments(moments: Moments, model, examples: int) -> dict:
    """The row of a probe set's moments.

    Args:
      moments: numpy arrays, of at least two examples.
      model: for the names of layers.
      examples: N, the number of training examples.
    """
    paths = [v.path for v in model.trainable_variables]
    record = metrics.summarize(moments, model)
    of_variables = {f"gsnr/{path}" for path in paths}
    row = {
        name: value
        for name, value in record.items()
        if name not in of_variables and ("plain" not in name or name in PLAIN)
    }
    row["osgr_predicted"] = metrics.osgr(moments, examples)
    row["osgr_predicted_se"] = metrics.osgr_se(moments, examples)
    row["gsnr/least"] = metrics.least_mean(moments)
    for layer, indices in metrics.by_layer(paths).items():
        part = metrics.part_of(moments, indices)
        row[f"gsnr/{layer}"] = metrics.mean_gsnr(part)
        if part.positives:
            row[f"same_sign/{layer}"] = arrays.mean(arrays.flat(metrics.same_sign(part)))
        row[f"dead/{layer}"] = int(sum(np.sum(v == 0) for v in part.m2))
    return row


def of_meter(meter) -> dict:
    """The row of what a `GSNRMeter` has added up in `fit`."""
    reading = meter.reading()
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
        whole = (reading.signal + noise) ** 2
        row["osgr_predicted_se"] = reading.signal_se * noise / whole
    for i, layer in enumerate(meter.layers, 1):
        row[f"gsnr/{layer}"] = float(reading.gsnr[i])
        if meter.sign_counts:
            row[f"same_sign/{layer}"] = float(reading.same_sign[i])
        row[f"gap_share/{layer}"] = float(reading.shares[i])
        row[f"dead/{layer}"] = round(float(reading.dead[i]))
    return row


def histograms_of_moments(moments: Moments, model) -> dict:
    """Per layer, how many parameters have a GSNR in each bin of `EDGES`.

    Corrected GSNR of parameters without signal is above or below zero by chance: what is below, and
    what has no variance, is in no bin.
    """
    ratios = metrics.gsnr(moments)
    paths = [v.path for v in model.trainable_variables]
    return {
        layer: _counts(np.concatenate([np.ravel(ratios[i]) for i in indices]))
        for layer, indices in metrics.by_layer(paths).items()
    }


def histograms_of_meter(meter, variables) -> dict:
    """The same of the sampled parameters, each as often as it stands for others."""
    ratios, sample = meter.reading().ratios, meter.sample
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
