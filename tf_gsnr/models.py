"""A model's name -> the network, as the paper has it.

To add one: a function `(input_shape, outputs, width) -> keras.Model`, and a line in `MODELS`.
One of your own goes by `module:function`, without a line here (docs/your_own_experiment.md).
The last layer is linear: logits for a classification, the prediction for a regression. Layers have
names of their own: records are keyed by them, and Keras's automatic ones count up in a process.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from tf_gsnr import lookup


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


MODELS: dict[str, Callable] = {"mnist_cnn": mnist_cnn, "toy_mlp": toy_mlp, "mlp": mlp}


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
    reference = lookup.is_reference(name)
    if not reference and name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; available: {', '.join(MODELS)}, or module:function, a "
            "function (input_shape, outputs, width) -> keras.Model"
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
