"""A model's name -> the network, as the paper has it.

To add one: a function `(input_shape, outputs, width) -> keras.Model`, and a line in `MODELS`.
The last layer is linear: logits for a classification, the prediction for a regression. Layers have
names of their own: records are keyed by them, and Keras's automatic ones count up in a process.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import layers


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


MODELS: dict[str, Callable] = {
    "mnist_cnn": mnist_cnn,
    "cifar_cnn": cifar_cnn,
    "toy_mlp": toy_mlp,
}


def build(name: str, input_shape, outputs: int, width: int, seed: int) -> keras.Model:
    """Builds the named network; the same seed gives the same initial weights.

    Raises:
      ValueError: an unknown name.

    Example:

    >>> build("toy_mlp", (2,), 1, width=20, seed=0).count_params()
    81
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; available: {', '.join(MODELS)}")
    keras.utils.set_random_seed(seed)
    return MODELS[name](input_shape, outputs, width)
