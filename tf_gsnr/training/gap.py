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


def preconditioner(optimizer, gradients, sample):
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
      gradients: the mean gradients that it was given, one per variable; None where it
        `needs_gradients` not.
      sample: a `training.sample.Sample` of the parameters.

    Returns:
      `(of_variables, of_parameters)`, float64: P_j is the product of that of its variable, `[v]` or
      one for all, and its own `[k]`, which is None where it is 1.
    """
    optimizer = _inner(optimizer)
    rate = tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float64)
    k = tf.cast(tf.maximum(tf.convert_to_tensor(optimizer.iterations), 1), tf.float64)
    name = type(optimizer).__name__

    def slot(variables):
        return sample.take([getattr(v, "value", v) for v in variables])

    own = None
    if name == "SGD":
        mu = optimizer.momentum
        rate *= (1 - mu**k) / (1 - mu) if mu < 1 else k
    elif name in ("Adam", "AdamW"):
        m = slot(optimizer._momentums) / (1 - optimizer.beta_1**k)
        v = slot(optimizer._velocity_hats if optimizer.amsgrad else optimizer._velocities)
        v /= 1 - optimizer.beta_2**k
        own = _rest(tf.square(m), v) / (tf.sqrt(v) + optimizer.epsilon)
    elif name in ("RMSprop", "Adagrad"):
        share = 1 - optimizer.rho if name == "RMSprop" else 1.0
        v = slot(optimizer._velocities if name == "RMSprop" else optimizer._accumulators)
        own = _rest(share * tf.square(slot(gradients)), v) / tf.sqrt(v + optimizer.epsilon)
    else:
        raise ValueError(f"optimizer {name}: expected one of {', '.join(SUPPORTED)}")
    steps = optimizer.gradient_accumulation_steps or 1  # an update is the mean of so many batches
    return rate / steps * _clipping(optimizer, gradients), own


def _rest(part, whole):
    """`1 - part / whole`, between 0 and 1; 0 where there was no gradient."""
    share = tf.math.divide_no_nan(part, whole)
    return tf.where(whole > 0, tf.clip_by_value(1 - share, 0.0, 1.0), 0.0)


def expected(variances, totals, factors, sample):
    """`sum_j P_j rho2_j`: N times the expected growth of the gap in a step. Float64 scalar.

    Variables whose variance is NaN, as they were not measured, are left out; NaN if all are.

    Args:
      variances: float64 `[k]`, of the sampled parameters.
      totals: float64 `[v]`, their sums over each variable.
      factors: of `preconditioner`.
      sample: of the parameters.
    """
    of_variables, own = factors
    terms = totals if own is None else sample.sums(sample.weights * own * variances)
    terms *= of_variables
    known = tf.math.is_finite(terms)
    nothing = tf.constant(float("nan"), tf.float64)
    return tf.where(tf.reduce_any(known), tf.reduce_sum(tf.where(known, terms, 0)), nothing)


def needs_gradients(optimizer) -> bool:
    """Whether `preconditioner` looks at the gradients."""
    optimizer = _inner(optimizer)
    clips = optimizer.clipnorm or optimizer.global_clipnorm
    return bool(clips) or type(optimizer).__name__ in ("RMSprop", "Adagrad")


def _clipping(optimizer, gradients):
    """`[v]`, or 1: by what each variable's gradient was multiplied."""
    most = optimizer.clipnorm or optimizer.global_clipnorm
    if not most:
        return tf.ones([], tf.float64)
    sizes = [0.0 if g is None else tf.nn.l2_loss(tf.convert_to_tensor(g)) for g in gradients]
    squares = 2 * tf.stack([tf.cast(size, tf.float64) for size in sizes])
    squares = squares if optimizer.clipnorm else tf.fill(tf.shape(squares), tf.reduce_sum(squares))
    return tf.minimum(tf.ones([], tf.float64), most / tf.maximum(tf.sqrt(squares), 1e-30))


def _inner(optimizer):
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer
