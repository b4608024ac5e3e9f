"""Both sides of (19) around one step of gradient descent: measured, and made a record.

    R = E[dL[D']] / E[dL[D]]    measured (23) by the losses before and after the step,
                                predicted (24) by the per-example gradients on D

Index letters: t training set (1..M), r of those that train together, i test example.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, metrics

FIRST_ORDER_TOLERANCE = 0.1  # [ours] how far lambda |g|^2 may be off the measured decrease


class Step(NamedTuple):
    """A step along the gradients of training sets' losses, and what was measured around it.

    Attributes:
      weights: after it.
      losses: `[r]`, the mean losses of the training sets before it.
      rows: a dict of numbers for each set.
      decrease: `[n']`, of each test example's loss, summed over the sets.
    """

    weights: list
    losses: np.ndarray
    rows: list
    decrease: np.ndarray


def measured(functions, model, weights, sets, test, seeds) -> list[Step]:
    """From the same weights a step on each of some training sets, measured.

    Args:
      functions: `descent.Ensemble`.
      model: for the names of its variables.
      weights: see `descent.Ensemble`; they stay as they are.
      sets: a list of `own` of `descent.Ensemble`.
      test: micro-batches of the test set.
      seeds: `[r, 2]`, of `functions.terms`.
    """
    there = test[2].numpy()

    def test_losses(weights):
        return functions.losses(weights, test).numpy()[:, there].astype(float)

    def step(own, start, before):
        moments = tf.nest.map_structure(np.asarray, functions.moments(start, own))
        gradient, terms = functions.terms(start, own, moments, seeds)
        end = functions.recalibrate(functions.step(start, gradient), own)
        after, train_after = test_losses(end), functions.loss(end, own).numpy()
        rows = []
        for r, own_terms in enumerate(terms):
            one = tf.nest.map_structure(lambda v, r=r: v[r], moments)
            row = metrics.summarize(one, model) | {
                **own_terms,
                "train_before": float(moments.loss[r]),
                "train_after": float(train_after[r]),
                "test_before": before[r].mean(),
                "test_after": after[r].mean(),
            }
            rows.append(row)
        return Step([np.asarray(w) for w in end], moments.loss, rows, (before - after).sum(0))

    steps, before = [], None
    for own in sets:
        start = functions.recalibrate(weights, own)
        if before is None or start is not weights:  # with batch norm each set has its own
            before = test_losses(start)
        steps.append(step(own, start, before))
    return steps


def record(rows, test_decreases, learning_rate: float) -> dict:
    """One record of the M training sets' measurements at one epoch.

    Args:
      rows: of each training set, that of its `Step`; `rises`, how often a step before began at a
        higher loss than the one before it; and as `unseen_...` the row of a step on another set.
      test_decreases: `[1 or 2, n']`, each test example's, the mean over the sets; the second of
        the steps on the other sets.
      learning_rate: lambda.
    """

    def column(name):
        return np.array([row[name] for row in rows], dtype=float)

    def sides(prefix, decreases):
        """Both sides of (19), measured (23) and predicted (24), with their standard errors."""
        train, test = (
            np.stack([column(f"{prefix}{side}_{when}") for when in ("before", "after")], 1)
            for side in ("train", "test")
        )
        noise, noise_se = metrics.ratio_of_sums(column(f"{prefix}noise"), column(f"{prefix}signal"))
        return {
            "osgr_measured": metrics.osgr_measured(train, test),
            "osgr_measured_se": metrics.osgr_measured_se(train, test, decreases),
            "osgr_predicted": 1 - noise,
            "osgr_predicted_se": noise_se,
        }

    train_decrease = float((column("train_before") - column("train_after")).mean())
    # (9): to first order the training loss falls by lambda |g|^2.
    first_order = float(learning_rate * column("signal").mean() / train_decrease)
    rises = int(column("rises").sum() + (column("train_after") > column("train_before")).sum())
    record = {
        **sides("", test_decreases[0]),
        "train_loss": float(column("train_before").mean()),
        "test_loss": float(column("test_before").mean()),
        "train_decrease": train_decrease,
        "test_decrease": float((column("test_before") - column("test_after")).mean()),
        "gap_growth_predicted": float(learning_rate * column("noise").mean()),  # (14)
        "first_order_ratio": first_order,
        "loss_rises": rises,
        "small_step": bool(rises == 0 and abs(first_order - 1) <= FIRST_ORDER_TOLERANCE),
    }
    if len(test_decreases) > 1:
        unseen = sides("unseen_", test_decreases[1])
        record |= {key.replace("osgr_", "osgr_unseen_"): value for key, value in unseen.items()}
    if "noise_frozen" in rows[0]:
        frozen, frozen_se = metrics.ratio_of_sums(column("noise_frozen"), column("signal_frozen"))
        record |= {"osgr_predicted_frozen": 1 - frozen, "osgr_predicted_frozen_se": frozen_se}
    taken = {"count", "loss", "osgr_predicted", "osgr_predicted_plain", "rises"}
    taken |= {"noise", "signal", "noise_frozen", "signal_frozen"}
    for name in rows[0]:
        if name not in taken and not name.startswith(("train_", "test_", "unseen_")):
            # Of corrected numbers no mean without those that cannot be told from zero.
            mean = np.mean if name.startswith(("gsnr/", "noise_scale")) else arrays.mean
            record[name] = float(mean(column(name)))
    return record
