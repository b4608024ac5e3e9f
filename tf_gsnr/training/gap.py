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

from collections.abc import Callable

import keras
import tensorflow as tf

from tf_gsnr import checks, keras_internals

_STEPS: dict[type, Callable] = {}
_STEP_METHODS = {"update_step", "apply", "apply_gradients"}  # what makes the step


def register_optimizer(optimizer_class: type) -> Callable:
    """Decorator: the function tells the derivative P_j of this optimiser's step by the gradient.

    It holds for subclasses too, unless they override what makes the step. After a step it is called
    as `function(optimizer, k, slot, gradients)`:
      k: float64 scalar, how many steps the optimiser has made.
      slot: `slot(kind)`, or `slot(list of arrays like the variables)`: what these hold at the
        measured parameters, float64 `[k]`; kinds as in `keras_internals.slots`.
      gradients: the mean gradients that it was given; None for each that had none.
    It returns `(rate, own)`, scalar and `[k]` or None, of which P_j is the product.

    Raises:
      TypeError: not a class of optimisers.
      ValueError: what is decorated is no such function.

    Example: an optimiser that makes half the step of SGD.

    >>> class Half(keras.optimizers.SGD):
    ...     def update_step(self, gradient, variable, learning_rate):
    ...         super().update_step(gradient / 2, variable, learning_rate)
    >>> supported(Half())
    False
    >>> @register_optimizer(Half)
    ... def half(optimizer, k, slot, gradients):
    ...     return tf.convert_to_tensor(optimizer.learning_rate) / 2, None
    >>> supported(Half())
    True
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, keras.Optimizer)):
        raise TypeError(
            f"register_optimizer(optimizer_class={checks.shown(optimizer_class)}): expected a "
            "subclass of keras.Optimizer"
        )

    def register(function):
        expected = "a function (optimizer, k, slot, gradients) -> (rate, own)"
        checks.function("function", function, 4, expected)
        _STEPS[optimizer_class] = function
        return function

    return register


def _step_of(optimizer) -> Callable | None:
    """The function of its class, or of the class that its step comes from."""
    for cls in type(_inner(optimizer)).__mro__:
        if cls in _STEPS:
            return _STEPS[cls]
        if _STEP_METHODS & vars(cls).keys():
            return None
    return None


def supported(optimizer) -> bool:
    """Whether the optimiser's step is known to be a diagonal matrix times the gradient."""
    return _step_of(optimizer) is not None


def names() -> str:
    """The classes of the optimisers that are known."""
    return ", ".join(cls.__name__ for cls in _STEPS)


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

    Raises:
      ValueError: it is not supported.
    """
    step = _step_of(optimizer)
    if step is None:
        kind = type(_inner(optimizer)).__name__
        raise ValueError(f"optimizer {kind}: expected one of {names()}, or one registered")
    optimizer = _inner(optimizer)

    def slot(kind_or_values):
        values = kind_or_values
        if isinstance(values, str):
            values = keras_internals.slots(optimizer, values)
            values = [None if v is None else v.value for v in values]  # of a scale of float8
        return sample.take(values)

    k = tf.cast(tf.maximum(tf.convert_to_tensor(optimizer.iterations), 1), tf.float64)
    rate, of_parameters = _checked(step, step(optimizer, k, slot, gradients))
    batches = optimizer.gradient_accumulation_steps or 1  # an update is the mean of so many
    return tf.cast(rate, tf.float64) / batches * _clipping(optimizer, gradients), of_parameters


def _checked(function, answer) -> tuple:
    """What a function of `register_optimizer` returned; ValueError where it is no such pair."""
    try:
        rate, own = (None if v is None else tf.convert_to_tensor(v) for v in answer)
        numbers = all(v is None or v.dtype.is_floating or v.dtype.is_integer for v in (rate, own))
        fits = (
            numbers
            and rate is not None
            and rate.shape.rank in (None, 0)
            and (own is None or own.shape.rank in (None, 1))
        )
    except (TypeError, ValueError, AttributeError, tf.errors.OpError):
        fits = False
    if not fits:
        raise ValueError(
            f"the function {function.__name__} of register_optimizer returned "
            f"{checks.shown(answer)}; expected (rate, own), a number and numbers [k] or None"
        )
    return rate, own


def _rate(optimizer):
    return tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float64)


@register_optimizer(keras.optimizers.SGD)
def _sgd(optimizer, k, slot, gradients):
    mu = optimizer.momentum
    return _rate(optimizer) * ((1 - mu**k) / (1 - mu) if mu < 1 else k), None


@register_optimizer(keras.optimizers.AdamW)
@register_optimizer(keras.optimizers.Adam)
def _adam(optimizer, k, slot, gradients):
    m = slot("momentums") / (1 - optimizer.beta_1**k)
    v = slot("velocity_hats" if optimizer.amsgrad else "velocities") / (1 - optimizer.beta_2**k)
    return _rate(optimizer), _rest(tf.square(m), v) / (tf.sqrt(v) + optimizer.epsilon)


@register_optimizer(keras.optimizers.RMSprop)
def _rmsprop(optimizer, k, slot, gradients):
    return _of_root(optimizer, slot("velocities"), 1 - optimizer.rho, slot(gradients))


@register_optimizer(keras.optimizers.Adagrad)
def _adagrad(optimizer, k, slot, gradients):
    return _of_root(optimizer, slot("accumulators"), 1.0, slot(gradients))


def _of_root(optimizer, v, share, gradient):
    """Of the step `lambda g / sqrt(v + epsilon)`, of whose v a share is g^2."""
    of_parameters = _rest(share * tf.square(gradient), v) / tf.sqrt(v + optimizer.epsilon)
    return _rate(optimizer), of_parameters


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
    of_variables, of_parameters = factors
    terms = (
        totals if of_parameters is None else sample.sums(sample.weights * of_parameters * variances)
    )
    terms *= of_variables
    known = tf.math.is_finite(terms)
    nothing = tf.constant(float("nan"), tf.float64)
    return tf.where(tf.reduce_any(known), tf.reduce_sum(tf.where(known, terms, 0)), nothing)


def needs_gradients(optimizer) -> bool:
    """Whether `preconditioner` looks at the gradients."""
    optimizer = _inner(optimizer)
    clips = optimizer.clipnorm or optimizer.global_clipnorm
    return bool(clips) or _step_of(optimizer) not in (_sgd, _adam)


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
