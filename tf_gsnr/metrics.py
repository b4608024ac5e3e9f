"""What follows from the moments of per-example gradients: GSNR, OSGR, noise scale and the like.

Pure functions. Given `Moments` of numpy arrays they answer in numpy and sum in float64; given
tensors, in a graph, they answer in tensors. Equation numbers are those of Liu et al., ICLR 2020.

Index letters: n the number of examples, j parameter, t training set (1..M), i test example.
    g_j = moments.mean, the mean gradient;   rho2_j = moments.variance(), the sample-wise variance
"""

from __future__ import annotations

import numpy as np

from tf_gsnr import arrays
from tf_gsnr.moments import Moments


def gsnr(moments: Moments, bias_corrected: bool = False) -> list:
    """Gradient signal-to-noise ratio of every parameter, (25).

        r_j = g_j^2 / rho2_j
        corrected: (g_j^2 - s2_j / n) / s2_j     with s2 the unbiased variance, ddof 1

    Since E g_j^2 = gt_j^2 + rho2_j / n, the first, which is the paper's, overestimates the ratio of
    the distribution by about 1/n: a batch of 32 adds 0.03, as much as the usual value. The second
    has no such bias; it may be negative.

    Returns:
      A list in the order of the variables, of their shapes; NaN where the variance is zero.

    Raises:
      ValueError: fewer than two examples.

    Example:

    >>> moments = Moments.of([np.array([[1.0], [3.0]])], losses=np.zeros(2)).numpy()
    >>> gsnr(moments)[0].tolist(), gsnr(moments, bias_corrected=True)[0].tolist()
    ([4.0], [1.5])
    """
    _check_count(moments)
    ddof = 1 if bias_corrected else 0
    ratios = []
    for mean, variance in zip(arrays.wide(moments.mean), arrays.wide(moments.variance(ddof))):
        ratio = arrays.divide(mean**2, variance, np.nan)
        ratios.append(ratio - 1 / arrays.like(ratio, moments.count) if bias_corrected else ratio)
    return ratios


def same_sign(moments: Moments) -> list:
    """Share of the examples whose gradient has the majority's sign, per parameter (figure 5c).

        max(n+, n-) / (n+ + n-)      over the examples whose gradient is not zero

    Returns:
      A list in the order of the variables, of their shapes; NaN where no example has a gradient.

    Raises:
      ValueError: the moments hold no sign counts.
    """
    _check_signs(moments)
    shares = []
    for positive, negative in zip(moments.positives, moments.negatives):
        xp = arrays.namespace(positive)
        both = arrays.like_float(positive + negative)
        shares.append(
            arrays.divide(arrays.like_float(xp.maximum(positive, negative)), both, np.nan)
        )
    return shares


def step_sign(moments: Moments) -> list:
    """Share of the examples whose gradient has the sign of the mean gradient, per parameter.

    Over the examples whose gradient is not zero: those for which the step of the whole set goes
    the right way. It may be below one half, where a few large gradients outweigh many small ones.

    Returns and raises as `same_sign`.

    Example:

    >>> gradients, losses = [np.array([[-5.0], [1.0], [1.0], [0.0]])], np.zeros(4)
    >>> moments = Moments.of(gradients, losses, sign_counts=True).numpy()
    >>> step_sign(moments)[0].round(2).tolist(), same_sign(moments)[0].round(2).tolist()
    ([0.33], [0.67])
    """
    _check_signs(moments)
    shares = []
    for mean, positive, negative in zip(moments.mean, moments.positives, moments.negatives):
        xp = arrays.namespace(positive)
        agreeing = arrays.like_float(xp.where(mean > 0, positive, negative))
        shares.append(arrays.divide(agreeing, arrays.like_float(positive + negative), np.nan))
    return shares


def noise_scale(moments: Moments, bias_corrected: bool = False):
    """Gradient noise scale tr(Sigma) / |G|^2 (McCandlish et al. 2018), in examples.

    The batch size at which the noise of the mean gradient is as large as the gradient. With
    `bias_corrected`, both sides are unbiased estimates, sum_j s2_j and |g|^2 - sum_j s2_j / n; it
    is infinite where the latter is not positive (too few examples to tell the gradient from zero).

    Returns:
      A float (a scalar tensor in a graph).
    """
    _check_count(moments)
    trace = arrays.total(moments.variance(1 if bias_corrected else 0))
    signal = _squared_norm(moments)
    if bias_corrected:
        signal = signal - trace / arrays.like(trace, moments.count)
        signal = arrays.namespace(signal).maximum(signal, arrays.like(signal, 0))
    return arrays.scalar(arrays.divide(trace, signal, np.inf))


def gradient_diversity(moments: Moments):
    """sum_n |g[n]|^2 / |sum_n g[n]|^2 (Yin et al. 2018): 1/n where all agree, larger where not."""
    signal = _squared_norm(moments)
    n = arrays.like(signal, moments.count)
    squares = arrays.total(moments.m2) + n * signal
    return arrays.scalar(arrays.divide(squares, n**2 * signal, np.inf))


def osgr_terms(moments: Moments) -> tuple:
    """The two sums of (19): `(sum_j rho2_j / n, sum_j g_j^2)`; what a step adds to the gap, over
    lambda, and by how much it lowers the training loss, over lambda."""
    _check_count(moments)
    noise = arrays.total(moments.variance())
    noise = noise / arrays.like(noise, moments.count)
    return arrays.scalar(noise), arrays.scalar(_squared_norm(moments))


def gap_growth(moments: Moments, learning_rate: float):
    """Expected growth of the generalisation gap in one step, lambda sum_j rho2_j / n, (14).

    Args:
      moments: of the whole training set, of size n, on which the full-batch step is made.
      learning_rate: lambda.

    Returns:
      A float in units of the loss.
    """
    return osgr_terms(moments)[0] * learning_rate


def gap_shares(moments: Moments, model) -> dict:
    """From which layers the gap comes: each layer's share of (14); they sum to 1.

    Returns:
      `{layer path: share}` in the order of the model.
    """
    totals = {}
    for variable, variance in zip(model.trainable_variables, moments.variance()):
        layer = variable.path.rpartition("/")[0] or variable.path
        totals[layer] = totals.get(layer, 0) + arrays.total([variance])
    whole = sum(totals.values())
    shares = {layer: arrays.divide(total, whole, np.nan) for layer, total in totals.items()}
    return {layer: arrays.scalar(share) for layer, share in shares.items()}


def osgr_predicted(list_of_moments) -> float:
    """One-step generalisation ratio predicted from gradients alone, (24).

        R = 1 - [ sum_t sum_j rho2_tj / n ] / [ sum_t sum_j g_tj^2 ]

    Args:
      list_of_moments: `Moments` of each of the M training sets (or one `Moments`).

    Returns:
      A float: a ratio of sums over the training sets, never a mean of ratios.
    """
    if isinstance(list_of_moments, Moments):
        list_of_moments = [list_of_moments]
    noise, signal = zip(*map(osgr_terms, list_of_moments))
    return 1 - arrays.scalar(arrays.divide(sum(noise), sum(signal), np.nan))


def osgr_from_gsnr(list_of_moments) -> float:
    """The same number as `osgr_predicted`, by way of the GSNR, (22).

        R = 1 - 1/n sum_j W_j / (r_j + 1/n),   W_j = E dL_j / E dL = E g_j^2 / sum_j E g_j^2

    with E the mean over the training sets and r_j = E g_j^2 / E rho2_j - 1/n.
    """
    if isinstance(list_of_moments, Moments):
        list_of_moments = [list_of_moments]
    n = list_of_moments[0].count
    # Per parameter, the means over the training sets of g^2 and of rho2.
    means = zip(*(arrays.wide(m.mean) for m in list_of_moments))
    variances = zip(*(arrays.wide(m.variance()) for m in list_of_moments))
    square = [np.mean([g**2 for g in gs], axis=0) for gs in means]
    variance = [np.mean(vs, axis=0) for vs in variances]
    whole = sum(s.sum() for s in square)
    total = 0.0
    for s, v in zip(square, variance):
        ratio = arrays.divide(s, v, np.nan) - 1 / n  # r_j
        weight = s / whole  # W_j
        total += np.sum(np.where((v > 0) & (s > 0), weight / (ratio + 1 / n), 0))
        total += np.sum(np.where(s > 0, 0, v)) / whole  # the limit where the mean gradient is zero
    return float(1 - total / n)


def osgr_measured(train_losses, test_losses) -> float:
    """One-step generalisation ratio as measured, (23).

        R = sum_t (L'_t,tau - L'_t,tau+1) / sum_t (L_t,tau - L_t,tau+1)

    Args:
      train_losses: `[M, 2]`, the training loss before and after the step, per training set.
      test_losses: `[M, 2]`, likewise on the test set.

    Raises:
      ValueError: the arrays are not `[M, 2]`.

    Example:

    >>> osgr_measured([[2.0, 1.0], [2.0, 1.5]], [[2.0, 1.25], [2.0, 1.625]])
    0.75
    """
    test, train = _decreases("test_losses", test_losses), _decreases("train_losses", train_losses)
    return ratio_of_sums(test, train)[0]


def osgr_measured_se(train_losses, test_losses, test_decreases=None) -> float:
    """Standard error of `osgr_measured`.

    Over the M training sets by the jackknife; and, where `test_decreases` is given, also from the
    one finite test set that all M share, which the jackknife cannot see:

        Var R ~ jackknife + Var_i(d_i) / n' / (mean_t dL_t)^2

    Args:
      test_decreases: `[n']`, each test example's decrease of the loss, averaged over the M models.
    """
    train = _decreases("train_losses", train_losses)
    se = ratio_of_sums(_decreases("test_losses", test_losses), train)[1]
    if test_decreases is not None:
        d = np.asarray(test_decreases, np.float64)
        se = np.hypot(se, np.sqrt(d.var(ddof=1) / len(d)) / abs(train.mean()))
    return float(se)


def osgr_predicted_se(list_of_moments) -> float:
    """Standard error of `osgr_predicted` over the M training sets, by the jackknife."""
    return ratio_of_sums(*zip(*map(osgr_terms, list_of_moments)))[1]


def ratio_of_sums(numerators, denominators) -> tuple[float, float]:
    """`sum(numerators) / sum(denominators)` and its standard error by the jackknife over entries.

    The error is NaN with fewer than two entries.
    """
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratio = a.sum() / b.sum()
    m = len(a)
    if m < 2:
        return float(ratio), float("nan")
    left_out = (a.sum() - a) / (b.sum() - b)
    return float(ratio), float(np.sqrt((m - 1) * left_out.var()))


def summarize(moments: Moments, model) -> dict:
    """One flat record of numbers: how the gradients of a model's parameters are distributed.

    Keys: `count`, `loss`; `gsnr/mean`, `gsnr/median`, `gsnr/p95` over all parameters that are not
    dead, and `gsnr/<variable path>`, the mean over that variable; `gsnr_corrected/mean` and
    `gsnr_corrected/median`; `same_sign/mean` where signs were counted; `noise_scale`,
    `noise_scale_corrected`, `gradient_diversity`; `osgr_predicted` (24) for this one set;
    `gap_share/<layer>`; `parameters`, and `dead`, how many of them have zero variance (a ReLU
    that is off for every example) and are left out of the averages.

    Args:
      moments: of at least two examples.
      model: for the names of the variables.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False)])
    >>> moments = Moments.of([np.array([[[1.0]], [[3.0]]])], losses=np.zeros(2)).numpy()
    >>> summary = summarize(moments, model)
    >>> summary["gsnr/mean"], summary["noise_scale"], summary["dead"]
    (4.0, 0.25, 0)
    """
    ratios, corrected = gsnr(moments), gsnr(moments, bias_corrected=True)
    whole, whole_corrected = arrays.flat(ratios), arrays.flat(corrected)
    record = {
        "count": arrays.scalar(moments.count),
        "loss": arrays.scalar(moments.loss),
        "gsnr/mean": arrays.mean(whole),
        "gsnr/median": arrays.quantile(whole, 0.5),
        "gsnr/p95": arrays.quantile(whole, 0.95),
        "gsnr_corrected/mean": arrays.mean(whole_corrected),
        "gsnr_corrected/median": arrays.quantile(whole_corrected, 0.5),
    }
    for variable, ratio in zip(model.trainable_variables, ratios):
        record[f"gsnr/{variable.path}"] = arrays.mean(arrays.flat([ratio]))
    if moments.positives:
        record["same_sign/mean"] = arrays.mean(arrays.flat(same_sign(moments)))
    xp = arrays.namespace(whole)
    record |= {
        "noise_scale": noise_scale(moments),
        "noise_scale_corrected": noise_scale(moments, bias_corrected=True),
        "gradient_diversity": gradient_diversity(moments),
        "osgr_predicted": osgr_predicted(moments),
        "parameters": int(np.prod(whole.shape)),
        "dead": arrays.scalar(xp.sum(xp.where(xp.isnan(whole), 1, 0))),
    }
    record |= {f"gap_share/{k}": v for k, v in gap_shares(moments, model).items()}
    return record


def _squared_norm(moments):
    """|g|^2 = sum_j g_j^2"""
    return arrays.total([g**2 for g in arrays.wide(moments.mean)])


def _check_count(moments):
    if not arrays.is_tensor(moments.count) and moments.count < 2:
        raise ValueError(
            f"moments of {int(moments.count)} example(s) have no variance; expected at least 2"
        )


def _check_signs(moments):
    if not moments.positives:
        raise ValueError(
            "moments without sign counts: measure with gradient_moments(..., sign_counts=True)"
        )


def _decreases(name, losses):
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 2 or losses.shape[1] != 2:
        raise ValueError(
            f"{name} has shape {losses.shape}; expected [M, 2]: before and after the step"
        )
    return losses[:, 0] - losses[:, 1]
