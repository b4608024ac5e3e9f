"""What can be told from zero: a squared gradient against the noise of its estimate.

The paper has no such test; all of this is ours. It answers in numpy or, given tensors, in tensors.

Index letters: j parameter, k one of K independent batches of B examples (of one set of examples:
K = 1, B = n). G is the true mean gradient, g_j the mean of the examples', s2_j the unbiased
estimate of their variance, tr = sum_j s2_j.
"""

from __future__ import annotations

import numpy as np

from tf_gsnr import arrays

DIRECTIONS = 8  # [ours] in which gradients are taken to vary where nothing says how many they are
STEPS = 8  # [ours] so many batches say by their spread how noisy they are


def told_from_zero(signal, trace, squares, diagonal, examples, steps, products=None):
    """Whether a squared gradient can be told from zero: it is larger than its noise may be.

    A batch's unbiased estimate of B |G|^2 is u_k = B |g|^2 - tr_k. Where G = 0 its mean is 0 and,
    with r = tr(Sigma)^2 / tr(Sigma^2) the number of directions in which gradients vary,
    B |g|^2 / tr is a chi-square of r degrees of freedom over one of r (B - 1): an F distribution.
    So with all batches together, of K' = (sum_k tr_k)^2 / sum_k tr_k^2 that count,

        sum_k u_k / sum_k tr_k  is  F(r K', r K' (B - 1)) - 1,

    and G is told from zero if that is above the mean and two standard deviations of this. For r = 8
    and many examples it is |G|^2 > tr / (B sqrt(K)). Where r is not known it is taken to be 8, or
    (sum_j s2_j)^2 / sum_j s2_j^2 where that is less: r is at most that. (On networks for MNIST it
    was 9 to 29, less for a layer's biases.) From K' = `STEPS` on, the batches' own spread
    around their common ratio q = sum_k u_k / sum_k tr_k replaces that guess:

        sum_k u_k > 2 sqrt( K' / (K' - 1) sum_k (u_k - q tr_k)^2 ).

    Without signal, 0 to 5 % of simulated draws pass over B from 2 to 500, K from 1 to 64 and r from
    1 to 30 (8 % at the worst, r = 1 of K = 4 unequal batches of 8); on MNIST, with gradients whose
    signs are drawn at random, 0 to 7 % for the network (9 % for one batch of 4).

    Args:
      signal, trace, squares, diagonal: the sums over k of u_k, of tr_k, of tr_k^2, and of
        sum_j s2_j^2.
      examples, steps: K B and K.
      products: the sums over k of u_k tr_k and of u_k^2; None for one batch.

    Returns:
      `(told, bound)`: whether it is, and the least sum_k u_k / sum_k tr_k that would be.
    """
    xp = arrays.namespace(trace)
    directions = arrays.divide(trace**2, xp.maximum(diagonal, squares / DIRECTIONS), 0)  # r K'
    below = directions * (examples - steps) / steps
    d = xp.maximum(below, 4 + 1e-3)  # of fewer than 4 degrees of freedom the variance is infinite
    variance = (
        2 * d**2 * (directions + d - 2) / (xp.maximum(directions, 1) * (d - 2) ** 2 * (d - 4))
    )
    bound = 2 / (d - 2) + 2 * xp.sqrt(variance)
    enough = below > 4
    if products is not None:
        count, q = arrays.divide(trace**2, squares, 0), arrays.divide(signal, trace, 0)
        spread = products[1] - 2 * q * products[0] + q**2 * squares
        spread = xp.maximum(spread, 0 * spread) * count / xp.maximum(count - 1, 1 + 0 * count)
        many = count >= STEPS
        bound = xp.where(many, 2 * arrays.divide(xp.sqrt(spread), trace, 0), bound)
        enough = enough | many
    return enough & (signal > bound * trace), bound


def mean_told_from_zero(ratio, bound, examples, steps):
    """Whether a mean of r_j over parameters can be told from zero, given that their |G|^2 can.

        mean_j r_j > ( bound + 2 / (v - 2) ) / B,      v = K (B - 1) > 2

    The bound is that of `told_from_zero`. What is added is the mean of B r_j where there is no
    signal: s2_j is estimated from v degrees of freedom, and v E[1 / chi2_v] is 1 + 2 / (v - 2). It
    is what two to four examples show of nothing.

    Args:
      ratio: the mean.
    """
    return ratio > least_mean(bound, examples, steps)


def least_mean(bound, examples, steps):
    """The least mean of r_j that `mean_told_from_zero` takes; infinite where v <= 0."""
    freedom = examples - steps - 2
    xp = arrays.namespace(bound)
    bias = arrays.divide(2 + 0 * freedom, freedom, np.inf)
    return xp.where(freedom > 0, (bound + bias) * steps / examples, np.inf)


def why_not_told(examples: int, steps: int) -> str:
    """The reason that goes with a NaN."""
    if steps == 1:
        return f"the signal cannot be told from zero with {examples} examples"
    return (
        f"the signal cannot be told from zero with {round(examples / steps)} examples a step and "
        f"{steps} steps"
    )


NOTHING_VARIES = "no gradient was measured that differs from example to example"


def signal_se(signal, trace, diagonal, n) -> float:
    """Standard error of the unbiased estimate |g|^2 - tr / n of |G|^2, about.

        se^2 = 2 tr^2 / (r n^2) + 4 |G|^2 tr / (r n)

    It is that of gradients that vary alike in r directions, the mean gradient's among them; r is
    the number that `told_from_zero` takes. So it is rather too large: on networks for MNIST 1.1 to
    3.7 times the spread over 40 probe sets drawn anew, 1.1 to 1.8 times after the first epoch.

    Args:
      signal: the estimate.
      trace, diagonal: tr and sum_j s2_j^2.
      n: examples.
    """
    r = arrays.divide(trace**2, max(diagonal, trace**2 / DIRECTIONS), 1)
    return float(np.sqrt(2 * trace**2 / (r * n**2) + 4 * max(signal, 0) * trace / (r * n)))


def osgr_se(signal, noise, se) -> float:
    """Standard error of `osgr`, S / (S + V / N), from that of S.

    Args:
      signal, noise, se: S, V / N, and the error of S.
    """
    return float(se * noise / (signal + noise) ** 2)
