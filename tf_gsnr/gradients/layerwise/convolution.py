"""The kernel gradient of a convolution for every example apart, without a loop over examples.

Index letters: n example, b inner batch (1, or what a layer folded into it), s input position,
t output position, k kernel position, c input channel, o output channel, g channel group.
Everything here is channels last; convolutions of 1, 2 and 3 spatial dimensions are one function.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients.layerwise import dense_forms, forms


def paddings(
    padding: str,
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """What `"SAME"` or `"VALID"` adds before and after each spatial dimension."""
    if padding.upper() == "VALID":
        return [(0, 0)] * len(size)
    pairs = []
    for length, k, stride, dilation in zip(size, kernel, strides, dilations):
        outputs = -(-length // stride)
        total = max((outputs - 1) * stride + (k - 1) * dilation + 1 - length, 0)
        pairs.append((total // 2, total - total // 2))
    return pairs


def views(x, kernel, strides, dilations, pads, outputs, positions=None) -> list:
    """For each kernel position k, the input values it meets: `[n, b, *outputs, c]`, in order of k.

    Of these positions, or of all. Other arguments as `viewer`.
    """
    view = viewer(x, kernel, strides, dilations, pads, outputs)
    return list(map(view, positions or itertools.product(*map(range, kernel))))


def viewer(x, kernel, strides, dilations, pads, outputs) -> Callable:
    """`position -> [n, b, *outputs, c]`: the input values that one position of the kernel meets.

    It takes a slice of the channels, too.

    Args:
      x: `[n, b, *size, c]`.
      kernel, strides, dilations, outputs: a number per spatial dimension.
      pads: (before, after) per spatial dimension.
    """
    if any(map(any, pads)):
        x = tf.pad(x, [(0, 0), (0, 0), *pads, (0, 0)])
    whole = slice(None)
    if math.prod(kernel) == 1:
        every = (slice(0, t * s, s) for s, t in zip(strides, outputs))
        x = x[(whole, whole, *every, whole)]
        return lambda position, channels=whole: x[..., channels]
    phase_of = _phases(x, strides)

    def view(position, channels=whole):
        starts = [int(k) * d for k, d in zip(position, dilations)]
        windows = (slice(a // s, a // s + t) for a, s, t in zip(starts, strides, outputs))
        return phase_of(starts)[(whole, whole, *windows, channels)]

    return view


def _phases(x, strides):
    """For the place of an entry of x, all entries that are strides away from it, in order.

    They are brought together by one transposition, of which a view takes a part: to take every
    s-th entry anew for each view copies number by number, and took 3 to 10 times as long.
    """
    if set(strides) == {1}:
        return lambda start: x
    size, rank, channels = x.shape[2:-1], len(strides), x.shape[-1]
    counts = [-(-length // s) for length, s in zip(size, strides)]
    ends = [(0, c * s - length) for c, s, length in zip(counts, strides, size)]
    inner = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
    x = tf.pad(x, [(0, 0), (0, 0), *ends, (0, 0)])
    x = tf.reshape(x, [-1, *itertools.chain(*zip(counts, strides)), channels])
    axes = range(1, 1 + 2 * rank)
    x = tf.transpose(x, [*axes[1::2], 0, *axes[::2], 1 + 2 * rank])
    x = tf.reshape(x, [math.prod(strides), -1, inner, *counts, channels])
    return lambda start: x[np.ravel_multi_index([a % s for a, s in zip(start, strides)], strides)]


def kernel_gradients(x, dz, kernel, strides, dilations, pads, positions=None):
    """`G[n,k,c,o] = sum_bt x[n,b,t*stride+k*dilation,c] dz[n,b,t,o]`, per channel group.

    Args:
      x: the convolution's input, `[n, b, *size, channels]`.
      dz: the gradient at its output, `[n, b, *outputs, filters]`.
      kernel: the kernel's shape, `(*kernel, channels // groups, filters)`.
      strides, dilations, pads: per spatial dimension.
      positions: of the kernel, tuples, where not all are wanted; the channels are one group then.

    Returns:
      `[n, *kernel, channels // groups, filters]`; of some positions `[n, k c o]`.
    """
    filters = dz.shape[-1]
    *spatial, channels, _ = kernel
    where = spatial, strides, dilations, pads, dz.shape[2:-1]
    if x.shape[-1] != channels:
        gradient = _grouped(x, dz, kernel, strides, dilations, pads)
    elif channels <= NARROW:
        gradient = _stacked_planes(x, dz, *where, positions)
    elif positions is None and _halves_are_smaller(x, dz, spatial, strides, pads):
        gradient = _halves(x, dz, spatial, dilations, pads)
    else:
        patches = views(x, *where, positions)
        unfolded = _positions(tf.concat(patches, -1), channels * len(patches))
        gradient = tf.matmul(unfolded, _positions(dz, filters), transpose_a=True)
    shape = kernel if positions is None else [len(positions) * channels * filters]
    return tf.reshape(gradient, [-1, *shape])


# With few channels a pixel is a few bytes, and copying pixels one by one is what takes the time:
# then whole rows of one channel are copied instead. Measured on 2 cores, 512 28x28x1 images under
# a 5x5 kernel: 18 ms against 63; 128 34x34x3 under 3x3: 7 against 12; from 8 channels on slower.
NARROW = 4


def _positions(v, columns):
    """`[n, b, *t, ...]` as `[n, b t, columns]`."""
    count = math.prod(v.shape[1:]) // columns
    return tf.reshape(v, [-1, count, columns])


def _grouped(x, dz, kernel, strides, dilations, pads):
    *spatial, channels, filters = kernel
    groups = x.shape[-1] // channels
    patches = views(x, spatial, strides, dilations, pads, dz.shape[2:-1])
    count = math.prod(dz.shape[1:-1])
    unfolded = tf.reshape(tf.stack(patches, -2), [-1, count, len(patches), groups, channels])
    dz = tf.reshape(dz, [-1, count, groups, filters // groups])
    return tf.einsum("ntkgc,ntgo->nkcgo", unfolded, dz)


def _stacked_planes(x, dz, *where):
    """Unfolds planes of one channel: `[n, k c, b t]`."""
    rank = x.shape.rank
    channels = x.shape[-1]
    planes = tf.transpose(x, [0, rank - 1, *range(1, rank - 1)])  # n c b s
    planes = tf.reshape(planes, [-1, channels * x.shape[1], *x.shape[2:-1], 1])
    patches = views(planes, *where)
    count = math.prod(dz.shape[1:-1])
    unfolded = tf.reshape(tf.stack(patches, 1), [-1, len(patches) * channels, count])
    return tf.matmul(unfolded, _positions(dz, dz.shape[-1]))


def _halves_are_smaller(x, dz, spatial, strides, pads):
    """Whether `_halves` applies and copies fewer numbers than unfolding x alone does."""
    if len(spatial) < 2 or set(strides) != {1}:
        return False
    rows = x.shape[2] + sum(pads[0])
    outputs = dz.shape[2]
    first, rest = spatial[0], math.prod(spatial[1:])
    channels, filters = x.shape[-1], dz.shape[-1]
    halves = rows * (rest * channels + first * filters)
    return first > 1 and halves < outputs * (first * rest * channels + filters)


def _halves(x, dz, spatial, dilations, pads):
    """Unfolds x along all axes but the first and dz along the first: `k` is split between them.

    `sum_t x[t+k] dz[t] = sum_s x[s, t'+k'] dz[s-k0, t']`, with dz zero where it has no row.
    """
    rows = x.shape[2] + sum(pads[0])
    outputs = dz.shape[2]
    if sum(pads[0]):
        x = tf.pad(x, [(0, 0), (0, 0), pads[0], *[(0, 0)] * (x.shape.rank - 3)])
    strides = [1] * len(spatial)
    right = [1, *spatial[1:]]
    columns = views(x, right, strides, dilations, [(0, 0), *pads[1:]], [rows, *dz.shape[3:-1]])
    shifted = [
        tf.pad(
            dz,
            [(0, 0), (0, 0), (k, rows - outputs - k), *[(0, 0)] * (dz.shape.rank - 3)],
        )
        for k in range(0, spatial[0] * dilations[0], dilations[0])
    ]
    columns = tf.concat(columns, -1)
    shifted = tf.concat(shifted, -1)
    channels, filters = x.shape[-1], dz.shape[-1]
    gradient = tf.matmul(
        _positions(columns, columns.shape[-1]),
        _positions(shifted, shifted.shape[-1]),
        transpose_a=True,
    )
    width = math.prod(spatial[1:]) * channels
    gradient = tf.reshape(gradient, [-1, width, spatial[0], filters])
    return tf.transpose(gradient, [0, 2, 1, 3])


def depthwise_kernel_gradients(x, dz, kernel, strides, dilations, pads):
    """`G[n,k,c,m] = sum_bt x[n,b,t*stride+k*dilation,c] dz[n,b,t,c,m]`, m the depth multiplier.

    Arguments as `kernel_gradients`; `kernel` is `(*kernel, channels, multiplier)`.
    """
    n, b, *outputs, _ = dz.shape
    *spatial, channels, multiplier = kernel
    positions = b
    for t in outputs:
        positions *= t
    dz = tf.reshape(dz, [-1, positions, channels, multiplier])
    gradient = [
        tf.reduce_sum(tf.reshape(view, [-1, positions, channels, 1]) * dz, axis=1)
        for view in views(x, spatial, strides, dilations, pads, outputs)
    ]
    return tf.reshape(tf.stack(gradient, axis=1), [-1, *kernel])


PRODUCTS_PER_COPY = 20  # what a product makes of numbers in the time in which one is copied


class Kernel(forms.Form):
    """The gradients of a convolution's kernel; arguments as `kernel_gradients`.

    A large kernel is taken apart by its positions: for each one the gradient is what a dense layer
    leaves behind, so that only a part of `[n, *kernel]` is there at a time.

    Args:
      kernel: the kernel variable.
      depthwise: whether dz is that of `depthwise_kernel_gradients`.
    """

    def __init__(self, x, dz, kernel, strides, dilations, pads, depthwise=False):
        self.shape, self.dtype = tuple(kernel.shape), tf.as_dtype(kernel.dtype)
        self.x, self.dz, self.depthwise = x, dz, depthwise
        self.strides, self.dilations, self.pads = strides, dilations, pads

    def blocks(self):
        *spatial, channels, filters = self.shape
        entries = (self.x.shape[0] or dense_forms.UNKNOWN_BATCH) * math.prod(self.shape)
        large = entries * self.dtype.size > dense_forms.BLOCK_BYTES
        if large and not self.depthwise and self.x.shape[-1] == channels > NARROW:
            where = self.strides, self.dilations, self.pads, self.dz.shape[2:-1]
            patches = views(self.x, spatial, *where)
            columns = [functools.partial(_positions, patch, channels) for patch in patches]
            dz = _positions(self.dz, filters)
            return forms.Outer(columns, dz, self.shape, self.dtype).blocks()
        gradients = depthwise_kernel_gradients if self.depthwise else kernel_gradients

        def whole():
            where = self.strides, self.dilations, self.pads
            g = gradients(self.x, self.dz, self.shape, *where)
            return tf.reshape(tf.cast(g, self.dtype), [-1, math.prod(self.shape)])

        return [whole]

    def total(self):
        """As TensorFlow's own gradient, which unfolds nothing."""
        *spatial, channels, _ = self.shape
        if not self.depthwise and self.x.shape[-1] != channels:  # groups
            return super().total()
        if self.depthwise and (len(spatial) != 2 or len(set(self.strides)) > 1):
            return super().total()
        x, dz = (tf.cast(v, self.dtype) for v in (self.x, self.dz))
        x, dz = (tf.reshape(v, [-1, *v.shape[2:]]) for v in (x, dz))
        x = tf.pad(x, [(0, 0), *self.pads, (0, 0)])
        sizes = zip(spatial, self.strides, self.dilations, dz.shape[1:-1])
        ends = (slice((t - 1) * s + (k - 1) * d + 1) for k, s, d, t in sizes)
        x, kernel = x[(slice(None), *ends)], tf.zeros(self.shape, self.dtype)
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            if self.depthwise:
                strides = [1, *self.strides, 1]
                z = tf.nn.depthwise_conv2d(x, kernel, strides, "VALID", dilations=self.dilations)
            else:
                kind = ["NWC", "NHWC", "NDHWC"][len(spatial) - 1]
                z = tf.nn.convolution(x, kernel, self.strides, "VALID", kind, self.dilations)
        return tape.gradient(z, kernel, dz)

    def sample(self, places):
        """`[n, k]`; each tile is at one position of the kernel and sees a part of the input."""
        *spatial, channels, filters = self.shape
        product = None if places.whole else places.product(filters)
        if product is None or not (self.depthwise or self.x.shape[-1] == channels):
            return super().sample(places)
        position, rows = np.divmod(product[0], channels)
        m, a, b = places.tiles.shape
        if (a, b) == (channels, filters) and not self.depthwise:  # whole positions of the kernel
            chosen = list(zip(*np.unravel_index(position[:, 0], spatial)))
            where = self.strides, self.dilations, self.pads
            g = kernel_gradients(self.x, self.dz, self.shape, *where, positions=chosen)
            return tf.cast(g, self.dtype)
        unfolded = math.prod(self.shape[:-1])
        all_of_it = unfolded + filters + unfolded * filters / PRODUCTS_PER_COPY
        if (position != position[:, :1]).any() or 2 * m * (a + b) > all_of_it:
            return super().sample(places)
        outputs = self.dz.shape[2 : 2 + len(spatial)]
        x = dense_forms.tiles_of(tf.cast(self.x, self.dtype), rows)
        x = tf.reshape(x, [-1, *self.x.shape[1:-1], m * a])
        view = viewer(x, spatial, self.strides, self.dilations, self.pads, outputs)
        position = position[:, 0]
        seen = []
        for k in sorted(set(position)):
            (of_k,) = np.nonzero(position == k)  # one run: places are in order
            tiles = slice(a * of_k[0], a * (of_k[-1] + 1))
            seen.append(view(np.unravel_index(k, spatial), tiles))
        x = dense_forms.concatenated(seen, -1)
        dz = tf.cast(self.dz, self.dtype)
        count = math.prod(self.dz.shape[1 : 2 + len(spatial)])
        x = tf.reshape(x, [-1, count, m, a])
        if self.depthwise:
            dz = tf.reshape(dz, [-1, count, channels * filters])
            own = places.tiles.reshape(m, a * b) % (channels * filters)
            dz = tf.reshape(dense_forms.tiles_of(dz, own), [-1, count, m, a, b])
            return tf.reshape(tf.reduce_sum(x[..., tf.newaxis] * dz, 1), [-1, m * a * b])
        dz = tf.reshape(dense_forms.tiles_of(dz, product[1]), [-1, count, m, b])
        return dense_forms.products_of_tiles(x, dz)
