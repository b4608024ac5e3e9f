"""What figure 7 shows of weights, their gradients and these gradients' changes. Pure numpy.

A layer's weights are a dict of arrays of one shape, its columns:
    w       the weights W
    g       the mean gradient of the loss
    whole   Delta g by a step of all parameters
    below   Delta g by a step of the layers below alone; a first layer has none
    and, where it was computed, the first-order parts of `below`: the fields of
    `feature_term.Terms`.
"""

from __future__ import annotations

import math

import numpy as np

from tf_gsnr.experiments.framework.statistics import pearson

TOP = 0.1  # [text] the share of weights with the largest |W|
PARTS = ("own_weight", "other_weights", "errors")


def statistics(layers: dict[str, dict]) -> dict:
    """The statistics of each layer, and of all together that have layers below.

    Weights without any gradient (of dead features) carry no signal and are left out.

    Args:
      layers: a layer's name -> its columns.

    Returns:
      A flat dict. Each of the following is there with `/all` and with `/top`, for the tenth with
      the largest |W|, for all together; and with `/all/<layer>` and `/top/<layer>`.
        opposite: the share of weights with W g < 0.
        growth: <Delta g, g> / <g, g> of the whole step, by which share of itself g grows.
        correlation_whole, correlation_below: Pearson's, of W with Delta g.
        contribution/<part>: cov(W, part) / (sd W sd Delta g); they add up to `correlation_below`.
        explained/<part>: <part, Delta g> / <Delta g, Delta g>; they add up to 1.
        term_correlation: Pearson's, of (28) with Delta g.
        term_same_sign: the share of weights where these two have the same sign.
      A part is one of `PARTS`, or "remainder": what is left of the measured Delta g.
      And `dead`, the number of weights left out.

    Example:

    >>> w = np.array([1.0, -2.0, 3.0, -4.0])
    >>> found = statistics({"output": dict(w=w, g=np.array([-1, 1, 1, 1]), whole=-w, below=-w)})
    >>> found["opposite/all"], round(found["correlation_below/all/output"], 6), found["dead"]
    (0.75, -1.0, 0)
    """
    alive = {name: _alive(columns) for name, columns in layers.items()}
    above = [columns for columns in alive.values() if "below" in columns]
    groups = {f"/{name}": columns for name, columns in alive.items()}
    if above:
        shared = [k for k in above[0] if all(k in columns for columns in above)]
        groups[""] = {k: np.concatenate([columns[k] for columns in above]) for k in shared}
    record = {}
    for suffix, columns in groups.items():
        for which, rows in (("all", slice(None)), ("top", _top(columns["w"]))):
            chosen = {k: v[rows] for k, v in columns.items()}
            record |= {f"{k}/{which}{suffix}": v for k, v in _of_weights(chosen).items()}
    kept = sum(len(columns["w"]) for columns in alive.values())
    return record | {"dead": sum(np.size(columns["w"]) for columns in layers.values()) - kept}


def _alive(columns):
    has_gradient = np.asarray(columns["g"]).ravel() != 0
    return {k: np.asarray(v, float).ravel()[has_gradient] for k, v in columns.items()}


def _top(w):
    """Where the tenth with the largest |w| is."""
    return np.argsort(-np.abs(w), kind="stable")[: math.ceil(TOP * len(w))]


def _of_weights(c):
    record = {
        "opposite": _ratio(np.sum(c["w"] * c["g"] < 0), len(c["w"])),
        "growth": _ratio(c["whole"] @ c["g"], c["g"] @ c["g"]),
        "correlation_whole": pearson(c["w"], c["whole"]),
    }
    if "below" in c:
        record["correlation_below"] = pearson(c["w"], c["below"])
    if PARTS[0] in c:
        change, own = c["below"], c[PARTS[0]]
        parts = {part: c[part] for part in PARTS}
        parts["remainder"] = change - sum(parts.values())
        scale = np.std(c["w"]) * np.std(change)
        for part, values in parts.items():
            record[f"contribution/{part}"] = _ratio(_covariance(c["w"], values), scale)
            record[f"explained/{part}"] = _ratio(values @ change, change @ change)
        record["term_correlation"] = pearson(own, change)
        record["term_same_sign"] = _ratio(np.sum(own * change > 0), len(own))
    return record


def _covariance(x, y):
    return np.mean((x - np.mean(x)) * (y - np.mean(y))) if len(x) else math.nan


def _ratio(above, below):
    return float(above / below) if below > 0 else math.nan
