"""What a rule makes of a layer's call: the form of its per-example gradients.

`rows`, `elementwise`, `outer` and `sparse` make one, `add` puts those of several calls together.
The classes behind them are in `dense_forms` and `sparse_form`. Index letters: n example, f row of
an example, t position within an example, i in, o out.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tf_gsnr.gradients.layerwise.dense_forms import Form, Outer, Rows, product
from tf_gsnr.gradients.layerwise.sparse_form import Sparse, Tied


def per_example(call, values, keep_fold: bool = False):
    """`[n f, ...]` as `[n, f, ...]`; as it is where an example has one row, unless `keep_fold`."""
    if not call.folded and not keep_fold:
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
    if call.folded or x.shape.rank != 2:
        positions = list(x.shape[1:-1])
        known = None not in positions and isinstance(call.fold, int)
        t = call.fold * product(positions) if known else -1
        last = [] if known and t == 1 else [t]
        n = call.n if known else tf.shape(x)[0] // call.fold
        x = tf.reshape(x, [n, *last, x.shape[-1]])
        dz = tf.reshape(dz, [n, *last, dz.shape[-1]])
    return Outer(x, dz, variable.shape, variable.dtype)


def sparse(call, ids, dz, variable) -> Sparse:
    """The form of rows `dz [n f, ..., o]` that were looked up at `ids [n f, ...]`."""
    ids = tf.reshape(ids, [call.n, -1])
    return Sparse(ids, tf.reshape(dz, [call.n, -1, dz.shape[-1]]), variable.shape, variable.dtype)


def add(forms: Sequence[Form]) -> Form:
    """The form of the sum: a variable used several times adds up before anything is squared."""
    first = forms[0]
    if len(forms) == 1:
        return first
    tables = [f for f in forms if isinstance(f, Sparse)]
    products = [f for f in forms if isinstance(f, Outer) and len(f.columns) == 1]
    if tables and products and len(tables) + len(products) == len(forms):
        return Tied(_one_table(tables), _one_product(products))
    if len(tables) == len(forms):
        return _one_table(tables)
    if len(products) == len(forms):
        return _one_product(products)
    return Rows(lambda: tf.add_n([f.materialise() for f in forms]), first.shape, first.dtype)


def _one_table(tables: list[Sparse]) -> Sparse:
    ids, dz = (tf.concat(parts, 1) for parts in zip(*((f.ids, f.dz) for f in tables)))
    return Sparse(ids, dz, tables[0].shape, tables[0].dtype)


def _one_product(products: list[Outer]) -> Outer:
    first = products[0]
    if len(products) == 1:
        return first
    x = [_positions(f.column(f.columns[0])) for f in products]
    dz = [_positions(f.dz) for f in products]
    return Outer(tf.concat(x, 1), tf.concat(dz, 1), first.shape, first.dtype)


def _positions(v):
    return v[:, tf.newaxis, :] if v.shape.rank == 2 else v
