"""A data set's name -> where training and test sets are drawn from, all seeded.

Index letters: n example.
"""

from __future__ import annotations

import logging
import socket
import threading
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_gsnr import progress


class Source(NamedTuple):
    """Where examples come from.

    Attributes:
      name: of the data set.
      input_shape: of one example.
      outputs: what a model of it returns: the number of classes, or of regression targets.
      classes: the number of classes; None for a regression.
      pool: how many training examples there are; None for no limit.
      draw: `(n, rng) -> (x, y)`: a training set, float32 `[n, *input_shape]` and its targets.
      test: `(n, rng) -> (x, y)`: a test set; n None for the whole.
      draw_labels: `(n, rng) -> y`: targets drawn without regard to any input.
    """

    name: str
    input_shape: tuple
    outputs: int
    classes: int | None
    pool: int | None
    draw: Callable
    test: Callable
    draw_labels: Callable


def load(name: str, data_dir: str | None = None, **options) -> Source:
    """Opens a data set.

    Args:
      name: "toy" (generated, see `toy`), or the name of an image-classification data set of
        TensorFlow Datasets, such as "mnist" or "cifar10".
      data_dir: where TFDS keeps its data; None for its own default. Missing data are downloaded.
      **options: of `toy`.

    Raises:
      ValueError: an unknown name, or data that are neither there nor to be had; the message says
        what to put where.

    Example:

    >>> source = load("toy")
    >>> x, y = source.draw(5, np.random.default_rng(0))
    >>> x.shape, y.shape
    ((5, 2), (5, 1))
    """
    return toy(**options) if name == "toy" else from_tfds(name, data_dir)


def randomise(y, probability: float, source: Source, rng: np.random.Generator):
    """Label noise: each target is replaced, with this probability, by one drawn at random.

    A class label by a uniformly drawn class (which may be the same); a regression target by an
    independent draw of the target (section 2.4, appendix A.3).
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"p_random={probability}: expected a probability, 0 to 1")
    replaced = rng.random(len(y)) < probability
    noise = source.draw_labels(len(y), rng)
    return np.where(replaced.reshape([-1] + [1] * (y.ndim - 1)), noise, y).astype(y.dtype)


def toy(input_scale: float = 1.0, noise_scale: float = 0.01) -> Source:
    """y = x0 x1 + eps (appendix A.3).

    x0, x1 are uniform on +-input_scale, eps on +-noise_scale. The form is as reported, the
    intervals are our choice.
    """

    def draw(n, rng):
        x = rng.uniform(-input_scale, input_scale, [n, 2])
        y = x[:, :1] * x[:, 1:] + rng.uniform(-noise_scale, noise_scale, [n, 1])
        return x.astype(np.float32), y.astype(np.float32)

    return Source(
        name="toy",
        input_shape=(2,),
        outputs=1,
        classes=None,
        pool=None,
        draw=draw,
        test=lambda n, rng: draw(20_000 if n is None else n, rng),
        draw_labels=lambda n, rng: draw(n, rng)[1],
    )


def from_tfds(name: str, data_dir: str | None = None) -> Source:
    """An image-classification data set of TensorFlow Datasets; pixels are scaled to 0..1."""
    (train_x, train_y), (test_x, test_y), classes = _read_tfds(name, data_dir)
    for split, labels in (("train", train_y), ("test", test_y)):
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise ValueError(
                f"{name}: the label of {split} example {wrong[0]} is {labels[wrong[0]]}; "
                f"expected 0 to {classes - 1}"
            )

    def scaled(x):
        return x.astype(np.float32) / 255

    def draw(n, rng):
        if n > len(train_y):
            raise ValueError(f"n={n}: {name} has {len(train_y)} training examples")
        rows = rng.choice(len(train_y), n, replace=False)
        return scaled(train_x[rows]), train_y[rows]

    def test(n, rng):
        if n is None or n == len(test_y):
            return scaled(test_x), test_y
        if n > len(test_y):
            raise ValueError(f"test_size={n}: {name} has {len(test_y)} test examples")
        rows = rng.choice(len(test_y), n, replace=False)
        return scaled(test_x[rows]), test_y[rows]

    return Source(
        name=name,
        input_shape=train_x.shape[1:],
        outputs=classes,
        classes=classes,
        pool=len(train_y),
        draw=draw,
        test=test,
        draw_labels=lambda n, rng: rng.integers(0, classes, n),
    )


def _has_network(seconds: float = 10) -> bool:
    """Whether the host that TensorFlow Datasets asks first can be found, or a proxy is set."""
    found = threading.Event()

    def look_up():
        try:
            socket.getaddrinfo("storage.googleapis.com", 443)
            found.set()
        except OSError:
            pass

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(seconds)
    return found.is_set() or bool(urllib.request.getproxies())


def _read_tfds(name, data_dir):
    import tensorflow_datasets as tfds  # slow to import, and the toy data do without

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"unknown dataset {name!r}; available: toy, mnist, cifar10, or any "
            "image-classification data set of TensorFlow Datasets (https://www.tensorflow.org/datasets/catalog)"
        ) from None
    there = builder.is_prepared()
    if not there:
        progress.say(f"{name} is not in {builder.data_dir}: downloading it")
    retries = logging.getLogger("urllib3")
    level = retries.level
    try:
        retries.setLevel(logging.ERROR)
        if not there and not _has_network():  # where TFDS would try again for minutes
            raise ConnectionError("no network")
        builder.download_and_prepare()
    except Exception as error:  # TFDS lets network, disk and checksum errors through as they are
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(
            f"dataset {name!r} is not in data_dir={str(builder.data_dir)!r} and could not be "
            f"downloaded ({reason}). Pass --data_dir=DIR with DIR/{name}/"
            f"{builder.version}/ prepared by TFDS, or, on a machine with a network, run once: "
            f'python -c "import tensorflow_datasets as tfds; tfds.load({name!r})"'
        ) from None
    finally:
        retries.setLevel(level)
    features = builder.info.features
    if builder.info.supervised_keys != ("image", "label") or "test" not in builder.info.splits:
        raise ValueError(
            f"dataset {name!r} has the features {list(features)} and the splits "
            f"{list(builder.info.splits)}; expected an image, a label, a train and a test split"
        )
    splits = []
    for split in ("train", "test"):
        whole = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1, as_supervised=True))
        splits.append((whole[0], whole[1].astype(np.int64)))
    return *splits, features["label"].num_classes
