"""The generalisation gap that a step of a real optimiser is expected to open, from gradients alone.

Index letters: j parameter, B batch size, N number of training examples, k step.

Equation (14) of Liu et al., ICLR 2020, is about full-batch descent: the gap between test and
training loss grows by `lambda sum_j rho2_j / N` in a step. It holds for a batch of B out of the N
training examples too, at any B. With g_B the batch's mean gradient, g_D that of the training set
and g that of the distribution, a step -lambda g_B lowers, to first order, the training loss by
lambda g_B.g_D and the test loss by lambda g_B.g, and

    E[g_B.g_D - g_B.g] = sum_j Cov(g_B,j, g_D,j) = B * (1/B)(1/N) sum_j rho2_j = sum_j rho2_j / N

(the batch's own examples are B of the N over which g_D is the mean). Should the step be
-P g_B with a diagonal P, each rho2_j is multiplied by P_j: that is what `preconditioner` returns.

It is an expectation, to first order in the step, over training sets drawn afresh: once the
parameters have adapted to the examples, rho2 is measured on examples that are no longer typical.

Where P is made of the gradients themselves, the step is a function f of them, and for gradients
that are about normal Stein's lemma gives `Cov(f(g_B), g_D) = E[f'(g_B)] rho2 / N`: P_j is the
derivative of the step by the gradient. For a step `lambda g / sqrt(v)` it is
`lambda (1 - g dv/dg / 2v) / sqrt(v)`. In the very first step of Adam,
which has the sign of the gradient only, it is zero.
"""

from __future__ import annotations

import keras
import tensorflow as tf

SUPPORTED = ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW")


def supported(optimizer) -> bool:
    """Whether the optimiser's step is known to be a diagonal matrix times the gradient."""
    return type(_inner(optimizer)).__name__ in SUPPORTED


def preconditioner(optimizer, gradients) -> list:
    """P_j per parameter, the derivative of the last step by the gradient; read after the step.

        SGD       lambda, with momentum mu: lambda (1 - mu^k) / (1 - mu)
        Adam(W)   lambda (1 - m^2 / v) / (sqrt(v) + epsilon), of m and v free of their start's bias
        RMSprop   lambda (1 - (1 - rho) g^2 / v) / sqrt(v + epsilon)
        Adagrad   lambda (1 - g^2 / v) / sqrt(v + epsilon)

    Momentum counts as if it acted at once: the step is a sum over the last batches' gradients, with
    these weights, and each covaries with the training set's gradient as in the module's docstring.
    Clipping by norm scales P; clipping by value, weight decay and averaging are neglected.

    Args:
      optimizer: a Keras optimiser, built; one that is `supported`.
      gradients: the mean gradients that it was given, for the clipping.

    Returns:
      Per variable a scalar or a tensor of the variable's shape.
    """
    optimizer = _inner(optimizer)
    rate = tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float32)
    k = tf.cast(tf.maximum(tf.convert_to_tensor(optimizer.iterations), 1), tf.float32)
    name = type(optimizer).__name__
    if name == "SGD":
        mu = optimizer.momentum
        factors = [rate * (1 - mu**k) / (1 - mu) if mu < 1 else rate * k] * len(gradients)
    elif name in ("Adam", "AdamW"):
        first = [_float32(m) / (1 - optimizer.beta_1**k) for m in optimizer._momentums]
        second = optimizer._velocity_hats if optimizer.amsgrad else optimizer._velocities
        second = [_float32(v) / (1 - optimizer.beta_2**k) for v in second]
        factors = [
            rate * _rest(tf.square(m), v) / (tf.sqrt(v) + optimizer.epsilon)
            for m, v in zip(first, second)
        ]
    elif name in ("RMSprop", "Adagrad"):
        share = 1 - optimizer.rho if name == "RMSprop" else 1.0
        second = optimizer._velocities if name == "RMSprop" else optimizer._accumulators
        factors = [
            rate * _rest(share * tf.square(_float32(g)), v) / tf.sqrt(v + optimizer.epsilon)
            for g, v in zip(gradients, map(_float32, second))
        ]
    else:
        raise ValueError(f"optimizer {name}: expected one of {', '.join(SUPPORTED)}")
    steps = optimizer.gradient_accumulation_steps or 1  # an update is the mean of so many batches
    clips = _clipping(optimizer, gradients)
    return [tf.cast(c / steps, f.dtype) * f for c, f in zip(clips, factors)]


def _float32(value):
    return tf.cast(tf.convert_to_tensor(getattr(value, "value", value)), tf.float32)


def _rest(part, whole):
    """`1 - part / whole`, between 0 and 1; 0 where there was no gradient."""
    share = tf.math.divide_no_nan(part, whole)
    return tf.where(whole > 0, tf.clip_by_value(1 - share, 0.0, 1.0), 0.0)


def expected(variances, factors, scales=None):
    """`sum_j P_j rho2_j`: N times the expected growth of the gap in a step. Float64 scalar.

    Variables whose variance is NaN, as they were not measured, are left out; NaN if all are.

    Args:
      scales: per variable, by what its gradients were multiplied: the variances are by the square.
    """
    terms = [tf.reduce_sum(tf.cast(f, v.dtype) * v) for f, v in zip(factors, variances)]
    terms = tf.stack([tf.cast(term, tf.float64) for term in terms])
    if scales is not None:
        terms /= tf.square(tf.cast(scales, tf.float64))
    known = tf.math.is_finite(terms)
    nothing = tf.constant(float("nan"), tf.float64)
    return tf.where(tf.reduce_any(known), tf.reduce_sum(tf.where(known, terms, 0)), nothing)


def _clipping(optimizer, gradients):
    one = tf.ones([])
    if optimizer.clipnorm:
        norms = [tf.norm(tf.cast(g, tf.float32)) for g in gradients]
        return [tf.minimum(one, optimizer.clipnorm / tf.maximum(n, 1e-30)) for n in norms]
    if optimizer.global_clipnorm:
        norm = tf.linalg.global_norm([tf.cast(g, tf.float32) for g in gradients])
        factor = tf.minimum(one, optimizer.global_clipnorm / tf.maximum(norm, 1e-30))
        return [factor] * len(gradients)
    return [one] * len(gradients)


def _inner(optimizer):
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer
