"""The rules of Keras's recurrent cells: per-example gradients from all steps of a cell at once.

What a step adds to its states depends on the weights through the sums before the gates only; their
gradient dz at every step is one vector-Jacobian product for all steps together, for the states
before each step and the gradients after it are known. Index letters: r rows (n examples of f rows
each), t step, i in, o out, g gate.
"""

from __future__ import annotations

import sys

import keras
import tensorflow as tf

from tf_gsnr.gradients.layerwise import convolution, forms

layers = keras.layers


def products(call, steps) -> list | None:
    """`[(variable, form), ...]` of a cell's `recurrent.Steps`, or None: it has no rule."""
    rule = _RULES.get(type(steps.cell))
    if rule is None or _drops_all(steps.cell):
        return None
    return rule(call, steps)


def _drops_all(cell):
    """Keras's cells do not agree on what a dropout of 1 is."""
    return max(cell.dropout, cell.recurrent_dropout) >= 1


def _lstm(call, steps):
    """`z = x K + h R + b`; `i, f, c', o = z`; `c <- s(f) c + s(i) a(c')`; `h <- s(o) a(c)`."""
    cell = steps.cell
    h, c = steps.states
    xs, hs = _inputs(steps, steps.x, 4), _recurrent_inputs(steps, h, 4)
    z = _sums(xs, cell.kernel) + _sums(hs, cell.recurrent_kernel) + _bias(cell, h.dtype)
    with tf.GradientTape() as tape:
        tape.watch(z)
        new = _lstm_gates(cell, z, c, -1)
    dz = _gradient(tape, [new[0], *new], z, steps)
    return _found(call, cell, xs, hs, dz, dz, dz)


def _lstm_gates(cell, z, c, axis):
    """`(h, c)` after the step."""
    i, f, candidate, o = tf.split(z, 4, axis)
    c = cell.recurrent_activation(f) * c
    c += cell.recurrent_activation(i) * cell.activation(candidate)
    return cell.recurrent_activation(o) * cell.activation(c), c


def _gru(call, steps):
    """`h <- s(z) h + (1 - s(z)) a(x' + r R h)`, r inside or outside of the product with R.

    The sums of the input, `x K + b[0]`, and of the state, `h R + b[1]`, have gradients apart.
    """
    cell = steps.cell
    (h,) = steps.states
    u = cell.units
    xs, hs = _inputs(steps, steps.x, 3), _recurrent_inputs(steps, h, 3)
    bias, recurrent_bias = _bias(cell, h.dtype), 0
    if cell.use_bias and cell.reset_after:
        bias, recurrent_bias = tf.unstack(bias)
    x_sum = _sums(xs, cell.kernel) + bias
    kernel = tf.cast(tf.convert_to_tensor(cell.recurrent_kernel.value), h.dtype)
    with tf.GradientTape() as tape:
        tape.watch(x_sum)
        if cell.reset_after:
            h_sum = _sums(hs, cell.recurrent_kernel) + recurrent_bias
            tape.watch(h_sum)
            update, reset = _update_and_reset(cell, x_sum, h_sum)
            candidate = x_sum[..., 2 * u :] + reset * h_sum[..., 2 * u :]
        else:
            gates = _sums(hs[:2] if len(hs) > 1 else hs, kernel[:, : 2 * u])
            tape.watch(gates)
            update, reset = _update_and_reset(cell, x_sum, gates)
            inside = reset * hs[-1]
            rest = tf.matmul(inside, kernel[:, 2 * u :])
            tape.watch(rest)
            h_sum = [gates, rest]
            candidate = x_sum[..., 2 * u :] + rest
        new = update * h + (1 - update) * cell.activation(candidate)
    dx, dh = _gradient(tape, [new, new], [x_sum, h_sum], steps)
    d_bias = dx
    if not cell.reset_after:
        hs, dh = [*([hs[0]] * 2 if len(hs) == 1 else hs[:2]), inside], tf.concat(dh, -1)
    elif cell.use_bias:
        d_bias = tf.stack([dx, dh], -2)
    return _found(call, cell, xs, hs, dx, dh, d_bias)


def _update_and_reset(cell, x_sum, h_sum):
    u = cell.units
    gates = cell.recurrent_activation(x_sum[..., : 2 * u] + h_sum[..., : 2 * u])
    return tf.split(gates, 2, -1)


def _simple(call, steps):
    """`h <- a(x K + h R + b)`."""
    cell = steps.cell
    (h,) = steps.states
    xs, hs = _inputs(steps, steps.x, 1), _recurrent_inputs(steps, h, 1)
    z = _sums(xs, cell.kernel) + _sums(hs, cell.recurrent_kernel) + _bias(cell, h.dtype)
    with tf.GradientTape() as tape:
        tape.watch(z)
        new = z if cell.activation is None else cell.activation(z)
    dz = _gradient(tape, [new, new], z, steps)
    return _found(call, cell, xs, hs, dz, dz, dz)


def _conv_lstm(call, steps):
    """`_lstm` with convolutions in the place of the products; one step is one image."""
    cell = steps.cell
    h, c = steps.states
    if cell.data_format != "channels_last" or None in steps.x.shape[1:]:
        return None
    if not isinstance(call.fold, int):
        return None
    xs, hs = _inputs(steps, steps.x, 4), _recurrent_inputs(steps, h, 4)
    one = (1,) * cell.rank
    x_kind = (cell.strides, cell.padding, cell.dilation_rate)
    h_kind = (one, "same", one)
    z = _convolved(xs, cell.kernel, x_kind) + _convolved(hs, cell.recurrent_kernel, h_kind)
    z += _bias(cell, h.dtype)
    with tf.GradientTape() as tape:
        tape.watch(z)
        new = _lstm_gates(cell, z, _images(c), -1)
    flat = [_images(g) for g in (steps.d_output, *steps.d_states)]
    dz = tape.gradient([new[0], *new], z, output_gradients=flat)
    dz = tf.reshape(dz, [call.n, call.fold * steps.x.shape[1], *z.shape[1:]])
    products = [
        (cell.kernel, _kernel_form(call, xs, dz, cell.kernel, x_kind)),
        (cell.recurrent_kernel, _kernel_form(call, hs, dz, cell.recurrent_kernel, h_kind)),
    ]
    if cell.use_bias:
        products.append((cell.bias, forms.elementwise(dz, cell.bias)))
    return products


def _images(v):
    """`[r, t, ...]` as `[r t, ...]`."""
    return tf.reshape(v, [-1, *v.shape[2:]])


def _convolved(inputs, kernel, kind):
    strides, padding, dilation_rate = kind
    kernel = tf.cast(tf.convert_to_tensor(kernel.value), inputs[0].dtype)
    parts = [
        keras.ops.conv(
            _images(x),
            k,
            strides=strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=dilation_rate,
        )
        for x, k in zip(inputs, tf.split(kernel, len(inputs), -1))
    ]
    return parts[0] if len(parts) == 1 else tf.concat(parts, -1)


def _kernel_form(call, inputs, dz, kernel, kind):
    """As `layer_rules` has it for a convolution of the same kind, one for each mask."""
    strides, padding, dilation_rate = kind
    *spatial, channels, filters = kernel.shape
    part = tf.TensorSpec([*spatial, channels, filters // len(inputs)], kernel.dtype)
    made = []
    for x, d in zip(inputs, tf.split(dz, len(inputs), -1)):
        pads = convolution.paddings(padding, x.shape[2:-1], spatial, strides, dilation_rate)
        x = tf.reshape(x, [call.n, call.fold * x.shape[1], *x.shape[2:]])
        made.append(convolution.Kernel(x, d, part, strides, dilation_rate, pads))
    return _side_by_side(made, kernel)


def _inputs(steps, x, gates) -> list:
    """The input of the kernel: one for all gates, or one for each where their masks differ."""
    return _dropped(steps, x, steps.dropout, steps.cell.dropout, gates)


def _recurrent_inputs(steps, h, gates) -> list:
    return _dropped(steps, h, steps.recurrent_dropout, steps.cell.recurrent_dropout, gates)


def _dropped(steps, v, masks, rate, gates):
    if not steps.training or not rate:
        return [v]
    if not isinstance(masks, (list, tuple)):
        return [v * masks[:, tf.newaxis]]
    assert len(masks) == gates, (steps.cell.name, len(masks))
    return [v * mask[:, tf.newaxis] for mask in masks]


def _sums(inputs, kernel):
    """`[r, t, g o]`: each gate's columns of the kernel on that gate's input."""
    if isinstance(kernel, keras.Variable):
        kernel = tf.convert_to_tensor(kernel.value)
    kernel = tf.cast(kernel, inputs[0].dtype)
    parts = [tf.matmul(x, k) for x, k in zip(inputs, tf.split(kernel, len(inputs), -1))]
    return parts[0] if len(parts) == 1 else tf.concat(parts, -1)


def _bias(cell, dtype):
    if not cell.use_bias:
        return tf.zeros([], dtype)
    return tf.cast(tf.convert_to_tensor(cell.bias.value), dtype)


def _gradient(tape, outputs, sources, steps):
    """Gradient at the sums, from those at the output and at each state after the step."""
    return tape.gradient(outputs, sources, output_gradients=[steps.d_output, *steps.d_states])


def _found(call, cell, xs, hs, dx, dh, d_bias):
    found = [
        (cell.kernel, _outer(call, xs, dx, cell.kernel)),
        (cell.recurrent_kernel, _outer(call, hs, dh, cell.recurrent_kernel)),
    ]
    if cell.use_bias:
        found.append((cell.bias, forms.elementwise(forms.per_example(call, d_bias), cell.bias)))
    return found


def _outer(call, inputs, dz, variable):
    """`sum_t x[n,t]^T dz[n,t]`, gate by gate where their inputs differ."""
    if len(inputs) == 1:
        return forms.outer(call, inputs[0], dz, variable)
    i, o = variable.shape
    part = tf.TensorSpec([i, o // len(inputs)], variable.dtype)
    parts = tf.split(dz, len(inputs), -1)
    return _side_by_side([forms.outer(call, x, d, part) for x, d in zip(inputs, parts)], variable)


def _side_by_side(made, variable):
    """The form of gradients whose columns are those of other forms, one after the other."""
    if len(made) == 1:
        return made[0]
    return forms.rows(lambda: tf.concat([form.materialise() for form in made], -1), variable)


# The class has no public name: it stands beside the layer's base class.
_CONV_LSTM_CELL = sys.modules[layers.ConvLSTM1D.__mro__[1].__module__].ConvLSTMCell
_RULES = {
    layers.LSTMCell: _lstm,
    layers.GRUCell: _gru,
    layers.SimpleRNNCell: _simple,
    _CONV_LSTM_CELL: _conv_lstm,
}
