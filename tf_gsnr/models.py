"""A model's name -> the network, as the paper has it.

To add one: a function `(input_shape, outputs, width) -> keras.Model`, and a line in `MODELS`.
One of your own goes by `module:function`, without a line here (docs/your_own_experiment.md).
The last layer is linear: logits for a classification, the prediction for a regression. Layers have
names of their own: records are keyed by them, and Keras's automatic ones count up in a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tf_gsnr import checks, lookup


def mnist_cnn(input_shape, outputs, width) -> keras.Model:
    """Table 2: two blocks of conv 5x5, relu, maxpool 2; dense 10p, relu; dense 10. p: the width."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(width, 5, activation="relu", name="conv1"),
            layers.MaxPooling2D(2),
            layers.Conv2D(width, 5, activation="relu", name="conv2"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10 * width, activation="relu", name="dense1"),
            layers.Dense(outputs, name="output"),
        ],
        name="mnist_cnn",
    )


def cifar_cnn(input_shape, outputs, width) -> keras.Model:
    """Table 3: four blocks of twice conv 3x3, batch norm, relu, then maxpool 2; three dense layers.

    Channels p, 2p, 4p, 8p, with p the width; dense 8p, relu, twice; dense 10. The convolutions have
    no bias [ours]: batch norm takes it out again, so the loss would not depend on it.
    """
    network = keras.Sequential([keras.Input(input_shape)], name="cifar_cnn")
    for block, channels in enumerate((width, 2 * width, 4 * width, 8 * width), 1):
        for half in "ab":
            name = f"{block}{half}"
            network.add(
                layers.Conv2D(channels, 3, padding="same", use_bias=False, name=f"conv{name}")
            )
            network.add(layers.BatchNormalization(name=f"bn{name}"))
            network.add(layers.ReLU())
        network.add(layers.MaxPooling2D(2))
    network.add(layers.Flatten())
    network.add(layers.Dense(8 * width, activation="relu", name="dense1"))
    network.add(layers.Dense(8 * width, activation="relu", name="dense2"))
    network.add(layers.Dense(outputs, name="output"))
    return network


def toy_mlp(input_shape, outputs, width) -> keras.Model:
    """Appendix A.3: two inputs, one hidden relu layer of `width` units, one output."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Dense(width, activation="relu", name="hidden"),
            layers.Dense(outputs, name="output"),
        ],
        name="toy_mlp",
    )


def mlp(input_shape, outputs, width) -> keras.Model:
    """Figure 7 [ours]: two hidden relu layers of `width` units, fully connected as (26) is."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(width, activation="relu", name="dense1"),
            layers.Dense(width, activation="relu", name="dense2"),
            layers.Dense(outputs, name="output"),
        ],
        name="mlp",
    )


def simple_cnn(input_shape, outputs, width) -> keras.Model:
    """Figure 5 [ours]: three blocks of conv 3x3, relu, maxpool 2 with p, 2p, 4p channels; dense 8p,
    relu; dense. No batch norm. p: the width."""
    model = keras.Sequential([keras.Input(input_shape), _centred()], name="simple_cnn")
    for block, channels in enumerate((width, 2 * width, 4 * width), 1):
        model.add(
            layers.Conv2D(channels, 3, padding="same", activation="relu", name=f"conv{block}")
        )
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(8 * width, activation="relu", name="dense1"))
    model.add(layers.Dense(outputs, name="output"))
    return model


def resnet18(input_shape, outputs, width) -> keras.Model:
    """He et al. (2016) for small images: a 3x3 stem, four stages of two basic blocks with p, 2p, 4p
    and 8p channels, global average pooling. p: the width, 64 in the original."""

    def conv_bn(x, channels, size, stride, name):
        x = layers.Conv2D(
            channels,
            size,
            stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=name,
        )(x)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)

    image = keras.Input(input_shape)
    x = layers.ReLU()(conv_bn(_centred()(image), width, 3, 1, "stem"))
    for stage in range(4):
        for block in range(2):
            name, channels = f"stage{stage + 1}_block{block + 1}", width * 2**stage
            stride = 2 if stage and not block else 1
            h = layers.ReLU()(conv_bn(x, channels, 3, stride, f"{name}_conv1"))
            h = conv_bn(h, channels, 3, 1, f"{name}_conv2")
            shortcut = x if stride == 1 else conv_bn(x, channels, 1, stride, f"{name}_shortcut")
            x = layers.ReLU()(layers.Add()([h, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(outputs, name="output")(x), name="resnet18")


def logistic_regression(input_shape, outputs, width) -> keras.Model:
    """A shallow model: one linear layer, from zero weights; softmax cross-entropy. No width."""
    return _linear(input_shape, outputs, "logistic_regression")


def pooled_logistic_regression(input_shape, outputs, width) -> keras.Model:
    """Logistic regression on images averaged to width x width: few parameters, a convex loss."""
    if len(input_shape) != 3 or any(side % width for side in input_shape[:2]):
        raise ValueError(f"expected images whose sides are multiples of --width={width}")
    pool = tuple(side // width for side in input_shape[:2])
    name = "pooled_logistic_regression"
    return _linear(input_shape, outputs, name, layers.AveragePooling2D(pool))


def linear_svm(input_shape, outputs, width) -> keras.Model:
    """The same layer with the hinge loss: a linear support-vector machine (without its penalty)."""
    return _linear(input_shape, outputs, "linear_svm")


def _linear(input_shape, outputs, name, *before):
    output = layers.Dense(outputs, kernel_initializer="zeros", name="output")
    inputs = keras.Input(input_shape)
    return keras.Sequential([inputs, _centred(), *before, layers.Flatten(), output], name=name)


def _centred():
    """Pixels 0..1 to -2..2: on CIFAR-10 mean 0 and variance 1, nearly."""
    return layers.Rescaling(4, offset=-2)


def cross_entropy(y_true, y_pred):
    """Softmax cross-entropy of logits `[n, classes]` with labels `[n]`, per example: `[n]`."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(_labels(y_true), y_pred)


def hinge(y_true, y_pred):
    """Multi-class hinge loss (Weston and Watkins 1999) of scores `[n, C]` with labels `[n]`: `[n]`.

        1/(C - 1) sum_{c != y} max(0, 1 + s_c - s_y)

    Example:

    >>> hinge(tf.constant([1]), tf.constant([[0.5, 1.0, -1.0]])).numpy().tolist()
    [0.25]
    """
    true = tf.one_hot(_labels(y_true), y_pred.shape[-1], dtype=y_pred.dtype)
    own = tf.reduce_sum(true * y_pred, axis=-1, keepdims=True)
    others = (1 - true) * tf.nn.relu(1 + y_pred - own)
    return tf.reduce_sum(others, axis=-1) / (y_pred.shape[-1] - 1)


def _labels(y_true):
    """Integers `[n]`: Keras hands them over as floats, and as `[n, 1]`."""
    return tf.cast(tf.reshape(y_true, [-1]), tf.int64)


MODELS: dict[str, Callable] = {
    "mnist_cnn": mnist_cnn,
    "cifar_cnn": cifar_cnn,
    "toy_mlp": toy_mlp,
    "mlp": mlp,
    "simple_cnn": simple_cnn,
    "resnet18": resnet18,
    "logistic_regression": logistic_regression,
    "pooled_logistic_regression": pooled_logistic_regression,
    "linear_svm": linear_svm,
}

LOSSES: dict[str, Callable] = {"linear_svm": hinge}  # of the others, see `loss`


def loss(name: str, classes):
    """The loss of the named network, as `measure.gradient_moments` takes it.

    Args:
      name: as in `build`.
      classes: the data set's, `data.Source.classes`; None for a regression.
    """
    return "mse" if classes is None else LOSSES.get(name, cross_entropy)


def per_example(loss):
    """A loss of `loss`, or a Keras loss, as a function `(y_true, y_pred) -> [n]`.

    For networks with one output of one position, on which Keras's masks and weights do nothing.
    Unlike `gradients.losses` it can be differentiated forwards.

    >>> per_example("mse")(tf.constant([[0.0]]), tf.constant([[3.0]])).numpy().tolist()
    [9.0]
    """
    losses = keras.losses.get(loss)
    return losses.call if isinstance(losses, keras.losses.Loss) else losses


def build(name: str, input_shape, outputs: int, width: int, seed: int) -> keras.Model:
    """Builds the named network; the same seed gives the same initial weights.

    Args:
      name: a key of `MODELS`, or `module:function`, a function like theirs.
      input_shape: of one example.
      outputs: the number of classes, or of regression targets.
      width: of the network; what it means is the network's affair.
      seed: of the initial weights.

    Raises:
      ValueError: an unknown name, or a network that does not fit the data set.

    Example:

    >>> build("toy_mlp", (2,), 1, width=20, seed=0).count_params()
    81
    """
    if not isinstance(name, str):
        checks.refuse("model", name, "a name, or module:function")
    width = checks.positive_integer("width", width, most=100_000)
    outputs = checks.positive_integer("outputs", outputs, most=10**6)
    seed = checks.integer("seed", seed, 0, 2**32 - 1, "an integer from 0 on")
    expected = "the shape of an example, a tuple of positive integers"
    checks.instance("input_shape", input_shape, (tuple, list), expected)
    if not input_shape:
        checks.refuse("input_shape", input_shape, expected)
    for size in input_shape:
        checks.integer("input_shape", size, 1, expected=expected)
    if math.prod(input_shape) > 10**8:
        checks.refuse("input_shape", input_shape, expected + ", of at most 100,000,000 numbers")
    reference = lookup.is_reference(name)
    if not reference and name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}{lookup.suggestion(name, MODELS)}; available: "
            f"{', '.join(MODELS)}, or module:function, a function (input_shape, "
            "outputs, width) -> keras.Model"
        )
    parameters = ("input_shape", "outputs", "width")
    function = lookup.function("model", name, parameters) if reference else MODELS[name]
    keras.utils.set_random_seed(seed)
    try:
        model = function(input_shape, outputs, width)
    except ValueError as error:  # Keras's: a layer that does not fit what it is given
        raise ValueError(
            f"--model={name}: cannot be built for examples of shape {tuple(input_shape)}: {error}"
        ) from error
    if reference:
        _check_fits(name, model, input_shape, outputs)
    return model


def _check_fits(name, model, input_shape, outputs):
    """Refuses a user's network that the experiments would measure wrongly, or not at all."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"--model={name}: it returned {type(model).__name__}; expected a keras.Model"
        )
    x = np.random.default_rng(0).normal(size=[2, *input_shape]).astype(np.float32)
    try:
        y = model(x, training=False)
    except Exception as error:  # whatever a user's call raises
        raise ValueError(
            f"--model={name}: it does not take examples of shape {tuple(input_shape)}: {error}"
        ) from error
    shape = list(getattr(y, "shape", [type(y).__name__]))
    if shape != [2, outputs]:
        raise ValueError(
            f"--model={name}: for 2 examples its output has the shape {shape}; expected "
            f"[2, {outputs}], an output per class or target of the data set"
        )
    y = keras.ops.convert_to_numpy(y)
    if outputs > 1 and y.min() >= 0 and np.allclose(y.sum(1), 1, atol=1e-3):
        raise ValueError(
            f"--model={name}: its outputs are probabilities; expected logits, a last layer without "
            "softmax, which the loss applies"
        )
