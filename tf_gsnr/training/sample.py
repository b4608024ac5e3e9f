"""Which parameters `fit` measures: all of a small model, a sample of a large one.

What is wanted of parameters one by one is a mean or a median over them, and that a sample tells.
Index letters: n example, v variable, k sampled parameter.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from tf_gsnr import arrays
from tf_gsnr.gradients import places
from tf_gsnr.gradients.layerwise import dense_forms, forms

SIZE = 2**13  # parameters in a sample, unless told otherwise
FEWER = 4  # of a convolution's parameters, each of which costs a product at every position
LEAST, LEAST_OF_LAYERS = 64, 512  # of a variable, if it has as many; where layers are shown


class Sample:
    """A sample of parameters, the same at every step; variables in proportion, none left out.

    Attributes:
      places: `gradients.places.Places`, per variable.
      owner: int `[k]`, the index of each sampled parameter's variable; ascending.
      weights: float64 `[k]`, for how many parameters each stands.
      exact: whether all were asked for.
    """

    def __init__(self, shapes, size: int | None = None, least: int = LEAST):
        sizes = [math.prod(shape) for shape in shapes]
        parts = [n / FEWER if len(s) > 3 else n for n, s in zip(sizes, shapes)]
        share = 1.0 if size is None else min(1.0, size / sum(parts))
        wanted = [min(n, max(math.ceil(share * p), least)) for n, p in zip(sizes, parts)]
        wanted = sizes if size is None or size >= sum(sizes) else wanted
        self.places = [places.of(s, w, seed) for seed, (s, w) in enumerate(zip(shapes, wanted))]
        found = [p.size for p in self.places]
        self.owner = np.repeat(np.arange(len(found)), found)
        self.weights = np.repeat([n / k for n, k in zip(sizes, found)], found)
        self.exact = size is None

    @property
    def size(self) -> int:
        return len(self.owner)

    def take(self, values):
        """What these arrays of the variables' shapes hold at the sampled places, float64 `[k]`.

        Args:
          values: per variable an array, `tf.IndexedSlices`, or None for zeros.
        """
        return arrays.flat([tf.cast(self._take(*v), tf.float64) for v in zip(self.places, values)])

    def _take(self, there, value):
        if value is None:
            return tf.zeros([there.size])
        if isinstance(value, tf.IndexedSlices) and not there.whole:
            form, index = table(value, there.shape).at(there)
            return dense_forms.gathered(tf.reshape(form.total(), [-1]), index)
        flat = tf.reshape(tf.convert_to_tensor(value), [-1])
        return flat if there.whole else dense_forms.gathered(flat, there.flat)

    def sums(self, values):
        """The sums over each variable's sampled parameters; `[k, ...]` to `[v, ...]`."""
        return tf.math.unsorted_segment_sum(values, self.owner, len(self.places))

    def largest(self, values):
        """The largest of each variable's."""
        return tf.math.unsorted_segment_max(values, self.owner, len(self.places))


def table(slices, shape) -> forms.Sparse:
    """A sparse gradient as the form of one example."""
    rows = tf.reshape(slices.values, [1, -1, shape[-1]])
    return forms.Sparse(tf.reshape(slices.indices, [1, -1]), rows, shape, rows.dtype)
