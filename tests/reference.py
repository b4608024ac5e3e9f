"""The truth the engines are held to: a plain Python loop over examples, eager, in float64.

Index letters: n example.
"""

import keras
import numpy as np
import tensorflow as tf


def per_example_gradients(model, loss_fn, x, y, *, sample_weight=None, training=False):
    """Per trainable variable, `[n, *shape]` float64: the gradient of each example's own loss.

    Args:
      model: the model, best in float64.
      loss_fn: `(y_true, y_pred, sample_weight) -> [n]`, as `per_example_loss` returns.
      x, y: nested arrays.
      sample_weight: `[n]`, or None.
      training: in training mode the whole batch runs forwards each time, so that each example
        meets the random numbers that a training step would give it.
    """
    x, y = tf.nest.map_structure(tf.convert_to_tensor, (x, y))
    if sample_weight is not None:
        sample_weight = tf.convert_to_tensor(sample_weight)
    count = tf.nest.flatten(x)[0].shape[0]
    state = [(v, tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables]
    rows = []
    for n in range(count):
        own = slice(None) if training else slice(n, n + 1)
        x_n, y_n, w_n = _rows((x, y, sample_weight), own)
        with tf.GradientTape() as tape:
            with keras.StatelessScope(state_mapping=state):
                prediction = model(x_n, training=training)
            loss = loss_fn(y_n, prediction, w_n)[n if training else 0]
        gradients = tape.gradient(
            loss,
            [v.value for v in model.trainable_variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        rows.append([np.asarray(tf.convert_to_tensor(g), np.float64) for g in gradients])
    return [np.stack(g) for g in zip(*rows)]


def _rows(data, rows):
    return tf.nest.map_structure(lambda v: None if v is None else v[rows], data)


def moments(gradients):
    """`(mean, m2, positives, negatives)`, lists over variables, of `[n, *shape]` gradients."""
    return (
        [g.mean(0) for g in gradients],
        [g.var(0) * len(g) for g in gradients],
        [(g > 0).sum(0) for g in gradients],
        [(g < 0).sum(0) for g in gradients],
    )


def distances(model, measured, truth):
    """Per variable, how far measured moments are from `moments` of the truth.

    Returns:
      `{path: (mean, m2, signs)}`: the largest difference relative to the variable's largest entry,
      and the share of parameters with another count of signs. A gradient that is zero but for
      rounding (a bias before a softmax, say) is compared with the model's largest instead.
    """
    mean, m2, positives, negatives = truth
    count = int(measured.count)
    largest = max(np.sqrt(v.max() + count * (m**2).max()) for m, v in zip(mean, m2))
    found = {}
    for j, variable in enumerate(model.trainable_variables):
        scale = np.sqrt(np.max(m2[j] + count * mean[j] ** 2))
        rounding = scale < 1e-6 * largest
        if rounding:
            scale = largest
        signs = 0.0
        if measured.positives and not rounding:
            signs = np.mean(
                (np.asarray(measured.positives[j]) != positives[j])
                | (np.asarray(measured.negatives[j]) != negatives[j])
            )
        found[variable.path] = (
            _difference(measured.mean[j], mean[j], 0 if rounding else np.abs(mean[j]).max(), scale),
            _difference(measured.m2[j], m2[j], 0 if rounding else m2[j].max(), scale**2),
            float(signs),
        )
    return found


def _difference(measured, truth, scale, otherwise):
    return float(np.abs(np.asarray(measured, np.float64) - truth).max() / (scale or otherwise or 1))
