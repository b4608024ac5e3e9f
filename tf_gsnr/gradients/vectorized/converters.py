"""What `tf.vectorized_map` lacks: vectorised forms of the ops that per-example gradients need.

`tf.vectorized_map` turns the filter gradient of a convolution, and every stateless random op, into
a sequential while_loop over the examples. The converters below replace these loops; they are in
force only inside `with vectorised_ops():`, that is while one of our functions is traced, so that
nobody else's `vectorized_map` changes.

The table of converters that TensorFlow keeps is not public. Should a release move it, the engine
still works, with the loops, and says so.
"""

from __future__ import annotations

import contextlib
import logging as std_logging
import re

import tensorflow as tf
from absl import logging

from tf_gsnr import keras_internals
from tf_gsnr.gradients.layerwise import convolution


@contextlib.contextmanager
def vectorised_ops():
    """While this is open, `tf.vectorized_map` has the converters of this file.

    Ops for which it still falls back to a loop over the examples are logged, once, by name.
    """
    heard = _Listener()
    tf.get_logger().addFilter(heard)
    try:
        with keras_internals.converters(_CONVERTERS):
            yield
    finally:
        tf.get_logger().removeFilter(heard)
        for name in sorted(heard.ops):
            logging.log_first_n(
                logging.WARNING,
                "tf.vectorized_map has no vectorised form of the op %s: it runs in a loop over "
                "the examples, which is slow",
                1,
                name,
            )


class _Listener(std_logging.Filter):
    """Hears TensorFlow say that an op became a loop, keeps its name and drops the message."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def filter(self, record):
        message = record.getMessage()
        found = re.search(r"Using a while_loop for converting (\w+)", message) or re.search(
            r"^(\w+) uses a while_loop", message
        )
        if found:
            self.ops.add(found.group(1))
        # What fails to be vectorised runs in a loop, and is said in one line by `example_map`. A
        # map outside of a graph is a new function each time, which TensorFlow takes for a mistake.
        return not found and "pfor" not in record.pathname and "<function pfor" not in message


def _fold(x):
    """[n, b, ...] -> [n b, ...]"""
    return tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))


def _unfold(x, n):
    """[n b, ...] -> [n, b, ...]"""
    return tf.reshape(x, tf.concat([n, [-1], tf.shape(x)[1:]], 0))


def _spatial(node, name, channels_first):
    values = node.get_attr(name)
    return list(values[2:] if channels_first else values[1:-1])


def _filter_gradient(gradient_fn):
    """A converter for `Conv*BackpropFilter*(input, filter_sizes, out_backprop)`."""

    def convert(node):
        node.stack_inputs(stack_indices=[0, 2])
        x, dz = node.stacked_input(0), node.stacked_input(2)
        kernel = tf.get_static_value(node.unstacked_input(1))
        n = node.pfor.loop_len_vector
        length = tf.get_static_value(n)
        length = None if length is None else int(length[0])
        x.set_shape([length, *x.shape[1:]])
        dz.set_shape([length, *dz.shape[1:]])
        if kernel is None or None in x.shape[1:] or None in dz.shape[1:]:
            raise keras_internals.not_vectorised("its shapes are not known when traced")
        kernel = [int(k) for k in kernel]
        channels_first = node.get_attr("data_format").startswith(b"NC")
        strides = _spatial(node, "strides", channels_first)
        dilations = _spatial(node, "dilations", channels_first)
        if channels_first:
            to_last = [0, 1, *range(3, x.shape.rank), 2]
            x, dz = tf.transpose(x, to_last), tf.transpose(dz, to_last)
        padding = node.get_attr("padding").decode()
        if padding == "EXPLICIT":
            flat = node.get_attr("explicit_paddings")
            pairs = list(zip(flat[::2], flat[1::2]))
            pads = pairs[2:] if channels_first else pairs[1:-1]
        else:
            size = x.shape[2:-1]
            pads = convolution.paddings(padding, size, kernel[:-2], strides, dilations)
        return keras_internals.vectorised(gradient_fn(x, dz, kernel, strides, dilations, pads))

    return convert


def _batched(op, folded, sizes=None):
    """A converter that folds the examples into the batch of the inputs `folded` of `op`.

    `sizes` is the index of an input that holds a shape whose first entry is the batch.
    """

    def convert(node):
        n = node.pfor.loop_len_vector
        if any(node.input(i)[1] for i in range(node.num_inputs) if i not in folded):
            raise keras_internals.not_vectorised("its kernel differs between examples")
        node.stack_inputs(stack_indices=folded)
        inputs = [
            _fold(node.stacked_input(i)) if i in folded else node.unstacked_input(i)
            for i in range(node.num_inputs)
        ]
        if sizes is not None:
            shape = inputs[sizes]
            inputs[sizes] = tf.concat([tf.cast(n, shape.dtype) * shape[:1], shape[1:]], 0)
        out = keras_internals.operation_like(node, op, inputs)
        return [keras_internals.vectorised(_unfold(o, n)) for o in out]

    return convert


def _channels_last(op, folded, sizes=None):
    """`_batched`, computed channels last: TensorFlow has no channels-first kernels on a CPU."""
    batched = _batched(op, folded, sizes)

    def convert(node):
        data_format = node.get_attr("data_format")
        if not data_format.startswith(b"NC"):
            return batched(node)
        node.stack_inputs(stack_indices=folded)
        n = node.pfor.loop_len_vector
        rank = len(data_format)
        to_last, to_first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        attributes = {
            "data_format": data_format[:1].decode() + data_format[2:].decode() + "C",
            "padding": node.get_attr("padding").decode(),
        }
        for name in ("strides", "dilations"):
            attributes[name] = [node.get_attr(name)[i] for i in to_last]
        if attributes["padding"] == "EXPLICIT":
            pads = node.get_attr("explicit_paddings")
            attributes["explicit_paddings"] = [p for i in to_last for p in pads[2 * i : 2 * i + 2]]
        inputs = [
            tf.transpose(_fold(node.stacked_input(i)), to_last)
            if i in folded
            else node.unstacked_input(i)
            for i in range(node.num_inputs)
        ]
        if sizes is not None:
            shape = tf.gather(inputs[sizes], to_last)
            inputs[sizes] = tf.concat([tf.cast(n, shape.dtype) * shape[:1], shape[1:]], 0)
        out = getattr(tf.raw_ops, op)(**dict(zip(_INPUTS[op], inputs)), **attributes)
        return keras_internals.vectorised(_unfold(tf.transpose(out, to_first), n))

    return convert


_INPUTS = {
    "Conv2D": ("input", "filter"),
    "Conv2DBackpropInput": ("input_sizes", "filter", "out_backprop"),
    "Conv3D": ("input", "filter"),
    "Conv3DBackpropInputV2": ("input_sizes", "filter", "out_backprop"),
}


def _bias(node):
    """TensorFlow's own converter is wrong for channels first where all have one bias."""
    if not node.input(1)[1]:
        return _batched("BiasAdd", [0])(node)
    node.stack_inputs()
    z, bias = node.stacked_input(0), node.stacked_input(1)  # [n, b, c, *t] or [n, b, *t, c]; [n, c]
    channel = 2 if node.get_attr("data_format") == b"NCHW" else z.shape.rank - 1
    n, c = tf.unstack(tf.shape(bias))
    shape = [n, *[1] * (channel - 1), c, *[1] * (z.shape.rank - 1 - channel)]
    return keras_internals.vectorised(z + tf.reshape(bias, shape))


def _bias_gradient(node):
    """TensorFlow's own converter is wrong for channels first unless the input has rank 4."""
    dz = node.stacked_input(0)  # [n, b, c, *t] or [n, b, *t, c]
    channel = 2 if node.get_attr("data_format") == b"NCHW" else dz.shape.rank - 1
    axes = [i for i in range(1, dz.shape.rank) if i != channel]
    return keras_internals.vectorised(tf.reduce_sum(dz, axes))


def _matrix_product(node):
    """A batched product of which one factor is the same for all, with that as one matrix.

    TensorFlow's own converter has it broadcast along two axes, which in TensorFlow 2.21 with oneDNN
    writes past the end of its memory (`tf.matmul` of [6, 1, 5, 4] and [4, 9] alone does).
    """
    node.expanddim_inputs_for_broadcast()
    x, y = node.input(0)[0], node.input(1)[0]
    turned = dict(transpose_a=node.get_attr("adj_x"), transpose_b=node.get_attr("adj_y"))
    if x.dtype.is_complex or None in (x.shape.rank, y.shape.rank):
        turned = dict(adjoint_a=turned["transpose_a"], adjoint_b=turned["transpose_b"])
    elif x.shape.rank > 3 and _is_one_matrix(y):
        lead, y = tf.shape(x)[:-2], tf.reshape(y, tf.shape(y)[-2:])
        out = tf.matmul(tf.reshape(x, tf.concat([[-1], tf.shape(x)[-2:]], 0)), y, **turned)
        return keras_internals.vectorised(tf.reshape(out, tf.concat([lead, tf.shape(out)[1:]], 0)))
    elif y.shape.rank > 3 and _is_one_matrix(x):
        lead, x = tf.shape(y)[:-2], tf.reshape(x, tf.shape(x)[-2:])
        out = tf.matmul(x, tf.reshape(y, tf.concat([[-1], tf.shape(y)[-2:]], 0)), **turned)
        return keras_internals.vectorised(tf.reshape(out, tf.concat([lead, tf.shape(out)[1:]], 0)))
    return keras_internals.vectorised(tf.matmul(x, y, **turned))


def _is_one_matrix(v):
    return all(size == 1 for size in v.shape[:-2])


def _random(node):
    """A stateless random op: one draw for the whole batch, from the key that all examples share.

    A batched call of the model draws numbers of shape [n, ...]; here each example asks for
    [1, ...]. Giving example n the n-th slice of the batched draw makes its mask the one that the
    ordinary step uses, so that the mean of the per-example gradients is the ordinary gradient.
    """
    n = node.pfor.loop_len_vector
    shape = node.unstacked_input(0)
    rest = [
        node.stacked_input(i)[0] if node.input(i)[1] else node.unstacked_input(i)
        for i in range(1, node.num_inputs)
    ]
    shape = tf.concat([tf.cast(n, shape.dtype), shape], 0)
    (out,) = keras_internals.operation_like(node, node.op_type, [shape, *rest])
    return keras_internals.vectorised(out)


def _key_counter(node):
    """The key and counter of the seed that all examples share, marked as varying with n."""
    n = node.pfor.loop_len_vector
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=node.stacked_input(0)[0])
    return [
        keras_internals.vectorised(tf.tile(v[tf.newaxis], tf.concat([n, [1]], 0)))
        for v in (key, counter)
    ]


def _reduction(op):
    """A reduction whose axes are constants, as XLA wants those of its gradient to be.

    TensorFlow's own converter computes them from a comparison. That is the same number each time,
    but not one that XLA sees: it takes all that the gradient depends on for constant, and compiles
    anew at every call.
    """

    def converter(pfor_input):
        t, axes = pfor_input.stacked_input(0), pfor_input.unstacked_input(1)
        known = tf.get_static_value(axes)
        if known is None:
            axes += tf.cast(axes >= 0, axes.dtype)
        else:
            axes = tf.constant(known + (known >= 0), axes.dtype)
        return keras_internals.vectorised(op(t, axes, keepdims=pfor_input.get_attr("keep_dims")))

    return converter


_CONVERTERS = {
    "Sum": _reduction(tf.reduce_sum),
    "Mean": _reduction(tf.reduce_mean),
    "Max": _reduction(tf.reduce_max),
    "Min": _reduction(tf.reduce_min),
    "Prod": _reduction(tf.reduce_prod),
    "Conv2DBackpropFilter": _filter_gradient(convolution.kernel_gradients),
    "Conv3DBackpropFilterV2": _filter_gradient(convolution.kernel_gradients),
    "DepthwiseConv2dNativeBackpropFilter": _filter_gradient(convolution.depthwise_kernel_gradients),
    "DepthwiseConv2dNative": _batched("DepthwiseConv2dNative", [0]),
    "DepthwiseConv2dNativeBackpropInput": _batched(
        "DepthwiseConv2dNativeBackpropInput", [2], sizes=0
    ),
    "BatchMatMulV2": _matrix_product,
    "BatchMatMulV3": _matrix_product,
    "BiasAdd": _bias,
    "BiasAddGrad": _bias_gradient,
    "Conv2D": _channels_last("Conv2D", [0]),
    "Conv2DBackpropInput": _channels_last("Conv2DBackpropInput", [2], sizes=0),
    "Conv3D": _channels_last("Conv3D", [0]),
    "Conv3DBackpropInputV2": _channels_last("Conv3DBackpropInputV2", [2], sizes=0),
    "StatelessRandomGetKeyCounter": _key_counter,
    "StatelessRandomUniformV2": _random,
    "StatelessRandomUniformIntV2": _random,
    "StatelessRandomUniformFullIntV2": _random,
    "StatelessRandomNormalV2": _random,
    "StatelessTruncatedNormalV2": _random,
}
