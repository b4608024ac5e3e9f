"""The form of per-example gradients of a table of which each example touches a few rows.

Index letters: n example, t position within an example, v entry of the table, o out, s slot: one
of as many places for an example's distinct entries as there are tokens.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients.layerwise.dense_forms import (
    Form,
    Outer,
    gathered,
    moments_from_sums,
    product,
    products_of_tiles,
    tiles_of,
)

FEW = 256  # tokens of an example, all pairs of which can be compared


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

    def distinct_rows(self):
        """Each example's distinct entries: `(example [s], entry [s], gradient [s, o])`.

        There are as many slots s as tokens, since a shape must not depend on the ids; those left
        over have the entry -1, which sums over segments pass by.
        """
        if self.ids.shape[1] == 1:
            ids = tf.reshape(self.ids, [-1])
            return tf.range(tf.size(ids, tf.int64)), ids, tf.reshape(self.dz, [-1, self.shape[1]])
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

    def per_entry(self, values, entries):
        return tf.math.unsorted_segment_sum(values, entries, self.shape[0])

    def materialise(self):
        example, entry, rows = self.distinct_rows()
        n = tf.shape(self.ids, tf.int64)[0]
        place = tf.where(entry < 0, entry, example * self.shape[0] + entry)
        g = tf.math.unsorted_segment_sum(rows, place, n * self.shape[0])
        return tf.reshape(g, [-1, *self.shape])

    def blocks(self):
        return [lambda: tf.reshape(self.materialise(), [-1, product(self.shape)])]

    def of_entries(self, start, stop):
        """`[n, (stop - start) o]`: the gradients of some entries."""
        n, width = tf.shape(self.ids, tf.int64)[0], stop - start
        inside = (self.ids >= start) & (self.ids < stop)
        place = tf.range(n)[:, tf.newaxis] * width + self.ids - start
        place = tf.reshape(tf.where(inside, place, -tf.ones_like(place)), [-1])
        rows = tf.reshape(self.dz, [-1, self.shape[1]])
        g = tf.math.unsorted_segment_sum(rows, place, n * width)
        return tf.reshape(g, [-1, width * self.shape[1]])

    def total(self):
        return self.per_entry(tf.reshape(self.dz, [-1, self.shape[1]]), tf.reshape(self.ids, [-1]))

    def moments(self, count, valid):
        example, entry, rows = self.distinct_rows()
        mean = self.per_entry(rows, entry) / count
        there = tf.ones_like(rows[:, 0]) if valid is None else tf.gather(valid, example)
        deviation = rows - there[:, tf.newaxis] * tf.gather(mean, tf.maximum(entry, 0))
        absent = count - self.per_entry(there, entry)
        m2 = self.per_entry(tf.square(deviation), entry)
        return mean, m2 + absent[:, tf.newaxis] * tf.square(mean)

    def signs(self):
        _, entry, rows = self.distinct_rows()
        return tuple(
            self.per_entry(tf.cast(side, tf.int64), entry) for side in (rows > 0, rows < 0)
        )

    def sums(self, sign_counts):
        """As `tf.IndexedSlices`, of the entries that were looked up."""
        _, entry, rows = self.distinct_rows()
        entry = tf.maximum(entry, 0)  # what is left over are zeros
        values = [rows, tf.square(rows)]
        values += [tf.sign(rows), tf.abs(tf.sign(rows))] if sign_counts else []
        return tuple(tf.IndexedSlices(v, entry, self.shape) for v in values)

    def square_norms(self):
        example, _, rows = self.distinct_rows()
        squares = tf.reduce_sum(tf.square(rows), 1)  # zero where the slot is left over
        return tf.math.unsorted_segment_sum(squares, example, tf.shape(self.ids)[0])

    def cheap_squares(self):
        tokens = self.ids.shape[1]
        if tokens is None or tokens > FEW:
            return tf.reduce_sum(tf.square(tf.cast(self.distinct_rows()[2], tf.float64)))
        # sum_tt' [ids[n,t] = ids[n,t']] dz[n,t] . dz[n,t'], without a search for equal ids.
        if tokens <= 8:
            products = tf.reduce_sum(self.dz[:, :, tf.newaxis] * self.dz[:, tf.newaxis], -1)
        elif self.ids.shape[0] == 1:
            products = tf.matmul(self.dz[0], self.dz[0], transpose_b=True)[tf.newaxis]
        else:
            products = tf.matmul(self.dz, self.dz, transpose_b=True)
        alike = tf.equal(self.ids[:, :, tf.newaxis], self.ids[:, tf.newaxis])
        return tf.cast(tf.reduce_sum(tf.where(alike, products, 0)), tf.float64)

    def sample(self, places):
        if places.whole:
            return super().sample(places)
        rows, columns = places.product(self.shape[-1])
        looked_up = tf.equal(self.ids[:, :, tf.newaxis, tf.newaxis], rows)
        return products_of_tiles(tf.cast(looked_up, self.dtype), tiles_of(self.dz, columns))

    def at(self, places):
        """Of the entries that a sample is of: `(form, index [k])`, where it is in theirs."""
        if places.whole:
            return self, places.flat
        rows, columns = np.divmod(places.flat, self.shape[1])
        kept, place = np.unique(rows, return_inverse=True)
        slot = tf.searchsorted(kept, tf.reshape(self.ids, [-1]), out_type=tf.int64)
        slot = tf.reshape(slot, tf.shape(self.ids))
        there = tf.equal(tf.gather(kept, tf.minimum(slot, len(kept) - 1)), self.ids)
        slot = tf.where(there, slot, len(kept))  # all others in one entry more
        form = Sparse(slot, self.dz, (len(kept) + 1, self.shape[1]), self.dtype)
        return form, place * self.shape[1] + columns

    def moments_at(self, places, n, sign_counts):
        form, index = self.at(places)
        _, entry, rows = form.distinct_rows()
        parts = [rows, tf.square(rows)]
        parts += [tf.sign(rows), tf.abs(tf.sign(rows))] if sign_counts else []
        sums = form.per_entry(tf.concat(parts, 1), entry)  # [entries, parts o]
        width = form.shape[1]
        row, column = np.divmod(index, width)
        part = np.arange(len(parts))[:, np.newaxis]
        places = (row * len(parts) + part) * width + column

        def centred():
            wide = Sparse(form.ids, form.dz, form.shape, tf.float64)
            found = wide.moments(tf.cast(n, tf.float64), None)
            return [tf.gather(tf.reshape(v, [-1]), index) for v in found]

        sums = gathered(tf.reshape(sums, [-1]), places.reshape(-1))
        return moments_from_sums(tf.reshape(sums, places.shape), n, centred)


class Tied(Form):
    """A table that is looked up and multiplied with: the sum of both, before it is squared.

    Args:
      looked_up: its gradients as rows.
      product: its gradients as a matrix product, entries by width.
    """

    def __init__(self, looked_up: Sparse, product: Outer):
        self.looked_up, self.product = looked_up, product
        self.shape, self.dtype = product.shape, product.dtype

    def blocks(self):
        def sum_of(block, start, stop):
            return lambda: block() + self.looked_up.of_entries(start, stop)

        return [sum_of(*block) for block in self.product.ranges()]

    def total(self):
        return self.looked_up.total() + self.product.total()

    def sample(self, places):
        return self.looked_up.sample(places) + self.product.sample(places)
