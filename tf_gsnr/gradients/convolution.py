"""The kernel gradient of a convolution for every example apart, without a loop over examples.

Index letters: n example, b inner batch (1, or what a layer folded into it), s input position,
t output position, k kernel position, c input channel, o output channel, g channel group.
Everything here is channels last; convolutions of 1, 2 and 3 spatial dimensions are one function.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import tensorflow as tf

from tf_gsnr.gradients import forms


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


def views(x, kernel, strides, dilations, pads, outputs) -> list:
    """For each kernel position k, the input values it meets: `[n, b, *outputs, c]`, in order of k.

    Args:
      x: `[n, b, *size, c]`.
      kernel, strides, dilations, outputs: a number per spatial dimension.
      pads: (before, after) per spatial dimension.
    """
    if any(map(any, pads)):
        x = tf.pad(x, [(0, 0), (0, 0), *pads, (0, 0)])
    whole = slice(None)
    return [
        x[
            (whole, whole)
            + tuple(
                slice(k * d, k * d + (t - 1) * s + 1, s)
                for k, d, s, t in zip(position, dilations, strides, outputs)
            )
            + (whole,)
        ]
        for position in itertools.product(*map(range, kernel))
    ]


def kernel_gradients(x, dz, kernel, strides, dilations, pads):
    """`G[n,k,c,o] = sum_bt x[n,b,t*stride+k*dilation,c] dz[n,b,t,o]`, per channel group.

    Args:
      x: the convolution's input, `[n, b, *size, channels]`.
      dz: the gradient at its output, `[n, b, *outputs, filters]`.
      kernel: the kernel's shape, `(*kernel, channels // groups, filters)`.
      strides, dilations, pads: per spatial dimension.

    Returns:
      `[n, *kernel, channels // groups, filters]`.
    """
    n, b, *outputs, filters = dz.shape
    *spatial, group_channels, _ = kernel
    groups = x.shape[-1] // group_channels
    positions = b
    for t in outputs:
        positions *= t
    patches = views(x, spatial, strides, dilations, pads, outputs)
    if groups == 1:
        unfolded = tf.reshape(
            tf.concat(patches, -1), [-1, positions, len(patches) * group_channels]
        )
        gradient = tf.matmul(unfolded, tf.reshape(dz, [-1, positions, filters]), transpose_a=True)
    else:
        unfolded = tf.reshape(
            tf.stack(patches, -2), [-1, positions, len(patches), groups, group_channels]
        )
        dz = tf.reshape(dz, [-1, positions, groups, filters // groups])
        gradient = tf.einsum("ntkgc,ntgo->nkcgo", unfolded, dz)
    return tf.reshape(gradient, [-1, *kernel])


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


def form(x, dz, kernel, strides, dilations, pads) -> forms.Form:
    """The form of a convolution's kernel gradient; arguments as `kernel_gradients`.

    Args:
      kernel: the kernel variable.
    """
    return forms.rows(
        lambda: kernel_gradients(x, dz, tuple(kernel.shape), strides, dilations, pads), kernel
    )
