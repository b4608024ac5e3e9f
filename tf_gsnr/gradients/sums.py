"""Sums over examples, in which micro-batches are added up before they become moments.

Adding g and g^2 passes over the parameters a third as often as merging means and squared deviations
does. What is lost is digits, where n mean^2 is nearly all of sum g^2. Variables of which the first
micro-batch tells as much are merged (`Moments.merge`); where others turn out so at the end, the
data are measured again. The many small variables of a model are added up as one vector. Index
letters: n example, j variable.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients.layerwise.dense_forms import CENTRED_BELOW, product
from tf_gsnr.moments import Moments

MOST = 2**24  # examples: float32 counts no further
VANISHED = 1e-34  # sums of squares below have lost digits in float32
LARGE = 2**16  # parameters: such a variable is a group of its own


class Sums(NamedTuple):
    """Of n examples; lists over groups of variables.

    Attributes:
      first, second: sum_n g[n] and sum_n g[n]^2; of a micro-batch also `tf.IndexedSlices`.
      difference, there: n+ - n- and n+ + n-, as floats; or empty lists.
    """

    first: list
    second: list
    difference: list = []
    there: list = []

    @classmethod
    def accumulators(cls, variables: Sequence, groups: Groups, sign_counts: bool) -> Sums:
        """Zeros that micro-batches can be added to: `tf.Variable`s."""

        def zeros(group):
            size = sum(product(variables[j].shape) for j in group)
            shape = [size] if len(group) > 1 else variables[group[0]].shape
            return tf.Variable(tf.zeros(shape, variables[group[0]].dtype), trainable=False)

        return cls(*([zeros(group) for group in groups] for _ in range(4 if sign_counts else 2)))

    def add(self, other: Sums):
        """Adds a micro-batch to accumulators, in place."""
        for total, value in zip(tf.nest.flatten(self), tf.nest.flatten(other)):
            if isinstance(value, tf.IndexedSlices):
                total.scatter_add(value)
            else:
                total.assign_add(value)

    def moments(self, n: int, extreme: bool) -> tuple[tuple, list]:
        """`((mean, m2, positives, negatives), where digits were lost)`, lists of numpy arrays.

        Args:
          n: the number of examples.
          extreme: whether squares may have been too small or too large for float32.
        """
        mean, m2, lost = [], [], []
        for first, second in zip(self.first, self.second):
            mean.append(first / max(n, 1))
            m2.append(second - first * mean[-1])
            wrong = cancels(m2[-1], second)
            if extreme:
                vanished = (second < VANISHED) & tf.not_equal(first, 0)
                wrong |= vanished | ~tf.math.is_finite(second)
            lost.append(wrong if n < MOST or not self.there else tf.ones_like(wrong))
        signs = list(zip(self.difference, self.there))
        positives = [tf.cast((there + d) / 2, tf.int64) for d, there in signs]
        negatives = [tf.cast((there - d) / 2, tf.int64) for d, there in signs]
        return tf.nest.map_structure(lambda v: v.numpy(), ((mean, m2, positives, negatives), lost))


Groups = tuple  # of tuples of numbers of variables, each group one vector


def groups_of(variables: Sequence, chosen: Collection) -> Groups:
    """Each large variable alone, the small ones of a dtype together; of those chosen."""
    small, groups = {}, []
    for j in sorted(chosen):
        if product(variables[j].shape) < LARGE:
            small.setdefault(variables[j].dtype, []).append(j)
        else:
            groups.append((j,))
    return (*groups, *map(tuple, small.values()))


def grouped(groups: Groups, values: dict) -> list:
    """Tensors of the groups, of those of the variables `{j: tensor}`."""

    def vector(group):
        if len(group) == 1:
            return values[group[0]]
        return tf.concat([tf.reshape(tf.convert_to_tensor(values[j]), [-1]) for j in group], 0)

    return [vector(group) for group in groups]


def apart(groups: Groups, values: Sequence, variables: Sequence) -> dict:
    """`{j: array}` of numpy arrays of the groups, in the variables' shapes."""
    by_variable = {}
    for group, value in zip(groups, values):
        ends = np.cumsum([product(variables[j].shape) for j in group])
        for j, part in zip(group, np.split(value.reshape(-1), ends[:-1])):
            by_variable[j] = part.reshape(variables[j].shape)
    return by_variable


def joined(of_groups: Sequence, others: Moments, groups: Groups, variables: Sequence) -> Moments:
    """Moments of all variables: of those in groups as `Sums.moments` has them, others in turn."""
    lists = []
    for values, rest in zip(of_groups, others[2:]):
        by_variable, others_in_turn = apart(groups, values, variables), iter(rest)
        count = len(by_variable) + len(rest)
        lists.append(
            [by_variable[j] if j in by_variable else next(others_in_turn) for j in range(count)]
        )
    return Moments(others.count, others.loss, *lists)


def scale_for(moments: Moments) -> float:
    """A power of two that brings the variables' gradients to around 1.

    Their squares are then far from where float32 ends, on both sides.
    """
    n = max(int(moments.count), 1)
    pairs = zip(moments.mean, moments.m2)
    squares = [np.max(np.square(np.asarray(g)) + np.asarray(m2) / n, initial=0) for g, m2 in pairs]
    exponents = [np.log2(square) / 2 for square in squares if 0 < square < np.inf]
    if not exponents:
        return 1.0
    return float(2.0 ** -np.round((min(exponents) + max(exponents)) / 2))


def cancels(m2, squares, below: float = CENTRED_BELOW):
    """Where the spread is less than this share of sum_n g[n]^2."""
    return m2 < below * squares


SUSPECT_BELOW = 0.1  # in the first micro-batch
ENOUGH = 8  # examples: of fewer, a spread of nearly nothing may be chance


def likely_to_cancel(moments: Moments) -> set:
    """The variables j of which one micro-batch tells that their sums would lose digits."""
    n = moments.count
    if n < ENOUGH:
        return set()
    pairs = enumerate(zip(moments.mean, moments.m2))
    squares = ((j, m2, m2 + tf.cast(n, g.dtype) * tf.square(g)) for j, (g, m2) in pairs)
    return {j for j, m2, total in squares if tf.reduce_any(cancels(m2, total, SUSPECT_BELOW))}
