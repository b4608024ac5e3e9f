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


def cifar_cnn(batch):
    """The CNN for CIFAR-10 of Keras's examples: 1.25 M parameters, most in a dense layer."""
    model = keras.Sequential([keras.Input((32, 32, 3))], name="cifar_cnn")
    for width in (32, 64):
        model.add(L.Conv2D(width, 3, padding="same", activation="relu"))
        model.add(L.Conv2D(width, 3, activation="relu"))
        model.add(L.MaxPooling2D())
        model.add(L.Dropout(0.25))
    model.add(L.Flatten())
    model.add(L.Dense(512, activation="relu"))
    model.add(L.Dropout(0.5))
    model.add(L.Dense(10))
    return model, *_data(batch, (32, 32, 3))


def resnet18(batch, size=32):
    """ResNet18 for small images, 64 to 512 channels."""
    shape = (size, size, 3)
    return models.build("resnet18", shape, 10, width=64, seed=0), *_data(batch, shape)


def resnet18_64(batch):
    """The same for 64x64 images."""
    return resnet18(batch, 64)


def mobilenet(batch):
    """MobileNetV2 for 64x64 images."""
    return _application(keras.applications.MobileNetV2, batch)


def efficientnet(batch):
    """EfficientNetB0 for 64x64 images."""
    return _application(keras.applications.EfficientNetB0, batch)


def _application(network, batch):
    options = dict(weights=None, classes=10, classifier_activation=None)
    return network(input_shape=(64, 64, 3), **options), *_data(batch, (64, 64, 3))


def recommender(batch, entries=60000, width=16):
    """Two entries of a table of 60,000 x 16, and a small network on them."""
    ids = keras.Input((2,), dtype="int32")
    x = L.Flatten()(L.Embedding(entries, width)(ids))
    x = L.Dense(64, activation="relu")(x)
    model = keras.Model(ids, L.Dense(10)(x), name="recommender")
    rng = np.random.default_rng(0)
    return model, rng.integers(0, entries, size=(batch, 2)), rng.integers(0, 10, size=batch)


def gpt2(batch, length=32, width=768, blocks=4, vocabulary=50257):
    """GPT-2 with 4 blocks and its own vocabulary, 67 M parameters: next token, tied embedding."""
    ids = keras.Input((length,), dtype="int32")
    table = L.ReversibleEmbedding(vocabulary, width)
    position = L.Embedding(length, width)(keras.ops.arange(length))
    x = table(ids) + position
    for _ in range(blocks):
        h = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(12, width // 12)(h, h, use_causal_mask=True)
        h = L.Dense(4 * width, activation="gelu")(L.LayerNormalization()(x))
        x = x + L.Dense(width)(h)
    logits = table(L.LayerNormalization()(x), reverse=True)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, size=(batch, length + 1)).astype("int32")
    return keras.Model(ids, logits, name="gpt2"), tokens[:, :-1], tokens[:, 1:]


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
    "cifar_cnn": cifar_cnn,
    "resnet18": resnet18,
    "resnet18_64": resnet18_64,
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
    "transformer": transformer,
    "recommender": recommender,
    "gpt2": gpt2,
}
