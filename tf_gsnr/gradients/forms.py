"""Forms of a layer's per-example gradients G[n], and what is wanted of them.

A form never holds more of `[n, parameters]` than it must. It answers with the sum and the spread
over examples, the counts of signs and each example's squared norm. Index letters: n example,
t position within an example, i in, o out, v vocabulary entry, j any parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

BLOCK_BYTES = 32 * 2**20  # of the [n, parameters] that one step of a form materialises
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
        return tf.reshape(_concat([block() for block in self.blocks()], 1), [-1, *self.shape])

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

    def signs(self):
        """`(n+, n-)`, int64: how many examples have `G > 0` and `G < 0`."""
        return self._assemble(
            lambda g: (tf.math.count_nonzero(g > 0, 0), tf.math.count_nonzero(g < 0, 0))
        )

    def square_norms(self):
        """`[n]`: the sum of squares over the parameters."""
        return tf.add_n([tf.reduce_sum(tf.square(block()), 1) for block in self.blocks()])

    def _assemble(self, fn):
        """`fn` of each block, put together in the shape of the variable."""
        parts = [fn(block()) for block in self.blocks()]
        if not isinstance(parts[0], tuple):
            return tf.reshape(_concat(parts, 0), self.shape)
        return tuple(tf.reshape(_concat(p, 0), self.shape) for p in zip(*parts))


class Rows(Form):
    """Gradients that are at hand: `G[n]` itself, or a function that makes it."""

    def __init__(self, gradients, shape, dtype):
        self.gradients, self.shape, self.dtype = gradients, tuple(shape), tf.as_dtype(dtype)

    def materialise(self):
        g = self.gradients() if callable(self.gradients) else self.gradients
        return tf.cast(g, self.dtype)

    def blocks(self):
        return [lambda: tf.reshape(self.materialise(), [-1, _product(self.shape)])]


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
        n = self.dz.shape[0] or 1024
        outputs = self.dz.shape[-1]
        blocks = []
        for function in self.columns:
            width = _product(self.shape) // outputs // len(self.columns)
            step = max(1, BLOCK_BYTES // (n * outputs * self.dtype.size))
            step = -(-width // -(-width // step))  # blocks of about one size
            for start in range(0, width, step):
                blocks.append(self._block(function, start, min(start + step, width), width))
        return blocks

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
        x = _concat([self.column(f) for f in self.columns], -1)
        return tf.reshape(x, [-1, x.shape[-1]]), tf.reshape(self.dz, [-1, self.dz.shape[-1]])

    def total(self):
        x, dz = self._flat()
        return tf.reshape(tf.matmul(x, dz, transpose_a=True), self.shape)

    def moments(self, count, valid):
        if not self.factored:
            return super().moments(count, valid)
        x, dz = self._flat()
        # dz / sqrt(n) makes the product sqrt(n) mean, whose square is what m2 lacks.
        root = tf.sqrt(count)
        scaled = tf.matmul(x, dz / root, transpose_a=True)
        m2 = tf.matmul(tf.square(x), tf.square(dz), transpose_a=True) - tf.square(scaled)
        mean = scaled / root

        def centred():
            return tf.reshape(Form.moments(self, count, valid)[1], tf.shape(m2))

        def checked():
            # m2 < share sum g^2, which is m2 + n mean^2
            share = CENTRED_BELOW / (1 - CENTRED_BELOW)
            cancels = tf.reduce_any(m2 < share * count * tf.square(mean))
            return tf.cond(cancels, centred, lambda: m2)

        # By Cauchy and Schwarz n mean^2 is at most the share of examples with x dz != 0, times
        # sum g^2: where each x or each dz is zero now and then (ReLU), there is nothing to check.
        few = (1 - CENTRED_BELOW) * count
        dense = [tf.reduce_any(tf.reduce_sum(_nonzero(v), 0) > few) for v in (x, dz)]
        m2 = tf.cond(dense[0] & dense[1], checked, lambda: m2)
        m2 = tf.ensure_shape(m2, [x.shape[-1], dz.shape[-1]])
        return tf.reshape(mean, self.shape), tf.reshape(m2, self.shape)

    def signs(self):
        if not self.factored:
            return super().signs()
        x, dz = self._flat()
        up = tf.cast(tf.concat([x > 0, x < 0], 0), self.dtype)
        positive = tf.cast(tf.concat([dz > 0, dz < 0], 0), self.dtype)
        negative = tf.cast(tf.concat([dz < 0, dz > 0], 0), self.dtype)
        counts = [tf.matmul(up, side, transpose_a=True) for side in (positive, negative)]
        return tuple(tf.reshape(tf.cast(c, tf.int64), self.shape) for c in counts)

    def square_norms(self):
        if not self.factored:
            return super().square_norms()
        x = _concat([self.column(f) for f in self.columns], -1)
        return tf.reduce_sum(tf.square(x), -1) * tf.reduce_sum(tf.square(self.dz), -1)


class Sparse(Form):
    """Rows of a table: `G[n,v,o] = sum_t [ids[n,t] = v] dz[n,t,o]`, most of which are zero.

    Args:
      ids: `[n, t]` integers.
      dz: `[n, t, o]`.
      shape: `(vocabulary, o)`.
    """

    def __init__(self, ids, dz, shape, dtype):
        self.shape, self.dtype = tuple(shape), tf.as_dtype(dtype)
        self.ids, self.dz = tf.cast(ids, tf.int64), tf.cast(dz, self.dtype)

    def _rows(self):
        """Each example's distinct entries: `(example [s], entry [s], gradient [s, o])`.

        There are as many slots s as tokens, since a shape must not depend on the ids; those left
        over have the entry -1, which sums over segments pass by.
        """
        n, t = tf.shape(self.ids)[0], tf.shape(self.ids)[1]
        slots, entries = n * t, tf.cast(self.shape[0], tf.int64)
        example = tf.repeat(tf.range(n, dtype=tf.int64), t)
        key = example * entries + tf.reshape(self.ids, [-1])
        order = tf.argsort(key)
        key = tf.gather(key, order)
        fresh = tf.concat([tf.zeros([1], tf.int32), tf.cast(key[1:] != key[:-1], tf.int32)], 0)
        slot = tf.cumsum(fresh)
        dz = tf.gather(tf.reshape(self.dz, [-1, self.shape[1]]), order)
        rows = tf.math.unsorted_segment_sum(dz, slot, slots)
        keys = tf.math.unsorted_segment_max(key, slot, slots)
        empty = tf.range(slots) > slot[-1]
        none = tf.constant(-1, tf.int64)
        keys = tf.where(empty, tf.zeros_like(none), keys)
        return keys // entries, tf.where(empty, none, keys % entries), rows

    def _per_entry(self, values, entries):
        return tf.math.unsorted_segment_sum(values, entries, self.shape[0])

    def materialise(self):
        example, entry, rows = self._rows()
        n = tf.shape(self.ids, tf.int64)[0]
        place = tf.where(entry < 0, entry, example * self.shape[0] + entry)
        g = tf.math.unsorted_segment_sum(rows, place, n * self.shape[0])
        return tf.reshape(g, [-1, *self.shape])

    def blocks(self):
        return [lambda: tf.reshape(self.materialise(), [-1, _product(self.shape)])]

    def total(self):
        return self._per_entry(tf.reshape(self.dz, [-1, self.shape[1]]), tf.reshape(self.ids, [-1]))

    def moments(self, count, valid):
        example, entry, rows = self._rows()
        mean = self._per_entry(rows, entry) / count
        there = tf.ones_like(rows[:, 0]) if valid is None else tf.gather(valid, example)
        deviation = rows - there[:, tf.newaxis] * tf.gather(mean, tf.maximum(entry, 0))
        absent = count - self._per_entry(there, entry)
        m2 = self._per_entry(tf.square(deviation), entry)
        return mean, m2 + absent[:, tf.newaxis] * tf.square(mean)

    def signs(self):
        _, entry, rows = self._rows()
        return tuple(
            self._per_entry(tf.cast(side, tf.int64), entry) for side in (rows > 0, rows < 0)
        )

    def square_norms(self):
        example, _, rows = self._rows()
        squares = tf.reduce_sum(tf.square(rows), 1)  # zero where the slot is left over
        return tf.math.unsorted_segment_sum(squares, example, tf.shape(self.ids)[0])


def add(forms: Sequence[Form]) -> Form:
    """The form of the sum: a variable used several times adds up before anything is squared."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if all(isinstance(f, Sparse) for f in forms):
        return Sparse(
            tf.concat([f.ids for f in forms], 1),
            tf.concat([f.dz for f in forms], 1),
            first.shape,
            first.dtype,
        )
    if all(isinstance(f, Outer) and len(f.columns) == 1 for f in forms):
        x = [_positions(f.column(f.columns[0])) for f in forms]
        dz = [_positions(f.dz) for f in forms]
        return Outer(tf.concat(x, 1), tf.concat(dz, 1), first.shape, first.dtype)
    return Rows(lambda: tf.add_n([f.materialise() for f in forms]), first.shape, first.dtype)


def _positions(v):
    return v[:, tf.newaxis, :] if v.shape.rank == 2 else v


def _nonzero(v):
    return tf.cast(tf.not_equal(v, 0), v.dtype)


def _concat(parts, axis):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis)


def _product(numbers):
    result = 1
    for number in numbers:
        result *= int(number)
    return result


# What rules make forms of.


def per_example(call, values, keep_fold: bool = False):
    """`[n f, ...]` as `[n, f, ...]`; as it is where an example has one row, unless `keep_fold`."""
    if call.fold == 1 and not keep_fold:
        return values
    shape = tf.shape(values)
    static = [s if s is not None else shape[a] for a, s in enumerate(values.shape)]
    return tf.reshape(values, [call.n, call.fold, *static[1:]])


def rows(gradients, variable) -> Rows:
    """The form of gradients `[n, *variable.shape]`, or of a function that makes them."""
    return Rows(gradients, variable.shape, variable.dtype)


def elementwise(gradients, variable) -> Rows:
    """The form of `[n, ..., *shape]`, summed over what the variable was broadcast along."""
    shape = tuple(variable.shape)
    extra = gradients.shape.rank - 1 - len(shape)
    axes = list(range(1, 1 + extra))
    axes += [1 + extra + a for a, s in enumerate(shape) if s == 1]
    gradients = tf.cast(gradients, variable.dtype)
    gradients = tf.reduce_sum(gradients, axes) if axes else gradients
    return Rows(tf.reshape(gradients, [-1, *shape]), shape, variable.dtype)


def outer(call, x, dz, variable) -> Outer:
    """The form of `sum_t x[n,t,i] dz[n,t,o]`; x is `[n f, ..., i]`, dz `[n f, ..., o]`."""
    if call.fold != 1 or x.shape.rank != 2:
        positions = [s for s in x.shape[1:-1]]
        t = -1 if None in positions else call.fold * _product(positions)
        last = [] if t == 1 else [t]
        n = call.n if t != -1 else tf.shape(x)[0] // call.fold
        x = tf.reshape(x, [n, *last, x.shape[-1]])
        dz = tf.reshape(dz, [n, *last, dz.shape[-1]])
    return Outer(x, dz, variable.shape, variable.dtype)


def sparse(call, ids, dz, variable) -> Sparse:
    """The form of rows `dz [n f, ..., o]` that were looked up at `ids [n f, ...]`."""
    ids = tf.reshape(ids, [call.n, -1])
    return Sparse(ids, tf.reshape(dz, [call.n, -1, dz.shape[-1]]), variable.shape, variable.dtype)
