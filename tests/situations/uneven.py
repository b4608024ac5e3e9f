"""Layers within which sizes depend on the data: graphs, masks, routes, ragged rows."""

import tensorflow as tf

from situations.parts import SERIES, L, X, case, fit, how, seq


class Of(L.Layer):
    """A function of the input and a kernel."""

    def __init__(self, function, width):
        super().__init__()
        self.function, self.width = function, width

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.width))

    def call(self, x):
        return self.function(x, tf.convert_to_tensor(self.kernel))

    def compute_output_shape(self, shape):
        return (shape[0], self.width)


def pooled(x, w):
    """Nodes of a graph, summed by graph."""
    size = tf.shape(x)
    owner = tf.repeat(tf.range(size[0]), size[1])
    return tf.math.segment_sum(tf.nn.relu(tf.reshape(x, [-1, x.shape[-1]]) @ w), owner)


def masked(x, w):
    """A product for some rows only."""
    kept = x[:, 0] > 0
    return tf.scatter_nd(tf.where(kept), tf.boolean_mask(x, kept) @ w, [tf.shape(x)[0], 4])


def parted(x, w):
    route = tf.cast(x[:, 0] > 0, tf.int32)
    parts = tf.dynamic_partition(x, route, 2)
    rows = tf.dynamic_partition(tf.range(tf.shape(x)[0]), route, 2)
    return tf.dynamic_stitch(rows, [parts[0] @ w, tf.tanh(parts[1] @ w)])


def edges(x, w):
    """The mean over the positions that are there."""
    places = tf.where(x[:, :, 0] > -0.3)
    values = tf.gather_nd(tf.tensordot(x, w, 1), places)
    return tf.math.unsorted_segment_mean(values, places[:, 0], tf.shape(x)[0])


def repeated(x, w):
    times, n = 1 + tf.cast(x[:, 0] > 0, tf.int32), tf.shape(x)[0]
    values = tf.tanh(tf.repeat(x, times, axis=0) @ w)
    return tf.math.unsorted_segment_sum(values, tf.repeat(tf.range(n), times), n)


def sparse(x, w):
    return tf.sparse.sparse_dense_matmul(tf.sparse.from_dense(tf.nn.relu(x)), w)


def ragged(x, w):
    lengths = 2 + 2 * tf.cast(x[:, 0, 0] > 0, tf.int64)
    return tf.reduce_mean(tf.RaggedTensor.from_tensor(tf.tensordot(x, w, 1), lengths), 1)


class Routed(L.Layer):
    """A hard mixture of experts: each sees its own rows only."""

    def __init__(self):
        super().__init__()
        self.experts = [L.Dense(4), L.Dense(4)]

    def build(self, shape):
        for layer in self.experts:
            layer.build(shape)

    def call(self, x):
        first = x[:, 0] > 0
        total = tf.zeros([tf.shape(x)[0], 4])
        for expert, kept in zip(self.experts, (first, ~first)):
            total += tf.scatter_nd(tf.where(kept), expert(x[kept]), tf.shape(total, tf.int64))
        return total

    def compute_output_shape(self, shape):
        return (shape[0], 4)


def around(function, shape):
    return lambda: seq(shape, Of(function, 4), L.Dense(2))


LATE = X.copy()  # the first batches go one way
LATE[: len(X) // 2, 0] = 1 + abs(LATE[: len(X) // 2, 0])
SAME = dict(moments="same", engines=("vectorized",))
KIND = "structure: sizes that depend on the data"
for function in (masked, parted, repeated, sparse):
    case(f"uneven: {function.__name__}", KIND, around(function, [5]), how(), fit(), **SAME)
for function in (pooled, edges, ragged):
    case(f"uneven: {function.__name__}", KIND, around(function, [6, 3]), how(), fit(SERIES), **SAME)
case("uneven: masked, late", KIND, around(masked, [5]), how(), fit(LATE), **SAME)
for name, x in (("at once", X), ("late", LATE)):
    case(
        f"uneven: routed, {name}",
        KIND,
        lambda: seq([5], Routed(), L.Dense(2)),
        how(),
        fit(x),
        **SAME,
    )
