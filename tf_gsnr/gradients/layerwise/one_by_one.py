"""Gradients that are made for one example after the other, and never kept.

Where the gradients of all examples at once would not fit. Index letters: n example.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tf_gsnr.gradients.layerwise.dense_forms import Form, product


class OneByOne(Form):
    """`G[n]` by a function of n; every question goes once through the examples, `moments` twice.

    Args:
      gradient: the number of an example, a scalar tensor -> `[*shape]`.
      n: the number of examples.
    """

    def __init__(self, gradient: Callable, n, shape, dtype):
        self.gradient, self.n = gradient, n
        self.shape, self.dtype = tuple(shape), tf.as_dtype(dtype)

    def _example(self, i):
        return tf.ensure_shape(tf.cast(self.gradient(i), self.dtype), self.shape)

    def _added(self, fn, count, dtype=None):
        """The sums over the examples of `fn(i, G[i])`, a tuple of so many arrays."""

        def step(i, *totals):
            values = fn(i, self._example(i))
            return i + 1, *(a + tf.cast(b, a.dtype) for a, b in zip(totals, values))

        zeros = [tf.zeros(self.shape, dtype or self.dtype)] * count
        loop = tf.while_loop(
            lambda i, *_: i < self.n, step, (tf.constant(0), *zeros), parallel_iterations=1
        )
        return loop[1:]

    def _each(self, fn, shape):
        """`fn(G[n])` of every example, `[n, *shape]`."""
        return tf.map_fn(
            lambda i: fn(self._example(i)),
            tf.range(self.n),
            fn_output_signature=tf.TensorSpec(shape, self.dtype),
            parallel_iterations=1,
        )

    def materialise(self):
        return self._each(lambda g: g, self.shape)

    def blocks(self):
        return [lambda: tf.reshape(self.materialise(), [-1, product(self.shape)])]

    def total(self):
        return self._added(lambda i, g: (g,), 1)[0]

    def moments(self, count, valid):
        mean = self.total() / count

        def spread(i, g):
            center = mean if valid is None else valid[i] * mean
            return (tf.math.squared_difference(g, center),)

        return mean, self._added(spread, 1)[0]

    def sums(self, sign_counts):
        def one(i, g):
            signs = (tf.sign(g), tf.abs(tf.sign(g))) if sign_counts else ()
            return g, tf.square(g), *signs

        return self._added(one, 4 if sign_counts else 2)

    def signs(self):
        return self._added(lambda i, g: (g > 0, g < 0), 2, tf.int64)

    def square_norms(self):
        return self._each(lambda g: tf.reduce_sum(tf.square(g)), [])

    def sample(self, places):
        if places.whole:
            return self.blocks()[0]()
        return self._each(lambda g: tf.gather(tf.reshape(g, [-1]), places.flat), [places.size])
