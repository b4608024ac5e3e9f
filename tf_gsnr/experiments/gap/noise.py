"""What the gap is predicted to be from the gradients of the model while it trains.

With P the derivative of its step by the gradient, lambda the learning rate, Sigma the covariance of
the examples' gradients,

  first_order   (14) summed over the steps: sum_k sum_j P_j rho_j^2 / N. It supposes that what a
                step fits of the noise stays.
  curvature     tr C after  C <- (I - lambda H) C + lambda Sigma / N,  H the Gauss-Newton matrix:
                later steps undo along sharp directions what earlier ones fitted.
  influence     - (1/N) sum_n g[n] . u[n]  after  u[n] <- (I - lambda H) u[n] - lambda g[n] / N,
                H the Hessian: u[n] is d w / d (weight of n), so that this is what twins estimate,
                in closed form.

The last two are for small networks and full-batch descent.

Index letters: n example of N, k step, j parameter, o, q output.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients.measure import gradient_moments
from tf_gsnr.training import probe


def derivatives(model, losses, x, y):
    """Of a small network: the examples' gradients, Gauss-Newton matrix and Hessian of their mean.

    Returns:
      g `[n, j]`, matrix `[j, j]`, Hessian `[j, j]`, over all parameters j.
    """
    variables = model.trainable_variables

    def flat(gradients):
        rows = [tf.reshape(g, [-1, tf.size(v)]) for g, v in zip(gradients, variables)]
        return tf.concat(rows, 1)

    def of_output(o):  # d f[n,o] / d w[j], [n, j]
        def of_example(one):
            with tf.GradientTape() as tape:
                output = model(one[tf.newaxis], training=False)[0, o]
            return flat(tape.gradient(output, variables))[0]

        return tf.vectorized_map(of_example, x)

    outputs = model(x, training=False)
    with tf.GradientTape() as outer:
        outer.watch(outputs)
        with tf.GradientTape() as inner:
            inner.watch(outputs)
            values = losses(y, outputs)
        slopes = inner.gradient(values, outputs)  # d l[n] / d f[n,o]
    bends = outer.batch_jacobian(slopes, outputs)  # d2 l[n] / d f[n,o] d f[n,q]
    jacobian = tf.stack([of_output(o) for o in range(outputs.shape[1])], 1)
    n = tf.cast(tf.shape(x)[0], x.dtype)
    gauss_newton = tf.einsum("noj,noq,nqk->jk", jacobian, bends, jacobian) / n
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            mean = tf.reduce_mean(losses(y, model(x, training=False)))
        gradient = flat(inner.gradient(mean, variables))[0]
    hessian = flat(outer.jacobian(gradient, variables, unconnected_gradients="zero"))
    return tf.einsum("no,noj->nj", slopes, jacobian), gauss_newton, hessian


class Noise:
    """What is predicted from the gradients of the model while it trains."""

    def __init__(self, trainer, examples):
        self.trainer, self.examples = trainer, examples
        self.first_order = 0.0
        self.steps = 0  # since the last measurement
        self.growth = None  # of a step, at the last measurement
        self.known: list | None = None  # the derivatives, once asked for between two steps
        self.follow = trainer.settings.curvature
        if self.follow:
            p = trainer.model.count_params()
            self.covariance = np.zeros([p, p])
            self.moved = np.zeros([len(examples[1]), p])  # u[n]

    def before_step(self):
        self.steps += 1
        if not self.follow:
            return
        gradients, gauss_newton, hessian = self._derivatives()
        n, rate = len(gradients), self.trainer.rate
        centred = gradients - gradients.mean(0)
        sigma = centred.T @ centred / n
        self.covariance += rate * (sigma / n - gauss_newton @ self.covariance)
        self.moved -= rate * (gradients / n + self.moved @ hessian)
        self.known = None

    def _derivatives(self):
        """Those at the weights as they are now."""
        if self.known is None:
            found = self.trainer.derivatives(*self.examples)
            self.known = [np.asarray(v, np.float64) for v in found]
        return self.known

    def sum(self) -> float:
        """(14) summed up to these weights.

        The growth by a step is measured here, and between two measurements their mean counts.
        """
        x, y = self.examples
        t, size = self.trainer, min(len(y), self.trainer.settings.probe)
        moments = gradient_moments(
            t.model, x[:size], y[:size], t.loss, engine=t.engine, batch_size=min(size, 250)
        )
        growth = probe.predicted_growth(moments, t.optimizer, len(y))
        if self.growth is not None:
            self.first_order += self.steps * (growth + self.growth) / 2
        self.growth, self.steps = growth, 0
        return float(self.first_order)

    def curvature(self) -> float:
        return float(np.trace(self.covariance)) if self.follow else float("nan")

    def influence(self) -> float:
        if not self.follow:
            return float("nan")
        gradients = self._derivatives()[0]
        return float(-np.mean(np.sum(gradients * self.moved, 1)))
