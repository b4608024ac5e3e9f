"""Forms of a layer's per-example gradients G[n], and what is wanted of them.

A form never holds more of `[n, parameters]` than it must. It answers with the sum and the spread
over examples, the counts of signs and each example's squared norm. Index letters: n example,
t position within an example, i in, o out, j any parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients.places import Places

BLOCK_BYTES = 32 * 2**20  # of the [n, parameters] that one step of a form materialises
UNKNOWN_BATCH = 1024  # stands for n where it is not known when traced
# Below this share of sum g^2 the spread is computed again from centred gradients: n mean^2 is then
# so close to sum g^2 that their difference would lose digits.
CENTRED_BELOW = 0.02


class Form:
    """Base of the forms: subclasses give `blocks`, the rest follows.

    `blocks()` is a list of functions; each returns some of the parameters' gradients as a matrix
    `[n, j]`, together they are the variable, flattened.
    """

    shape: Sequence[int]
    dtype: Any

    def blocks(self) -> list[Callable]:
        raise NotImplementedError

    def materialise(self):
        """`[n, *shape]`."""
        return tf.reshape(concatenated([block() for block in self.blocks()], 1), [-1, *self.shape])

    def total(self):
        """`sum_n G[n]`."""
        return self._assemble(lambda g: tf.reduce_sum(g, 0))

    def moments(self, count, valid):
        """`(mean, m2)` over the examples.

        Args:
          count: how many examples are valid, at least 1; in the form's dtype.
          valid: `[n]` 0 or 1 in the form's dtype, or None. Others' gradients are zero already.
        """

        def one(g):
            mean = tf.reduce_sum(g, 0) / count
            center = mean if valid is None else valid[:, tf.newaxis] * mean
            return mean, tf.reduce_sum(tf.math.squared_difference(g, center), 0)

        return self._assemble(one)

    def sums(self, sign_counts: bool):
        """`(sum_n G, sum_n G^2)`; if wanted also `n+ - n-` and `n+ + n-`, as floats."""

        def one(g):
            values = [g, tf.square(g)]
            values += [tf.sign(g), tf.abs(tf.sign(g))] if sign_counts else []
            return tuple(total_of(v) for v in values)

        return self._assemble(one)

    def signs(self):
        """`(n+, n-)`, int64: how many examples have `G > 0` and `G < 0`."""
        return self._assemble(
            lambda g: (tf.math.count_nonzero(g > 0, 0), tf.math.count_nonzero(g < 0, 0))
        )

    def square_norms(self):
        """`[n]`: the sum of squares over the parameters."""
        return tf.add_n([tf.reduce_sum(tf.square(block()), 1) for block in self.blocks()])

    def cheap_squares(self):
        """`sum_n |G[n]|^2`, float64, where that takes no gradient of each example; else None."""
        return None

    def sample(self, places: Places):
        """`[n, k]`: G[n] at some places only."""
        parts, start = [], 0
        for block in self.blocks():
            g = block()
            if places.whole or len(self.blocks()) == 1:
                parts.append(g if places.whole else gathered(g, places.flat))
                continue
            inside = places.flat - start
            start += g.shape[1]
            inside = inside[(inside >= 0) & (inside < g.shape[1])]
            parts.append(tf.gather(g, inside, axis=1))
        return concatenated(parts, 1)

    def moments_at(self, places: Places, n, sign_counts: bool):
        """`moments_of(self.sample(places))`, where there is a way without it; else None."""
        return None

    def _assemble(self, fn):
        """`fn` of each block, one after the other, put together in the shape of the variable."""
        parts = []
        for block in self.blocks():
            with tf.control_dependencies(tf.nest.flatten(parts[-1:])):
                parts.append(fn(block()))
        if not isinstance(parts[0], tuple):
            return tf.reshape(concatenated(parts, 0), self.shape)
        return tuple(tf.reshape(concatenated(p, 0), self.shape) for p in zip(*parts))


class Rows(Form):
    """Gradients that are at hand: `G[n]` itself, or a function that makes it."""

    def __init__(self, gradients, shape, dtype):
        self.gradients, self.shape, self.dtype = gradients, tuple(shape), tf.as_dtype(dtype)

    def materialise(self):
        g = self.gradients() if callable(self.gradients) else self.gradients
        return tf.cast(g, self.dtype)

    def blocks(self):
        return [lambda: tf.reshape(self.materialise(), [-1, product(self.shape)])]

    def cheap_squares(self):
        if callable(self.gradients):
            return None
        return tf.cast(tf.reduce_sum(tf.square(self.materialise())), tf.float64)


class Outer(Form):
    """`G[n,i,o] = sum_t x[n,t,i] dz[n,t,o]`, what a matrix product leaves behind.

    Args:
      x: functions, each of which returns some columns `[n, t, i]` of the input; or one tensor.
      dz: `[n, t, o]`, or `[n, o]` (then x is `[n, i]`) where an example has one position.
      shape: of the variable; its leading entries make up i, its last is o.
    """

    def __init__(self, x, dz, shape, dtype):
        self.shape, self.dtype = tuple(shape), tf.as_dtype(dtype)
        self.columns = list(x) if isinstance(x, (list, tuple)) else [lambda: x]
        self.dz = tf.cast(dz, self.dtype)
        self.factored = dz.shape.rank == 2

    def column(self, function):
        return tf.cast(function(), self.dtype)

    def blocks(self):
        return [block for block, _, _ in self.ranges()]

    def ranges(self):
        """`[(block, start, stop), ...]`: blocks, and the inputs of which they are the gradients."""
        n = self.dz.shape[0] or UNKNOWN_BATCH
        outputs = self.dz.shape[-1]
        width = product(self.shape) // outputs // len(self.columns)
        step = max(1, BLOCK_BYTES // (n * outputs * self.dtype.size))
        step = -(-width // -(-width // step))  # blocks of about one size
        return [
            (
                self._block(f, start, min(start + step, width), width),
                start,
                min(start + step, width),
            )
            for f in self.columns
            for start in range(0, width, step)
        ]

    def _block(self, function, start, stop, width):
        def block():
            x = self.column(function)
            if stop - start < width:
                x = x[..., start:stop]
            if self.factored:
                g = x[:, :, tf.newaxis] * self.dz[:, tf.newaxis, :]
            else:
                g = tf.matmul(x, self.dz, transpose_a=True)
            return tf.reshape(g, [-1, (stop - start) * self.dz.shape[-1]])

        return block

    def _flat(self):
        """x and dz as matrices over all positions."""
        x = concatenated([self.column(f) for f in self.columns], -1)
        return tf.reshape(x, [-1, x.shape[-1]]), tf.reshape(self.dz, [-1, self.dz.shape[-1]])

    def total(self):
        x, dz = self._flat()
        return tf.reshape(tf.matmul(x, dz, transpose_a=True), self.shape)

    def moments(self, count, valid):
        if not self.factored:
            return super().moments(count, valid)
        x, dz = self._flat()
        mean = tf.matmul(x, dz / count, transpose_a=True)
        squares = tf.matmul(tf.square(x), tf.square(dz), transpose_a=True)
        m2 = squares - count * tf.square(mean)

        def centred():
            return tf.reshape(Form.moments(self, count, valid)[1], tf.shape(m2))

        def checked():
            cancels = tf.reduce_any(m2 < CENTRED_BELOW * squares)
            return tf.cond(cancels, centred, lambda: m2)

        # By Cauchy and Schwarz n mean^2 is at most the share of examples with x dz != 0, times
        # sum g^2: where each x or each dz is zero now and then (ReLU), there is nothing to check.
        few = (1 - CENTRED_BELOW) * count
        dense = [tf.reduce_any(tf.reduce_sum(_nonzero(v), 0) > few) for v in (x, dz)]
        m2 = tf.cond(dense[0] & dense[1], checked, lambda: m2)
        m2 = tf.ensure_shape(m2, [x.shape[-1], dz.shape[-1]])
        return tf.reshape(mean, self.shape), tf.reshape(m2, self.shape)

    def sums(self, sign_counts):
        if not self.factored:
            return super().sums(sign_counts)
        x, dz = self._flat()
        kinds = [tf.identity, tf.square]
        kinds += [tf.sign, lambda v: tf.abs(tf.sign(v))] if sign_counts else []
        products = [tf.matmul(fn(x), fn(dz), transpose_a=True) for fn in kinds]
        return tuple(tf.reshape(p, self.shape) for p in products)

    def signs(self):
        if not self.factored:
            return super().signs()
        x, dz = self._flat()
        x, dz = tf.sign(x), tf.sign(dz)
        difference = tf.matmul(x, dz, transpose_a=True)  # n+ - n-
        there = tf.matmul(tf.abs(x), tf.abs(dz), transpose_a=True)  # n+ + n-
        counts = (there + difference) / 2, (there - difference) / 2
        return tuple(tf.reshape(tf.cast(c, tf.int64), self.shape) for c in counts)

    def square_norms(self):
        if not self.factored:
            return super().square_norms()
        x = concatenated([self.column(f) for f in self.columns], -1)
        return tf.reduce_sum(tf.square(x), -1) * tf.reduce_sum(tf.square(self.dz), -1)

    def cheap_squares(self):
        if not self.factored:
            return None
        return tf.reduce_sum(tf.cast(self.square_norms(), tf.float64))

    def sample(self, places):
        product = None if places.whole else places.product(self.dz.shape[-1])
        if product is None or len(self.columns) > 1:
            return super().sample(places)
        x = self.column(self.columns[0])
        return products_of_tiles(tiles_of(x, product[0]), tiles_of(self.dz, product[1]))

    def moments_at(self, places, n, sign_counts):
        """By products of the factors, and of their squares and signs: of tiles, or of all."""
        if not self.factored or places.size < FEW or len(self.columns) > 1:
            return None
        x, dz = self.column(self.columns[0]), self.dz
        tiles = None if places.whole else places.product(dz.shape[-1])
        if tiles is not None and MANY * places.size < product(self.shape):
            # Each tile is a small `Outer`: m n a.
            x, dz = (tiles_first(v, index) for v, index in zip((x, dz), tiles))
            index = None
        else:
            index = None if places.whole else places.flat

        def products(fn):
            return tf.reshape(tf.matmul(fn(x), fn(dz), transpose_a=True), [-1])

        kinds = [tf.identity, tf.square]
        kinds += [tf.sign, lambda v: tf.abs(tf.sign(v))] if sign_counts else []
        if x.shape.rank == 3:
            x, dz = (tf.stack([fn(v) for fn in kinds]) for v in (x, dz))
            sums = tf.reshape(tf.matmul(x, dz, transpose_a=True), [-1, places.size])
        else:
            sums = tf.stack([products(fn) for fn in kinds])
        sums = sums if index is None else gathered(sums, index)
        return moments_from_sums(sums, n, lambda: moments_of(self.sample(places), n, False))


MANY = 4  # times the sampled places: of so few in all, whole products take less than tiles
FEW = 1024  # places, at which one matrix for all variables takes fewer operations
# Sums of squares beyond which float32 has lost some of them.
TINY, HUGE = 1e-32, 1e32


def total_of(values):
    """`sum_n values[n, k]`: a product with ones is the fastest sum over examples."""
    return tf.matmul(tf.ones([1, tf.shape(values)[0]], values.dtype), values)[0]


def moments_of(g, n, sign_counts: bool):
    """Of `g [n, k]`: mean, m2 and, if wanted, n+ and n-, float64 `[k]` each."""

    def mean_and_m2(g):
        mean = total_of(g) / tf.cast(n, g.dtype)
        return tf.cast(mean, tf.float64), tf.cast(total_of(tf.square(g - mean)), tf.float64)

    mean, m2 = mean_and_m2(g)
    if g.dtype.size < 8:
        lost = _are_lost(m2 + tf.square(mean), mean)
        mean, m2 = tf.cond(lost, lambda: mean_and_m2(tf.cast(g, tf.float64)), lambda: (mean, m2))
    if not sign_counts:
        return mean, m2
    signs = tf.sign(g)
    return mean, m2, *_counts(total_of(signs), total_of(tf.abs(signs)))


def moments_from_sums(sums, n, centred):
    """As `moments_of`, of sums over the examples `[2 or 4, k]`.

    Args:
      sums: of g, of g^2 and, if wanted, of the signs and of their absolute values.
      centred: returns mean and m2 from centred gradients, where n mean^2 is so close to sum g^2
        that their difference would lose digits, or g^2 is beyond float32.
    """
    total, squares, *signs = tf.unstack(tf.cast(sums, tf.float64))
    mean = total / tf.cast(n, tf.float64)
    m2 = squares - mean * total
    unsafe = tf.reduce_any(m2 < CENTRED_BELOW * squares) | _are_lost(squares, total)
    mean, m2 = tf.cond(unsafe, lambda: tuple(centred()), lambda: (mean, m2))
    return mean, m2, *_counts(*signs)


def _are_lost(squares, total):
    """Whether sums of squares are too small or too large, of gradients that are not zero."""
    return tf.reduce_any((squares < TINY) & (total != 0)) | ~(tf.reduce_max(squares) < HUGE)


def _counts(*signs):
    """n+ and n-, from the sum of the signs and of their absolute values."""
    if not signs:
        return ()
    difference, there = (tf.cast(v, tf.float64) for v in signs)
    return (there + difference) / 2, (there - difference) / 2


def gathered(v, index):
    """`v [..., j]` at the places `index [k]`, a numpy array: `[..., k]`; copied in runs."""
    run = _run(index, v.shape[-1])
    if run == 1:
        return tf.gather(v, index, axis=-1)
    lead = _lead(v)
    v = tf.reshape(v, [*lead, v.shape[-1] // run, run])
    v = tf.gather(v, index[::run] // run, axis=-2)
    return tf.reshape(v, [*lead, len(index)])


def _lead(v) -> list:
    """All lengths of v but the last, as `tf.reshape` takes them; -1 is not known when traced."""
    lead = [-1 if length is None else length for length in v.shape[:-1]]
    return lead if lead.count(-1) < 2 else tf.unstack(tf.shape(v)[:-1])


def _run(index, *lengths):
    """The largest number by which these lengths and `index` divide into runs of neighbours."""
    starts = np.flatnonzero(np.diff(index, prepend=index[0]) != 1)
    return int(np.gcd.reduce([*lengths, index.size, *starts, *index[starts]]))


def tiles_of(v, index):
    """`v [..., c]` at the columns `index [m, a]`: `[..., m, a]`."""
    tiles = gathered(v, index.reshape(-1))
    return tf.reshape(tiles, [*_lead(v), *index.shape])


def tiles_first(v, index):
    """`v [n, c]` at the columns `index [m, a]`: `[m, n, a]`, without a transposition."""
    n, c = tf.shape(v)[0], v.shape[-1]
    run = _run(index.reshape(-1), c, index.shape[1])
    runs = tf.range(n)[:, tf.newaxis] * (c // run) + (index[:, np.newaxis, ::run] // run)
    return tf.reshape(tf.gather(tf.reshape(v, [-1, run]), runs), [len(index), n, index.shape[1]])


def products_of_tiles(x, dz):
    """`sum_t x[n,t,m,a] dz[n,t,m,b]` as `[n, m a b]`; t may be missing."""
    k = x.shape[-2] * x.shape[-1] * dz.shape[-1]
    if x.shape.rank == 3:
        return tf.reshape(x[..., tf.newaxis] * dz[:, :, tf.newaxis], [-1, k])
    x, dz = (tf.transpose(v, [0, 2, 1, 3]) for v in (x, dz))
    return tf.reshape(tf.matmul(x, dz, transpose_a=True), [-1, k])


def _nonzero(v):
    return tf.cast(tf.not_equal(v, 0), v.dtype)


def concatenated(parts, axis):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis)


def product(numbers):
    result = 1
    for number in numbers:
        result *= int(number)
    return result
