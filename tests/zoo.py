"""Small models that between them hold every layer and every way of putting layers together.

Each entry of `ZOO` is a function of a numpy random generator, from which it draws its shapes, and
returns `(model, x, y)`; `y` is real and the loss is the mean squared error. What runs in training
mode only (dropout) is in `TRAINING`.
"""

import keras
import numpy as np
import tensorflow as tf

L = keras.layers
# The oldest releases of Keras lack it, and `ReversibleEmbedding`.
RMSNormalization = getattr(L, "RMSNormalization", L.LayerNormalization)


def _stack(*layers, shape, ints=0, n=5):
    """A Sequential model of `layers` with a small dense head."""

    def make(rng):
        made = [layer() for layer in layers]
        model = keras.Sequential([keras.Input(shape), *made, L.Flatten(), L.Dense(3)])
        x = rng.integers(0, ints, size=(n, *shape)) if ints else rng.normal(size=(n, *shape))
        return model, x, rng.normal(size=(n, 3))

    return make


def _image(layer, **kwargs):
    return _stack(lambda: layer(**kwargs), lambda: L.Activation("tanh"), shape=(9, 8, 2))


def _line(layer, **kwargs):
    return _stack(lambda: layer(**kwargs), lambda: L.Activation("tanh"), shape=(9, 2))


def _volume(layer, **kwargs):
    return _stack(lambda: layer(**kwargs), lambda: L.Activation("tanh"), shape=(5, 6, 4, 2), n=3)


def _first(layer, shape=(2, 9, 8), **kwargs):
    return _stack(lambda: layer(data_format="channels_first", **kwargs), shape=shape)


def _random_dense(rng):
    sizes = rng.integers(1, 7, size=4)
    shape = tuple(int(s) for s in rng.integers(1, 5, size=rng.integers(1, 4)))
    layers = [
        L.Dense(int(s), activation=str(rng.choice(["tanh", "relu", "linear"]))) for s in sizes
    ]
    model = keras.Sequential([keras.Input(shape), *layers, L.Flatten(), L.Dense(2)])
    n = int(rng.integers(2, 7))
    return model, rng.normal(size=(n, *shape)), rng.normal(size=(n, 2))


def _random_convolution(rng):
    rank = int(rng.integers(1, 4))
    layer = [L.Conv1D, L.Conv2D, L.Conv3D][rank - 1]
    strided = bool(rng.integers(2))
    groups = int(rng.integers(1, 3)) if rank < 3 else 1
    channels = 2 * int(rng.integers(1, 5))
    sizes = tuple(int(s) for s in rng.integers(5, 9, size=rank))
    kwargs = dict(
        filters=2 * int(rng.integers(1, 5)),
        kernel_size=tuple(int(k) for k in rng.integers(1, 4, size=rank)),
        padding=str(rng.choice(["same", "valid"])),
        strides=2 if strided else 1,
        dilation_rate=1 if strided or groups > 1 or rank == 3 else int(rng.integers(1, 3)),
        groups=groups,
        use_bias=bool(rng.integers(2)),
        activation="tanh",
    )
    model = keras.Sequential([keras.Input((*sizes, channels)), layer(**kwargs), L.Flatten()])
    model.add(L.Dense(2))
    n = int(rng.integers(2, 5))
    return model, rng.normal(size=(n, *sizes, channels)), rng.normal(size=(n, 2))


def _mlp(rng):
    model = keras.Sequential(
        [keras.Input([6]), L.Dense(5, activation="relu"), L.Dense(4, activation="softmax")]
    )
    return model, rng.normal(size=(8, 6)), rng.normal(size=(8, 4))


def _several_inputs_and_outputs(rng):
    a, b = keras.Input([4], name="a"), keras.Input([5, 3], name="b")
    h = L.Concatenate()(
        [L.Dense(3, activation="tanh")(a), L.GlobalAveragePooling1D()(L.Dense(2)(b))]
    )
    model = keras.Model([a, b], [L.Dense(2)(h), L.Dense(3)(L.LayerNormalization()(h))])
    x = [rng.normal(size=(4, 4)), rng.normal(size=(4, 5, 3))]
    return model, x, [rng.normal(size=(4, 2)), rng.normal(size=(4, 3))]


def _subclassed(rng):
    class Residual(keras.Model):
        def __init__(self):
            super().__init__()
            self.stem = L.Dense(4)
            self.blocks = [keras.Sequential([L.Dense(4, activation="tanh")]) for _ in range(2)]
            self.unused = L.Dense(3)
            self.gain = self.add_weight(name="gain", shape=(4,), initializer="ones")
            self.head = L.Dense(2)

        def build(self, shape):
            self.unused.build((None, 4))
            super().build(shape)

        def call(self, x, training=None):
            h = self.stem(x) * self.gain
            for block in self.blocks:
                h = h + block(h)
            return self.head(h)

    model = Residual()
    x = rng.normal(size=(5, 3))
    model(x)
    return model, x, rng.normal(size=(5, 2))


def _shared(rng):
    a, b = keras.Input([4]), keras.Input([4])
    dense, norm = L.Dense(4, activation="tanh"), L.LayerNormalization()
    h = L.Multiply()([norm(dense(a)), norm(dense(dense(b)))])
    model = keras.Model([a, b], L.Dense(2)(h))
    return model, [rng.normal(size=(5, 4)), rng.normal(size=(5, 4))], rng.normal(size=(5, 2))


def _shared_convolution(rng):
    image = keras.Input((8, 8, 2))
    conv = L.Conv2D(2, 3, padding="same", activation="tanh")
    model = keras.Model(image, L.Dense(2)(L.Flatten()(conv(conv(image)))))
    return model, rng.normal(size=(4, 8, 8, 2)), rng.normal(size=(4, 2))


def _tied_embedding(**options):
    """A language model: its table is looked up twice and multiplied with."""

    def make(rng):
        ids = keras.Input((5,), dtype="int32")
        table = L.ReversibleEmbedding(9, 4, **options)
        first, second = table(ids), table((ids + 2) % 9)
        logits = table(L.Dense(4, activation="tanh")(first * second), reverse=True)
        model = keras.Model(ids, logits)
        return model, rng.integers(0, 9, size=(6, 5)), rng.normal(size=(6, 5, 9))

    return make


def _shared_embedding(rng):
    a, b = keras.Input([3], dtype="int32"), keras.Input([4], dtype="int32")
    table = L.Embedding(7, 3)
    h = L.Concatenate(axis=1)([table(a), table(b)])
    model = keras.Model([a, b], L.Dense(2)(L.Flatten()(L.Activation("tanh")(h))))
    x = [rng.integers(0, 7, size=(5, 3)), rng.integers(0, 7, size=(5, 4))]
    return model, x, rng.normal(size=(5, 2))


def _nested(rng):
    inner = keras.Sequential([L.Dense(4, activation="tanh"), L.Dense(3)])
    x = keras.Input([5])
    model = keras.Model(x, L.Dense(2)(inner(L.Dense(5)(x))))
    return model, rng.normal(size=(5, 5)), rng.normal(size=(5, 2))


def _frozen_layers(rng):
    model = keras.Sequential(
        [keras.Input([4]), L.Dense(4, activation="tanh"), L.Dense(3), L.Dense(2)]
    )
    model.layers[1].trainable = False
    return model, rng.normal(size=(5, 4)), rng.normal(size=(5, 2))


def _stopped_gradient(rng):
    x = keras.Input([4])
    h = L.Dense(4, activation="tanh")(x)
    h = L.Add()([L.Lambda(keras.ops.stop_gradient)(L.Dense(4)(h)), h])
    return keras.Model(x, L.Dense(2)(h)), rng.normal(size=(5, 4)), rng.normal(size=(5, 2))


def _folded(rng):
    """The examples' positions as rows of one batch, as many vision models do with frames."""
    x = keras.Input([6, 4])
    rows = L.Lambda(lambda v: keras.ops.reshape(v, (-1, 4)), output_shape=(4,))(x)
    h = L.LayerNormalization()(L.Dense(3, activation="tanh")(rows))
    h = L.PReLU()(h)
    h = L.Lambda(lambda v: keras.ops.reshape(v, (-1, 6, 3)), output_shape=(6, 3))(h)
    model = keras.Model(x, L.Dense(2)(L.Flatten()(h)))
    return model, rng.normal(size=(4, 6, 4)), rng.normal(size=(4, 2))


def _attention(layer, **kwargs):
    def make(rng):
        x, memory = keras.Input([5, 6]), keras.Input([4, 6])
        h = L.Add()([x, layer(**kwargs)(x, x, use_causal_mask=True)])
        h = L.LayerNormalization()(h)
        h = L.Add()([h, layer(**kwargs)(h, memory)])
        h = L.Dense(4, activation="gelu")(RMSNormalization()(h))
        model = keras.Model([x, memory], L.Dense(2)(L.GlobalAveragePooling1D()(h)))
        data = [rng.normal(size=(4, 5, 6)), rng.normal(size=(4, 4, 6))]
        return model, data, rng.normal(size=(4, 2))

    return make


def _masked_language(rng):
    ids = keras.Input([6], dtype="int32")
    h = L.Embedding(9, 4, mask_zero=True)(ids)
    h = L.LSTM(3, return_sequences=True)(h)
    model = keras.Model(ids, L.Dense(2)(L.GRU(3)(h)))
    x = rng.integers(1, 9, size=(4, 6))
    x[1:, 4:] = 0
    return model, x, rng.normal(size=(4, 2))


class Mixer(L.Layer):
    """A layer nobody has a rule for: variables of its own and a layer inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = L.Dense(3)

    def build(self, shape):
        self.matrix = self.add_weight(name="matrix", shape=(shape[-1], 3))
        self.power = self.add_weight(name="power", shape=(1,), initializer="ones")
        self.inner.build((None, 3))

    def call(self, x):
        h = keras.ops.tanh(keras.ops.matmul(x, self.matrix)) * self.power
        return self.inner(h) + keras.ops.sum(self.matrix)


class Louder(L.Dense):
    """A Dense layer that overrides `call`: the rule of Dense must not be applied."""

    def call(self, inputs, training=None):
        return 2 * super().call(keras.ops.square(inputs))


def _with_statistics(layer, shape):
    """Batch norm with moving statistics that are not 0 and 1."""

    def make(rng):
        model, x, y = _stack(layer, lambda: L.Activation("tanh"), shape=shape)(rng)
        for variable in model.non_trainable_variables:
            if "moving" in variable.name:
                variable.assign(rng.uniform(0.5, 2, size=variable.shape))
        return model, x, y

    return make


ZOO = {
    "mlp": _mlp,
    "dense_random_1": _random_dense,
    "dense_random_2": _random_dense,
    "dense_random_3": _random_dense,
    "conv_random_1": _random_convolution,
    "conv_random_2": _random_convolution,
    "conv_random_3": _random_convolution,
    "conv_random_4": _random_convolution,
    "conv_random_5": _random_convolution,
    "conv_random_6": _random_convolution,
    "conv_random_7": _random_convolution,
    "conv2d_wide": _stack(
        lambda: L.Conv2D(3, (3, 2), padding="same", activation="tanh"),
        lambda: L.Conv2D(6, (2, 3), padding="same", activation="tanh"),
        lambda: L.Conv2D(6, (3, 3), dilation_rate=2, activation="tanh"),
        lambda: L.Conv2D(4, 3, strides=2),
        shape=(12, 11, 5),
    ),
    "dense_sequence": _line(L.Dense, units=4),
    "einsum_dense": _stack(
        lambda: L.EinsumDense("abc,cd->abd", (5, 4), bias_axes="d", activation="tanh"),
        lambda: L.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="de"),
        lambda: L.EinsumDense("abde,def->abf", (5, 3)),
        shape=(5, 2),
    ),
    "einsum_bias_of_two_axes": _stack(  # as many positions as heads: Keras adds it along these
        lambda: L.EinsumDense("abc,cde->abde", (2, 2, 1), bias_axes="de", activation="tanh"),
        L.Flatten,
        shape=(2, 3),
    ),
    "einsum_ellipsis": _stack(
        lambda: L.EinsumDense("...x,xy->...y", 3, bias_axes="y", activation="tanh"),
        L.GlobalAveragePooling1D,
        shape=(5, 2),
    ),
    "conv1d": _line(L.Conv1D, filters=3, kernel_size=3, strides=2),
    "conv1d_causal": _line(L.Conv1D, filters=3, kernel_size=3, padding="causal", dilation_rate=2),
    "conv2d": _image(L.Conv2D, filters=3, kernel_size=3, activation="relu"),
    "conv2d_same_strided": _image(L.Conv2D, filters=3, kernel_size=3, strides=2, padding="same"),
    "conv2d_dilated": _image(L.Conv2D, filters=3, kernel_size=3, dilation_rate=2, padding="same"),
    "conv2d_grouped": _image(L.Conv2D, filters=4, kernel_size=(2, 3), groups=2),
    "conv2d_one": _image(L.Conv2D, filters=3, kernel_size=1, use_bias=False),
    "conv3d": _volume(L.Conv3D, filters=3, kernel_size=(2, 3, 2), padding="same"),
    "depthwise": _image(L.DepthwiseConv2D, kernel_size=3, depth_multiplier=2, padding="same"),
    "depthwise1d": _line(L.DepthwiseConv1D, kernel_size=3, strides=2),
    "separable": _image(L.SeparableConv2D, filters=4, kernel_size=3, depth_multiplier=2),
    "separable1d": _line(L.SeparableConv1D, filters=4, kernel_size=3, activation="tanh"),
    "transposed": _image(L.Conv2DTranspose, filters=3, kernel_size=3, strides=2, padding="same"),
    "transposed1d": _line(L.Conv1DTranspose, filters=3, kernel_size=3, strides=2),
    "transposed3d": _volume(L.Conv3DTranspose, filters=2, kernel_size=2, strides=2),
    "embedding": _stack(
        lambda: L.Embedding(6, 3), lambda: L.Activation("tanh"), shape=(7,), ints=6
    ),
    "layer_norm": _line(L.LayerNormalization),
    "layer_norm_axes": _line(L.LayerNormalization, axis=[1, 2]),
    "group_norm": _stack(
        lambda: L.GroupNormalization(groups=2), lambda: L.Activation("tanh"), shape=(4, 3, 6)
    ),
    "rms_norm": _line(RMSNormalization),
    "unit_scale_only": _line(L.LayerNormalization, center=False),
    "batch_norm": _with_statistics(L.BatchNormalization, (5, 4, 3)),
    "batch_norm_axis": _with_statistics(lambda: L.BatchNormalization(axis=1), (4, 3)),
    "prelu": _line(L.PReLU, alpha_initializer="ones"),
    "prelu_shared": _image(L.PReLU, alpha_initializer="ones", shared_axes=[1, 2]),
    "attention": _attention(L.MultiHeadAttention, num_heads=2, key_dim=3),
    "grouped_attention": _attention(
        L.GroupQueryAttention, head_dim=3, num_query_heads=4, num_key_value_heads=2
    ),
    "time_distributed": _stack(
        lambda: L.TimeDistributed(L.Dense(3, activation="tanh")), shape=(4, 3)
    ),
    "time_distributed_conv": _stack(
        lambda: L.TimeDistributed(L.Conv2D(2, 3)), lambda: L.Activation("tanh"), shape=(3, 5, 5, 2)
    ),
    "lstm": _line(L.LSTM, units=3, return_sequences=True),
    "gru": _line(L.GRU, units=3),
    "simple_rnn": _line(L.SimpleRNN, units=3),
    "bidirectional": _stack(
        lambda: L.Bidirectional(L.LSTM(2, return_sequences=True)), shape=(4, 2)
    ),
    "masked_language": _masked_language,
    "several_inputs_and_outputs": _several_inputs_and_outputs,
    "subclassed": _subclassed,
    "shared": _shared,
    "shared_convolution": _shared_convolution,
    "shared_embedding": _shared_embedding,
    "nested": _nested,
    "frozen_layers": _frozen_layers,
    "stopped_gradient": _stopped_gradient,
    "folded": _folded,
    "custom": _stack(Mixer, shape=(4,)),
    "overridden": _stack(lambda: Louder(3), lambda: L.Activation("tanh"), shape=(4,)),
}
if hasattr(L, "ReversibleEmbedding"):
    ZOO |= {
        "tied_embedding": _tied_embedding(),
        "tied_embedding_capped": _tied_embedding(logit_soft_cap=2.0),
        "reversed_embedding_of_its_own": _tied_embedding(tie_weights=False),
    }

# TensorFlow has channels-first kernels on accelerators only, but the rules and oneDNN run them.
CHANNELS_FIRST = {
    "conv2d_first": _first(L.Conv2D, filters=3, kernel_size=3, activation="tanh"),
    "depthwise_first": _first(L.DepthwiseConv2D, kernel_size=3),
}


def make(name, dtype="float32", seed=0):
    """`(model, x, y)` of an entry, in a dtype, always with the same weights and data."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx(dtype)  # the dtype of keras.Input
    try:
        keras.utils.set_random_seed(seed)
        rng = np.random.default_rng([seed, *name.encode()])
        model, x, y = {**ZOO, **CHANNELS_FIRST}[name](rng)
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])
    for variable in model.variables:  # initializers draw other numbers in another dtype
        if variable.dtype.startswith("float") and "moving" not in variable.name:
            signs = rng.choice([-1, 1], size=variable.shape)
            variable.assign(signs * rng.uniform(0.2, 0.8, size=variable.shape))

    def cast(v):
        return v if v.dtype.kind in "iu" else v.astype(dtype)

    return model, *tf.nest.map_structure(cast, (x, y))
