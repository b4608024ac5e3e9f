"""The networks that engines and peers are measured on, each with data of a given batch.

`NETWORKS[name](batch) -> (model, x, y)`; the loss is the sparse categorical cross-entropy of
logits. Layers are in inference mode: batch norm uses its moving statistics.
"""

import keras
import numpy as np

from tf_gsnr import models

L = keras.layers


def mnist(batch, width=10):
    """Table 2 of the paper: two 5x5 convolutions with p = `width` channels, two dense layers."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            L.Conv2D(width, 5, activation="relu"),
            L.MaxPooling2D(),
            L.Conv2D(width, 5, activation="relu"),
            L.MaxPooling2D(),
            L.Flatten(),
            L.Dense(10 * width, activation="relu"),
            L.Dense(10),
        ],
        name="mnist",
    )
    return model, *_data(batch, (28, 28, 1))


def mlp(batch):
    """784-1024-512-10."""
    sizes = (1024, 512)
    hidden = [L.Dense(size, activation="relu") for size in sizes]
    model = keras.Sequential([keras.Input((784,)), *hidden, L.Dense(10)], name="mlp")
    return model, *_data(batch, (784,))


def cifar(batch, width=8):
    """Table 3 of the paper: four blocks of two 3x3 convolutions with batch norm."""
    model = keras.Sequential([keras.Input((32, 32, 3))], name="cifar")
    for block in range(4):
        for _ in range(2):
            model.add(L.Conv2D(width * 2**block, 3, padding="same"))
            model.add(L.BatchNormalization())
            model.add(L.ReLU())
        model.add(L.MaxPooling2D())
    model.add(L.Flatten())
    for _ in range(2):
        model.add(L.Dense(8 * width, activation="relu"))
    model.add(L.Dense(10))
    return model, *_data(batch, (32, 32, 3))


def resnet18(batch):
    """ResNet18 for 32x32 images, 64 to 512 channels."""
    return models.build("resnet18", (32, 32, 3), 10, width=64, seed=0), *_data(batch, (32, 32, 3))


def transformer(batch, width=128, length=64, blocks=2, vocabulary=1000):
    """An encoder of two pre-norm blocks over 64 tokens."""
    ids = keras.Input((length,), dtype="int32")
    x = L.Embedding(vocabulary, width)(ids)
    for _ in range(blocks):
        h = L.LayerNormalization()(x)
        x = L.Add()([x, L.MultiHeadAttention(8, width // 8)(h, h)])
        h = L.Dense(4 * width, activation="gelu")(L.LayerNormalization()(x))
        x = L.Add()([x, L.Dense(width)(h)])
    x = L.GlobalAveragePooling1D()(L.LayerNormalization()(x))
    model = keras.Model(ids, L.Dense(10)(x), name="transformer")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, size=(batch, length)).astype("int32")
    return model, tokens, rng.integers(0, 10, size=batch)


def _data(batch, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *shape)).astype("float32")
    return x, rng.integers(0, 10, size=batch)


NETWORKS = {
    "mnist": mnist,
    "mlp": mlp,
    "cifar": cifar,
    "resnet18": resnet18,
    "transformer": transformer,
}
