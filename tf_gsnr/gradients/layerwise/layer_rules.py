"""The rules of Keras's layers.

Index letters: n example, t position, i in, o out. Every rule answers for the layer's own variables
that are trainable; see `rules.register_rule`.
"""

from __future__ import annotations

import math
import string

import keras
import tensorflow as tf

from tf_gsnr.gradients.layerwise import convolution, forms
from tf_gsnr.gradients.layerwise.rules import register_rule

layers = keras.layers


def _is_adapted(layer):
    """Whether LoRA or quantisation changes what `layer.kernel` is."""
    return getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None)


@register_rule(layers.Dense, activation="activation")
def dense(call):
    """`G[n,i,o] = sum_t x[n,t,i] dz[n,t,o]`."""
    layer = call.layer
    if _is_adapted(layer):
        return None
    x = tf.ensure_shape(call.x, [*call.x.shape[:-1], layer.kernel.shape[0]])  # was it sparse?
    products = [(layer.kernel, forms.outer(call, x, call.dz, layer.kernel))]
    if layer.bias is not None:
        products.append(
            (layer.bias, forms.elementwise(forms.per_example(call, call.dz), layer.bias))
        )
    return products


@register_rule(layers.EinsumDense, activation="activation")
def einsum_dense(call):
    """The equation `x, kernel -> z` turned round: `x, dz -> n kernel`; an `Outer` if it is one."""
    layer = call.layer
    if _is_adapted(layer) or call.folded:
        return None
    if layer.bias is not None and len(layer.bias.shape) > 1 and 1 in layer.bias.shape:
        return None  # Keras may add it along another axis of the same size: [2, 1] to [n, 2, 2, 1]
    operands, made = layer.equation.replace(" ", "").split("->")
    source, kernel = operands.split(",")
    free = [c for c in string.ascii_letters if c not in operands + made]
    dots = "".join(free[: call.x.shape.rank - len(source.replace("...", ""))])
    source, made = source.replace("...", dots), made.replace("...", dots)
    n = source[0]
    if (
        n != made[0]
        or n in kernel
        or set(kernel) - set(source + made)
        or set(source) - set(kernel + made)
    ):
        return None
    summed = "".join(c for c in kernel if c not in made)
    new = "".join(c for c in kernel if c not in source)
    kept = "".join(c for c in source[1:] if c in made)
    if kernel == summed + new and not set(kept) & set(kernel):
        x = _arranged(call.x, source, n, kept, summed)
        dz = _arranged(call.dz, made, n, kept, new)
        form = forms.outer(call, x, dz, layer.kernel)
    else:
        equation = f"{source},{made}->{n}{kernel}"
        form = forms.rows(lambda: tf.einsum(equation, call.x, call.dz), layer.kernel)
    products = [(layer.kernel, form)]
    if layer.bias is not None:
        products.append((layer.bias, forms.elementwise(call.dz, layer.bias)))
    return products


def _arranged(v, axes, n, kept, rest):
    """`v` with the axes `n, kept..., rest` in one: a matrix of `rest` per example and position."""
    order = [axes.index(c) for c in n + kept + rest]
    if order != sorted(order):
        v = tf.transpose(v, order)
    if len(rest) == 1:
        return v
    sizes = [v.shape[a] for a in range(1 + len(kept), v.shape.rank)]
    lead = tf.shape(v)[: 1 + len(kept)]
    flat = tf.reshape(v, tf.concat([lead, [math.prod(sizes)]], 0))
    return tf.ensure_shape(flat, [*v.shape[: 1 + len(kept)], math.prod(sizes)])


@register_rule(layers.Embedding)
def embedding(call):
    """`G[n,v,o] = sum_t [x[n,t] = v] dz[n,t,o]`, kept as the rows that are not zero."""
    layer = call.layer
    if _is_adapted(layer):
        return None
    ids = tf.cast(call.x, tf.int64)
    return [(layer.embeddings, forms.sparse(call, ids, call.dz, layer.embeddings))]


def reversible_embedding(call):
    """A table that is looked up, or multiplied with; both add up where they are tied.

    `G[n,v,o] = sum_t dz[n,t,v] x[n,t,o]` in reverse, dz being that of the logits before a soft cap.
    """
    layer = call.layer
    reverse = call.kwargs.get("reverse", call.args[1] if len(call.args) > 1 else False)
    if _is_adapted(layer) or not isinstance(reverse, bool):
        return None
    if not reverse:
        return embedding(call)
    x, dz = call.x, call.dz
    cap = layer.logit_soft_cap
    if cap is not None:
        dz *= 1 - tf.square(tf.cast(call.output, dz.dtype) / cap)
    if layer.tie_weights:
        return [(layer.embeddings, forms.outer(call, dz, x, layer.embeddings))]
    return [(layer.reverse_embeddings, forms.outer(call, x, dz, layer.reverse_embeddings))]


# Not in the oldest releases of Keras that the package works with.
if hasattr(layers, "ReversibleEmbedding"):
    register_rule(layers.ReversibleEmbedding)(reversible_embedding)


@register_rule(layers.LayerNormalization)
@register_rule(layers.GroupNormalization)
@register_rule(layers.BatchNormalization)
def normalization(call):
    """`G[n] = sum_t xhat[n,t] dz[n,t]` for the scale, `sum_t dz[n,t]` for the offset.

    xhat is what the layer itself makes of its input with scale 1 and offset 0, so every axis,
    group, mask and mode means here what it means there.
    """
    layer = call.layer
    scale = getattr(layer, "gamma", None)
    if scale is None:
        scale = getattr(layer, "scale", None)
    offset = getattr(layer, "beta", None)
    scale = scale if isinstance(scale, keras.Variable) else None
    offset = offset if isinstance(offset, keras.Variable) else None
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    axes = [a % call.x.shape.rank for a in axes]
    if axes != sorted(axes) or 0 in axes:
        return None
    if type(layer).__name__ == "RMSNormalization" and axes[-1] != call.x.shape.rank - 1:
        return None  # Keras multiplies by the scale along the last axes, whichever are normalised
    products = []
    if scale is not None:
        neutral = [(v, tf.convert_to_tensor(v.value)) for v in layer.non_trainable_variables]
        neutral.append((scale, tf.ones(scale.shape, scale.dtype)))
        if offset is not None:
            neutral.append((offset, tf.zeros(offset.shape, offset.dtype)))
        with keras.StatelessScope(state_mapping=neutral):
            normalized = layer.call(*call.args, **call.kwargs)
        product = tf.cast(normalized, scale.dtype) * tf.cast(call.dz, scale.dtype)
        products.append((scale, _along(call, product, axes, scale)))
    if offset is not None:
        products.append((offset, _along(call, call.dz, axes, offset)))
    return products


if hasattr(layers, "RMSNormalization"):
    register_rule(layers.RMSNormalization)(normalization)


def _along(call, values, axes, variable):
    """The form of values `[n f, ...]` summed over all axes but n and `axes` of the layer."""
    others = [a for a in range(1, values.shape.rank) if a not in axes]
    values = tf.reduce_sum(values, others) if others else values
    return forms.elementwise(forms.per_example(call, values), variable)


@register_rule(layers.PReLU)
def prelu(call):
    """`G[n] = sum min(x, 0) dz` over the shared axes."""
    layer = call.layer
    product = forms.per_example(call, tf.minimum(call.x, 0) * call.dz)
    return [(layer.alpha, forms.elementwise(product, layer.alpha))]


@register_rule(layers.Conv1D, activation="activation")
@register_rule(layers.Conv2D, activation="activation")
@register_rule(layers.Conv3D, activation="activation")
def conv(call):
    return _convolution(call, call.x, call.dz)


@register_rule(layers.Conv1DTranspose, activation="activation")
@register_rule(layers.Conv2DTranspose, activation="activation")
@register_rule(layers.Conv3DTranspose, activation="activation")
def conv_transpose(call):
    """A convolution with input and output gradient in each other's place."""
    return _convolution(call, call.dz, call.x)


def _convolution(call, x, dz):
    """`G[n,k,c,o] = sum_t x[n,t*stride+k*dilation,c] dz[n,t,o]`."""
    layer = call.layer
    if not isinstance(call.fold, int):
        return None
    x, dz = _channels_last(call, x), _channels_last(call, dz)
    if _is_adapted(layer) or None in x.shape[2:] or None in dz.shape[2:]:
        return None
    kernel = layer.kernel
    pads = _pads(layer, x.shape[2:-1], kernel.shape[:-2])
    form = convolution.Kernel(x, dz, kernel, layer.strides, layer.dilation_rate, pads)
    return [(kernel, form), *_channel_bias(call)]


@register_rule(layers.DepthwiseConv1D, activation="activation")
@register_rule(layers.DepthwiseConv2D, activation="activation")
def depthwise(call):
    """`G[n,k,c,m] = sum_t x[n,t*stride+k*dilation,c] dz[n,t,c,m]`."""
    layer = call.layer
    if not isinstance(call.fold, int):
        return None
    x, dz = _channels_last(call, call.x), _channels_last(call, call.dz)
    if None in x.shape[2:] or None in dz.shape[2:]:
        return None
    return [(layer.kernel, _depthwise(layer, x, dz, layer.kernel)), *_channel_bias(call)]


@register_rule(layers.SeparableConv1D, activation="activation")
@register_rule(layers.SeparableConv2D, activation="activation")
def separable(call):
    """A depthwise convolution, then a dense layer over the channels at each position."""
    layer = call.layer
    if layer.data_format != "channels_last" or not isinstance(call.fold, int):
        return None
    first, second = layer.depthwise_kernel, layer.pointwise_kernel
    matrix = tf.convert_to_tensor(second.value)
    between = keras.ops.depthwise_conv(
        call.x,
        tf.cast(first.value, call.x.dtype),
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    flat = tf.reshape(matrix, matrix.shape[-2:])
    dz = tf.matmul(call.dz, tf.cast(flat, call.dz.dtype), transpose_b=True)
    x, dz = _channels_last(call, call.x), _channels_last(call, dz)
    if None in x.shape[2:] or None in dz.shape[2:]:
        return None
    return [
        (first, _depthwise(layer, x, dz, first)),
        (second, forms.outer(call, between, call.dz, second)),
        *_channel_bias(call),
    ]


def _depthwise(layer, x, dz, kernel):
    pads = _pads(layer, x.shape[2:-1], kernel.shape[:-2])
    where = layer.strides, layer.dilation_rate, pads
    return convolution.Kernel(x, dz, kernel, *where, depthwise=True)


def _channels_last(call, v):
    """`[n f, ...]`, channels first or last, as `[n, f, ..., channels]`."""
    v = forms.per_example(call, v, keep_fold=True)
    if call.layer.data_format == "channels_first":
        v = tf.transpose(v, [0, 1, *range(3, v.shape.rank), 2])
    return v


def _channel_bias(call):
    if call.layer.bias is None:
        return []
    dz = _channels_last(call, call.dz)
    return [(call.layer.bias, forms.elementwise(dz, call.layer.bias))]


def _pads(layer, size, kernel):
    if layer.padding == "causal":
        return [((kernel[0] - 1) * layer.dilation_rate[0], 0)]
    return convolution.paddings(layer.padding, size, kernel, layer.strides, layer.dilation_rate)
