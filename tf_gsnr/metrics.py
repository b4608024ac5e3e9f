"""What follows from the moments of per-example gradients: GSNR, OSGR, noise scale and the like.

Pure functions. Given `Moments` of numpy arrays they answer in numpy and sum in float64; given
tensors, in a graph, they answer in tensors. Equation numbers are those of Liu et al., ICLR 2020.

What is shown is corrected for the finite number of examples, and NaN where the signal cannot be
told from zero (`significance.py`): by default everywhere. `bias_corrected=False` gives the plain
estimators of the paper, which are never NaN for that reason. A variable whose moments are NaN was
not measured: it is left out of every sum and mean.

Index letters: n the number of examples, j parameter, t training set (1..M), i test example, k one
of K independent batches of B examples (of one `Moments`: K = 1, B = n).
    g_j = moments.mean, the mean gradient;   rho2_j = moments.variance(), the sample-wise variance
    s2_j = moments.variance(1), its unbiased estimate;   tr = sum_j s2_j
"""

from __future__ import annotations

import numpy as np

from tf_gsnr import arrays, checks, significance
from tf_gsnr import moments as of_gradients
from tf_gsnr.moments import Moments


def gsnr(moments: Moments, bias_corrected: bool = True) -> list:
    """Gradient signal-to-noise ratio of every parameter, (25).

        r_j = (g_j^2 - s2_j / n) / s2_j     with s2 the unbiased variance, ddof 1
        plain: g_j^2 / rho2_j

    Since E g_j^2 = gt_j^2 + rho2_j / n, the plain one, which is the paper's, overestimates the
    ratio of the distribution by about 1/n: a batch of 32 adds 0.03, as much as the usual value.
    The corrected one may be negative.

    Returns:
      A list in the order of the variables, of their shapes; NaN where the variance is zero.

    Raises:
      ValueError: fewer than two examples.

    Example:

    >>> moments = Moments.of([np.array([[1.0], [3.0]])], losses=np.zeros(2)).numpy()
    >>> gsnr(moments)[0].tolist(), gsnr(moments, bias_corrected=False)[0].tolist()
    ([1.5], [4.0])
    """
    _check_count(moments)
    checks.boolean("bias_corrected", bias_corrected)
    ddof = 1 if bias_corrected else 0
    ratios = []
    for mean, variance in zip(arrays.wide(moments.mean), arrays.wide(moments.variance(ddof))):
        ratio = arrays.divide(mean**2, variance, np.nan)
        ratios.append(ratio - 1 / arrays.like(ratio, moments.count) if bias_corrected else ratio)
    return ratios


def same_sign(moments: Moments, bias_corrected: bool = True) -> list:
    """How far the signs of the examples' gradients agree, per parameter (figure 5c).

        the chance that two examples agree,  (n+ (n+ - 1) + n- (n- - 1)) / (n (n - 1))
        plain: the majority's share,         max(n+, n-) / n

    with n = n+ + n- over the examples whose gradient is not zero. For signs that are a coin's
    the first is 1/2 on average, at any n; the second, the paper's, is 0.57 at n = 32 by chance and
    0.69 at n = 4.

    Returns:
      A list in the order of the variables, of their shapes; NaN where fewer than two examples (the
      plain one: no example) have a gradient.

    Raises:
      ValueError: the moments hold no sign counts.

    Example:

    >>> gradients, losses = [np.array([[-5.0], [1.0], [1.0], [0.0]])], np.zeros(4)
    >>> moments = Moments.of(gradients, losses, sign_counts=True).numpy()
    >>> [same_sign(moments, bias_corrected=b)[0].round(2).tolist() for b in (True, False)]
    [[0.33], [0.67]]
    """
    _check_signs(moments)
    checks.boolean("bias_corrected", bias_corrected)
    shares = []
    for counts in zip(moments.positives, moments.negatives):
        positive, negative = map(arrays.like_float, counts)
        n, xp = positive + negative, arrays.namespace(positive)
        if bias_corrected:  # n (n - 1) - 2 n+ n- over n (n - 1)
            split = arrays.divide(2 * positive * negative, n * (n - 1), np.nan)
            shares.append(1 - split)
        else:
            shares.append(arrays.divide(xp.maximum(positive, negative), n, np.nan))
    return shares


def step_sign(moments: Moments) -> list:
    """Share of the examples whose gradient has the sign of the mean gradient, per parameter.

    Over the examples whose gradient is not zero: those for which the step of the whole set goes
    the right way. It may be below one half, where a few large gradients outweigh many small ones.

    Returns and raises as the plain `same_sign`.

    Example:

    >>> gradients, losses = [np.array([[-5.0], [1.0], [1.0], [0.0]])], np.zeros(4)
    >>> moments = Moments.of(gradients, losses, sign_counts=True).numpy()
    >>> step_sign(moments)[0].round(2).tolist(), same_sign(moments, False)[0].round(2).tolist()
    ([0.33], [0.67])
    """
    _check_signs(moments)
    shares = []
    for mean, positive, negative in zip(moments.mean, moments.positives, moments.negatives):
        xp = arrays.namespace(positive)
        agreeing = arrays.like_float(xp.where(mean > 0, positive, negative))
        shares.append(arrays.divide(agreeing, arrays.like_float(positive + negative), np.nan))
    return shares


def noise_scale(moments: Moments, bias_corrected: bool = True):
    """Gradient noise scale tr(Sigma) / |G|^2 (McCandlish et al. 2018), in examples.

    The batch size at which the noise of the mean gradient is as large as the gradient.

        tr / (|g|^2 - tr / n)
        plain: sum_j rho2_j / |g|^2

    Returns:
      A float (a scalar tensor in a graph); NaN where |G|^2 cannot be told from zero (plain: is 0).
    """
    signal, trace, told = _sums(moments, bias_corrected)
    return arrays.scalar(_where(told, trace, signal))


def osgr(moments: Moments, examples: int | None = None, bias_corrected: bool = True):
    """One-step generalisation ratio (19) of a training set of N examples, from the moments of any.

        R = |G|^2 / (|G|^2 + tr(Sigma) / N)      with |G|^2 = |g|^2 - tr / n
        plain: |g|^2 / (|g|^2 + sum_j rho2_j / N)

    For the paper's estimator, of training sets that one has, see `osgr_predicted`.

    Args:
      examples: N, the number of training examples; default: n.

    Returns:
      A float between 0 and 1 (a scalar tensor in a graph); NaN where |G|^2 cannot be told from 0.

    Raises:
      ValueError: `examples` is no positive integer.
    """
    if examples is not None and not _is_symbolic(examples):
        examples = checks.positive_integer(
            "examples", examples, ", the number of training examples"
        )
    signal, trace, told = _sums(moments, bias_corrected)
    n = _examples(trace, moments) if examples is None else examples
    return arrays.scalar(_where(told, signal, signal + trace / n))


def gradient_diversity(moments: Moments):
    """sum_n |g[n]|^2 / |sum_n g[n]|^2 (Yin et al. 2018): 1/n where all agree, larger where not.

    NaN where the mean gradient is zero.
    """
    _check_count(moments, least=1)
    signal = _squared_norm(moments)
    n = arrays.like(signal, moments.count)
    squares = _total(moments.m2) + n * signal
    return arrays.scalar(arrays.divide(squares, n**2 * signal, np.nan))


def osgr_terms(moments: Moments) -> tuple:
    """The two sums of (19): `(sum_j rho2_j / n, sum_j g_j^2)`; what a step adds to the gap, over
    lambda, and by how much it lowers the training loss, over lambda."""
    _check_count(moments)
    noise = _total(moments.variance())
    noise = noise / arrays.like(noise, moments.count)
    return arrays.scalar(noise), arrays.scalar(_squared_norm(moments))


def gap_growth(moments: Moments, learning_rate: float):
    """Expected growth of the generalisation gap in one step, lambda sum_j rho2_j / n, (14).

    Args:
      moments: of the whole training set, of size n, on which the full-batch step is made.
      learning_rate: lambda.

    Returns:
      A float in units of the loss.

    Raises:
      ValueError: `learning_rate` is below zero, or no number.
    """
    if not _is_symbolic(learning_rate):
        learning_rate = checks.number(
            "learning_rate", learning_rate, "a number from 0 on", lambda value: value >= 0
        )
    return osgr_terms(moments)[0] * learning_rate


def gap_shares(moments: Moments, model) -> dict:
    """From which layers the gap comes: each layer's share of (14); they sum to 1.

    NaN for a layer that was not measured.

    Returns:
      `{layer path: share}` in the order of the model.

    Raises:
      ValueError: the moments are not of this model.
    """
    _check_count(of_gradients.check_of_model(moments, model), least=1)
    variances = moments.variance()
    totals = {
        layer: _total([variances[i] for i in indices], of_none=np.nan)
        for layer, indices in by_layer([v.path for v in model.trainable_variables]).items()
    }
    whole = _total(totals.values())
    shares = {layer: arrays.divide(total, whole, np.nan) for layer, total in totals.items()}
    return {layer: arrays.scalar(share) for layer, share in shares.items()}


def by_layer(paths) -> dict:
    """Which variables are of one layer: `{layer path: [indices]}`.

    >>> by_layer(["net/dense/kernel", "net/dense/bias", "scale"])
    {'net/dense': [0, 1], 'scale': [2]}
    """
    expected = "a list of variables' paths"
    checks.instance("paths", paths, (list, tuple), expected)
    layers = {}
    for index, path in enumerate(paths):
        checks.instance("paths", path, str, expected)
        layers.setdefault(path.rpartition("/")[0] or path, []).append(index)
    return layers


def osgr_predicted(list_of_moments) -> float:
    """One-step generalisation ratio predicted from gradients alone, (24).

        R = 1 - [ sum_t sum_j rho2_tj / n ] / [ sum_t sum_j g_tj^2 ]

    Args:
      list_of_moments: `Moments` of each of the M training sets (or one `Moments`).

    Returns:
      A float: a ratio of sums over the training sets, never a mean of ratios.

    Raises:
      ValueError: no list of moments, or of different networks or numbers of examples.
    """
    list_of_moments = of_gradients.check_alike("list_of_moments", list_of_moments)
    noise, signal = zip(*map(osgr_terms, list_of_moments))
    return 1 - arrays.scalar(arrays.divide(sum(noise), sum(signal), np.nan))


def osgr_from_gsnr(list_of_moments) -> float:
    """The same number as `osgr_predicted`, by way of the GSNR, (22).

        R = 1 - 1/n sum_j W_j / (r_j + 1/n),   W_j = E dL_j / E dL = E g_j^2 / sum_j E g_j^2

    with E the mean over the training sets and r_j = E g_j^2 / E rho2_j - 1/n.
    """
    list_of_moments = of_gradients.check_alike("list_of_moments", list_of_moments)
    n = list_of_moments[0].count
    # Per parameter, the means over the training sets of g^2 and of rho2.
    means = zip(*(arrays.wide(m.mean) for m in list_of_moments))
    variances = zip(*(arrays.wide(m.variance()) for m in list_of_moments))
    square = [np.mean([g**2 for g in gs], axis=0) for gs in means]
    variance = [np.mean(vs, axis=0) for vs in variances]
    total_square = sum(s.sum() for s in square)
    total = 0.0
    for s, v in zip(square, variance):
        ratio = arrays.divide(s, v, np.nan) - 1 / n  # r_j
        weight = s / total_square  # W_j
        total += np.sum(np.where((v > 0) & (s > 0), weight / (ratio + 1 / n), 0))
        total += (
            np.sum(np.where(s > 0, 0, v)) / total_square
        )  # the limit where the mean gradient is zero
    return float(1 - total / n)


def osgr_measured(train_losses, test_losses) -> float:
    """One-step generalisation ratio as measured, (23).

        R = sum_t (L'_t,tau - L'_t,tau+1) / sum_t (L_t,tau - L_t,tau+1)

    Args:
      train_losses: `[M, 2]`, the training loss before and after the step, per training set.
      test_losses: `[M, 2]`, likewise on the test set.

    Raises:
      ValueError: the arrays are not `[M, 2]`, of one M, or not finite.

    Example:

    >>> osgr_measured([[2.0, 1.0], [2.0, 1.5]], [[2.0, 1.25], [2.0, 1.625]])
    0.75
    """
    train, test = _decreases(train_losses, test_losses)
    return ratio_of_sums(test, train)[0]


def osgr_measured_se(train_losses, test_losses, test_decreases=None) -> float:
    """Standard error of `osgr_measured`.

    Over the M training sets by the jackknife; and, where `test_decreases` is given, also from the
    one finite test set that all M share, which the jackknife cannot see:

        Var R ~ jackknife + Var_i(d_i) / n' / (mean_t dL_t)^2

    Args:
      test_decreases: `[n']`, each test example's decrease of the loss, averaged over the M models.
    """
    train, test = _decreases(train_losses, test_losses)
    se = ratio_of_sums(test, train)[1]
    if test_decreases is not None:
        d = checks.array(
            "test_decreases",
            test_decreases,
            "[n'] numbers, two at least, one for each test example",
            lambda d: d.ndim == 1 and len(d) > 1,
        )
        se = np.hypot(se, np.sqrt(d.var(ddof=1) / len(d)) / abs(train.mean()))
    return float(se)


def osgr_predicted_se(list_of_moments) -> float:
    """Standard error of `osgr_predicted` over the M training sets, by the jackknife."""
    list_of_moments = of_gradients.check_alike("list_of_moments", list_of_moments)
    return ratio_of_sums(*zip(*map(osgr_terms, list_of_moments)))[1]


def ratio_of_sums(numerators, denominators) -> tuple[float, float]:
    """`sum(numerators) / sum(denominators)` and its standard error by the jackknife over entries.

    The error is NaN with fewer than two entries.
    """
    expected = "[M] numbers, as many numerators as denominators"
    b = checks.array("denominators", denominators, expected, lambda b: b.ndim == 1, finite=False)
    a = checks.array("numerators", numerators, expected, lambda a: a.shape == b.shape, finite=False)
    ratio = a.sum() / b.sum()
    m = len(a)
    if m < 2:
        return float(ratio), float("nan")
    left_out = (a.sum() - a) / (b.sum() - b)
    return float(ratio), float(np.sqrt((m - 1) * left_out.var()))


def summarize(moments: Moments, model) -> dict:
    """One flat record of numbers: how the gradients of a model's parameters are distributed.

    Keys: `count`, `loss`; `gsnr/mean`, `gsnr/median`, `gsnr/p95` over all parameters that are not
    dead, and `gsnr/<variable path>`, the mean over that variable; `same_sign/mean` where signs were
    counted; `noise_scale`; `osgr_predicted`, the `osgr` of n training examples; all corrected, and
    NaN where the signal cannot be told from zero. The paper's plain estimates of the same:
    `gsnr_plain/mean`, `gsnr_plain/median`, `gsnr_plain/p95`, `same_sign_plain/mean`,
    `noise_scale_plain`, `osgr_predicted_plain` (24). `gradient_diversity`; `gap_share/<layer>`;
    `parameters`, and `dead`, how many of them have zero variance (a ReLU that is off for every
    example) and are left out of the averages.

    Args:
      moments: of at least two examples.
      model: that they are of, for the names of its variables.

    Raises:
      ValueError: fewer than two examples; or the moments are not of this model.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False)])
    >>> rows = np.linspace(2.0, 4.0, 9).reshape([9, 1, 1])
    >>> summary = summarize(Moments.of([rows], losses=np.zeros(9)).numpy(), model)
    >>> round(summary["gsnr/mean"], 2), round(summary["gsnr_plain/mean"], 2), summary["dead"]
    (19.09, 21.6, 0)
    """
    of_gradients.check_of_model(moments, model)
    ratios, plain = gsnr(moments), gsnr(moments, bias_corrected=False)
    all_ratios, whole_plain = arrays.flat(ratios), arrays.flat(plain)
    mean = _shown_mean(moments, ratios)
    hidden = arrays.namespace(all_ratios).isnan(mean)
    record = {"count": arrays.scalar(moments.count), "loss": arrays.scalar(moments.loss)}
    record["gsnr/mean"] = arrays.scalar(mean)
    for name, q in (("median", 0.5), ("p95", 0.95)):
        value = arrays.quantile(all_ratios, q)
        record[f"gsnr/{name}"] = arrays.scalar(arrays.choose(hidden, mean, value))
    for index, variable in enumerate(model.trainable_variables):
        value = _shown_mean(part_of(moments, [index]), [ratios[index]])
        record[f"gsnr/{variable.path}"] = arrays.scalar(value)
    if moments.positives:
        for name, corrected in (("same_sign", True), ("same_sign_plain", False)):
            shares = arrays.flat(same_sign(moments, corrected))
            record[f"{name}/mean"] = arrays.mean(shares)
    xp = arrays.namespace(all_ratios)
    record |= {
        "noise_scale": noise_scale(moments),
        "osgr_predicted": osgr(moments),
        "gsnr_plain/mean": arrays.mean(whole_plain),
        "gsnr_plain/median": arrays.quantile(whole_plain, 0.5),
        "gsnr_plain/p95": arrays.quantile(whole_plain, 0.95),
        "noise_scale_plain": noise_scale(moments, bias_corrected=False),
        "osgr_predicted_plain": osgr_predicted(moments),
        "gradient_diversity": gradient_diversity(moments),
        "parameters": int(np.prod(all_ratios.shape)),
        "dead": arrays.scalar(sum(xp.sum(xp.where(v == 0, 1, 0)) for v in moments.m2)),
    }
    record |= {f"gap_share/{k}": v for k, v in gap_shares(moments, model).items()}
    return record


def why_nan(moments: Moments, model, record: dict) -> dict:
    """Why numbers of `summarize` are NaN: `{reason: [names]}`."""
    of_gradients.check_of_model(moments, model)
    checks.instance("record", record, dict, "a record of summarize")
    reasons = {}
    paths = [v.path for v in model.trainable_variables]
    varied = [np.sum(m2) > 0 for m2 in moments.m2]
    varies = {f"gsnr/{k}": any(varied[i] for i in of) for k, of in by_layer(paths).items()}
    varies |= {f"gsnr/{path}": one for path, one in zip(paths, varied)}
    anything = any(varied)
    for name, value in record.items():
        shown = name.startswith("gsnr/") or name in ("noise_scale", "osgr_predicted")
        if shown and np.isnan(value):
            why = significance.NOTHING_VARIES
            if varies.get(name, anything):
                why = significance.why_not_told(int(moments.count), 1)
            reasons.setdefault(why, []).append(name)
    return reasons


def mean_gsnr(moments: Moments) -> float:
    """The mean of r_j over these parameters; NaN where it cannot be told from zero."""
    return arrays.scalar(_shown_mean(moments, gsnr(moments)))


def part_of(moments: Moments, indices) -> Moments:
    """The moments of some variables."""
    expected = f"a list of integers from 0 to {len(moments.mean) - 1}, places of variables"
    checks.instance("indices", indices, (list, tuple, range, np.ndarray), expected)
    for i in indices:
        checks.integer("indices", i, 0, len(moments.mean) - 1, expected)
    lists = (moments.mean, moments.m2, moments.positives, moments.negatives)
    return Moments(
        moments.count, moments.loss, *([v[i] for i in indices] if v else [] for v in lists)
    )


def _shown_mean(moments, ratios):
    """The mean of r_j over these variables; NaN where it cannot be told from zero."""
    told, bound = _told(moments)
    value = arrays.mean(arrays.flat(ratios))
    told &= significance.mean_told_from_zero(value, bound, _examples(value, moments), 1)
    return arrays.choose(told, value, np.nan)


def _told(moments):
    """`significance.told_from_zero` of one set of examples."""
    variances = arrays.wide(moments.variance(1))
    trace, diagonal = _total(variances), _total([v**2 for v in variances])
    n = _examples(trace, moments)
    signal = n * _squared_norm(moments) - trace
    return significance.told_from_zero(signal, trace, trace**2, diagonal, n, 1)


def _sums(moments, bias_corrected=True):
    """`(|G|^2, tr(Sigma), whether the former can be told from zero)`."""
    _check_count(moments)
    checks.boolean("bias_corrected", bias_corrected)
    trace = _total(moments.variance(1 if bias_corrected else 0))
    signal = _squared_norm(moments)
    if not bias_corrected:
        return signal, trace, signal > 0
    return signal - trace / _examples(trace, moments), trace, _told(moments)[0]


def _examples(like, moments):
    """n as a float."""
    return arrays.like(like, moments.count) if arrays.is_tensor(like) else float(moments.count)


def _where(told, numerator, denominator):
    """Their ratio where it is told, else NaN."""
    return arrays.choose(told, arrays.divide(numerator, denominator, np.nan), np.nan)


def _total(values, of_none=0.0):
    """The sum over all entries of all arrays that were measured."""
    sums = [arrays.total([v]) for v in values]
    xp = arrays.namespace(sums[0])
    known = [arrays.choose(xp.isnan(v), 0.0, v) for v in sums]
    none = sum(arrays.choose(xp.isnan(v), 1.0, 0.0 * k) for v, k in zip(sums, known)) == len(sums)
    return arrays.choose(none, np.float64(of_none), sum(known))


def _squared_norm(moments):
    """|g|^2 = sum_j g_j^2"""
    return _total([g**2 for g in arrays.wide(moments.mean)])


def _is_symbolic(value) -> bool:
    """Whether it is a tensor of a graph, which has no value yet."""
    return arrays.is_tensor(value) and not hasattr(value, "numpy")


def _check_count(moments, least=2):
    of_gradients.check(moments)
    if not arrays.is_tensor(moments.count) and moments.count < least:
        raise ValueError(
            f"moments of {int(moments.count)} example(s) have no variance; expected at least "
            f"{least}"
        )


def _check_signs(moments):
    of_gradients.check(moments)
    if not moments.positives:
        raise ValueError(
            "moments without sign counts: measure with gradient_moments(..., sign_counts=True)"
        )


def _decreases(train_losses, test_losses):
    """Of the training and of the test losses, `[M]` each."""
    expected = "[M, 2] losses before and after the step, of as many training sets as test_losses"
    expected += " and train_losses both have"
    test = checks.array("test_losses", test_losses, expected, lambda v: v.shape[1:] == (2,))
    train = checks.array("train_losses", train_losses, expected, lambda v: v.shape == test.shape)
    return train[:, 0] - train[:, 1], test[:, 0] - test[:, 1]
