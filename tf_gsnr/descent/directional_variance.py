"""The summed variance of examples' own gradients where no backward pass hands them out.

With batch normalisation the statistics s are those of the whole training set D, at evaluation too
(appendix A.2), so they are functions of the weights theta:

    L[D](theta) = 1/n sum_n l_n(theta, s_D(theta)),    L[D'](theta) likewise, with the same s_D

Gradient descent follows the true gradient of L[D], which flows through s_D. An example's own
gradient in (19) is the total one as well, for training and test examples alike:

    G_n = dl_n/dtheta + dl_n/ds ds_D/dtheta

Then g_D = mean_n G_n over D is the gradient of L[D], g_D' over D' that of L[D'], and (9) to (19)
hold as they stand, but for this: D's examples are not independent draws given s_D. Two other
gradients are easy to have, and neither will do. With the statistics as constants, the first term
alone is left; its mean is not the gradient of L[D]. An example's part of the batch's gradient, what
a backward pass through batch norm shows row by row, has the right mean; but it is what the example
does to all losses through s_D, not what all examples' statistics do to its loss.

Of (19) only sums over the parameters are needed, and for random signs v (Hutchinson 1990)

    E_v Var_n(v . G_n) = sum_j rho2_j        v_j = +1 or -1, independent

where the slopes v . G_n of all examples' losses along v come from one pass in forward mode.

Index letters: n example, j parameter, k direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

DIRECTIONS = 4  # [ours] of one training set; those of the M sets are independent


def summed_variance(losses_of: Callable, parameters: Sequence, valid, seed):
    """An unbiased estimate of sum_j rho2_j, from `DIRECTIONS` directions; for a graph.

    A single direction is off by a quarter or so, on networks of table 3.

    Args:
      losses_of: `() -> [n]`, the examples' losses, computed from the parameters when called.
      parameters: tensors or variables.
      valid: bool `[n]`, False for padding.
      seed: two integers, from which the directions are drawn.

    Returns:
      A float64 scalar.
    """
    weights = tf.cast(valid, tf.float64)

    def body(k, total):
        signs = directions(parameters, seed, k)
        with tf.autodiff.ForwardAccumulator(list(parameters), signs) as forward:
            losses = losses_of()
        slopes = tf.cast(forward.jvp(losses), tf.float64)  # v . G_n
        return k + 1, total + tf.nn.weighted_moments(slopes, [0], weights)[1]

    start = (0, tf.constant(0, tf.float64))
    loop = tf.while_loop(lambda k, _: k < DIRECTIONS, body, start, parallel_iterations=1)
    return loop[1] / DIRECTIONS


def directions(parameters: Sequence, seed, k) -> list:
    """The k-th random direction of a seed: +1 or -1 for each parameter."""
    seed = tf.random.experimental.stateless_fold_in(seed, k)

    def signs(place, v):
        seed_here = tf.random.experimental.stateless_fold_in(seed, place)
        bits = tf.random.stateless_uniform(v.shape, seed_here, 0, 2, tf.int32)
        return tf.cast(2 * bits - 1, v.dtype)

    return [signs(place, v) for place, v in enumerate(parameters)]
