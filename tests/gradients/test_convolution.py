"""The kernel gradients of convolutions, against TensorFlow's own of each example alone."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr.gradients.layerwise import convolution

RNG = np.random.default_rng(0)
# What a kernel of each number of axes may be strided and dilated by; not alike on all axes, too.
STEPS = {
    1: [((1,), (1,)), ((2,), (1,)), ((1,), (2,))],
    2: [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 2), (1, 1)), ((2, 1), (1, 1)), ((1, 3), (1, 1))]
    + [((1, 1), (2, 2)), ((1, 1), (1, 2)), ((1, 1), (2, 1))],
    3: [((1, 1, 1), (1, 1, 1)), ((1, 2, 1), (1, 1, 1)), ((1, 1, 2), (1, 1, 1))]
    + [((2, 1, 1), (1, 1, 1))],
}
KINDS = [(axes, *steps) for axes in STEPS for steps in STEPS[axes]]


@pytest.mark.parametrize("channels, filters", [(1, 10), (3, 16), (8, 16), (12, 5)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("axes, strides, dilations", KINDS)
def test_kernel_gradients(axes, strides, dilations, padding, channels, filters):
    """Whichever way is taken, and of some positions of the kernel as of all."""
    size, spatial = [11, 9, 6][:axes], [3, 3, 2][:axes]
    x = tf.constant(RNG.normal(size=[2, *size, channels]))
    kernel = tf.constant(RNG.normal(size=[*spatial, channels, filters]))
    kind = ["NWC", "NHWC", "NDHWC"][axes - 1]

    def convolved(rows, kernel):
        return tf.nn.convolution(rows, kernel, strides, padding, kind, dilations)

    dz = tf.constant(RNG.normal(size=convolved(x, kernel).shape))
    wanted = []
    for n in range(2):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = tf.reduce_sum(convolved(x[n : n + 1], kernel) * dz[n : n + 1])
        wanted.append(tape.gradient(value, kernel).numpy())
    pads = convolution.paddings(padding, size, spatial, strides, dilations)
    given = x[:, None], dz[:, None], kernel.shape, strides, dilations, pads
    found = convolution.kernel_gradients(*given)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    every = list(itertools.product(*map(range, spatial)))
    some = convolution.kernel_gradients(*given, positions=every[1::2])
    wanted = np.reshape(wanted, [2, len(every), -1])[:, 1::2]
    np.testing.assert_allclose(some, wanted.reshape(2, -1), rtol=1e-9, atol=1e-9)
