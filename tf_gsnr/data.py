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

from tf_gsnr import checks, lookup, progress

MOST_CLASSES = 10**6


class Source(NamedTuple):
    """Where examples come from.

    Attributes:
      name: of the data set.
      input_shape: of one example.
      outputs: what a model of it returns: the number of classes, or of regression targets.
      classes: the number of classes; None for a regression.
      pool: how many training examples there are; None for no limit.
      draw: `(n, rng, beside=0) -> (x, y)`: a training set, float32 `[n, *input_shape]` and its
        targets; with `beside`, that many more examples after them, none of which is among the n.
      test: `(n, rng) -> (x, y)`: a test set; n None for the whole.
      draw_labels: `(n, rng) -> y`: targets drawn without regard to any input.
      split_anew: `seed -> Source`, of the same examples; None where they are drawn as needed.
    """

    name: str
    input_shape: tuple
    outputs: int
    classes: int | None
    pool: int | None
    draw: Callable
    test: Callable
    draw_labels: Callable
    split_anew: Callable | None = None


def load(
    name: str,
    data_dir: str | None = None,
    download: bool = True,
    resplit: int | None = None,
    **options,
) -> Source:
    """Opens a data set.

    Args:
      name: "toy" (generated, see `toy`), the name of an image-classification data set of
        TensorFlow Datasets, such as "mnist" or "cifar10", or `module:function`, a function of your
        own (see `from_function`).
      data_dir: where TFDS keeps its data; None for its own default. Missing data are downloaded. A
        function of your own is given it as it is.
      download: whether data of TFDS that are missing are downloaded; else it is an error.
      resplit: a seed by which training and test examples are mixed and split anew, as many of each
        as before; None for the split that the data set comes with.
      **options: of `toy`.

    Raises:
      ValueError: an unknown name, or data that are neither there nor to be had; the message says
        what to put where. With resplit, data that are drawn as they are needed.

    Example:

    >>> source = load("toy")
    >>> x, y = source.draw(5, np.random.default_rng(0))
    >>> x.shape, y.shape
    ((5, 2), (5, 1))
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        checks.refuse("--dataset", name, "toy, mnist, another data set, or module:function")
    if data_dir is not None:
        checks.directory("--data_dir", data_dir)
    checks.boolean("download", download)
    if name == "toy":
        source = toy(**options)
    elif lookup.is_reference(name):
        source = from_function(name, data_dir)
    else:
        source = from_tfds(name, data_dir, download)
    if resplit is None:
        return source
    if source.split_anew is None:
        raise ValueError(
            f"--resplit: --dataset={name} draws its examples as they are needed; expected one that "
            "has them in arrays"
        )
    return source.split_anew(resplit)


def randomise(y, probability: float, source: Source, rng: np.random.Generator):
    """Label noise: each target is replaced, with this probability, by one drawn at random.

    A class label by a uniformly drawn class (which may be the same); a regression target by an
    independent draw of the target (section 2.4, appendix A.3).
    """
    checks.number("p_random", probability, "a probability, 0 to 1", lambda value: 0 <= value <= 1)
    checks.instance("source", source, Source, "a data.Source, such as load returns")
    checks.instance("rng", rng, np.random.Generator, "what np.random.default_rng returns")
    y = _numbers("y", y, "targets [examples, ...]")
    replaced = rng.random(len(y)) < probability
    noise = source.draw_labels(len(y), rng)
    return np.where(replaced.reshape([-1] + [1] * (y.ndim - 1)), noise, y).astype(y.dtype)


def toy(input_scale: float = 1.0, noise_scale: float = 0.01) -> Source:
    """y = x0 x1 + eps (appendix A.3).

    x0, x1 are uniform on +-input_scale, eps on +-noise_scale. The form is as reported, the
    intervals are our choice.

    Raises:
      ValueError: an interval is none.
    """
    expected = "a positive number below 1e30"
    checks.number("input_scale", input_scale, expected, lambda value: 0 < value < 1e30)
    expected = "a number from 0 to 1e30"
    checks.number("noise_scale", noise_scale, expected, lambda value: 0 <= value < 1e30)

    def draw(n, rng, beside=0):
        x = rng.uniform(-input_scale, input_scale, [n + beside, 2])
        y = x[:, :1] * x[:, 1:] + rng.uniform(-noise_scale, noise_scale, [n + beside, 1])
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


def from_arrays(
    train,
    test,
    *,
    name: str = "arrays",
    classes: int | None = None,
) -> Source:
    """A data set held in memory: a classification, or a regression.

    Args:
      train, test: `(x, y)` each. x `[examples, ...]`: uint8 is taken for pixels, which are scaled
        to 0..1 when they are drawn; any other number is taken as it is. y: class numbers, integers
        `[examples]` from 0 on, or a regression's float targets, `[examples]` or
        `[examples, targets]`.
      name: what errors and records call it.
      classes: how many there are; default: as many as the labels name.

    Raises:
      ValueError: arrays that do not fit each other, labels out of range, NaN or infinity.

    Example:

    >>> x, y = np.zeros([10, 8, 8, 1], np.uint8), np.arange(10) % 2
    >>> source = from_arrays((x, y), (x[:4], y[:4]))
    >>> source.input_shape, source.classes, source.pool
    ((8, 8, 1), 2, 10)
    """
    checks.instance("name", name, str, "what to call the data set")
    if not name.strip():
        checks.refuse("name", name, "what to call the data set")
    if classes is not None:
        classes = checks.integer(
            "classes", classes, 2, MOST_CLASSES, expected="an integer from 2 on"
        )
    (train_x, train_y), (test_x, test_y) = (
        _checked(name, split, *_pair(name, split, pair))
        for split, pair in (("train", train), ("test", test))
    )
    if np.uint8 in (train_x.dtype, test_x.dtype) and train_x.dtype != test_x.dtype:
        raise ValueError(
            f"{name}: x is {train_x.dtype} in train and {test_x.dtype} in test; expected one "
            "dtype, since uint8 is taken for pixels and scaled to 0..1"
        )
    for what, a, b in (
        ("x has the shape", train_x.shape[1:], test_x.shape[1:]),
        ("y has the shape", train_y.shape[1:], test_y.shape[1:]),
        ("y is a number of kind", train_y.dtype.kind, test_y.dtype.kind),
    ):
        if a != b:
            raise ValueError(
                f"{name}: an example's {what} {a} in train and {b} in test; expected one"
            )
    regression = train_y.dtype.kind == "f"
    if not regression:
        most = int(max(train_y.max(), test_y.max()))
        if most >= MOST_CLASSES:
            raise ValueError(
                f"{name}: a label in y of train or test is {most}; "
                f"expected classes below {MOST_CLASSES:,}"
            )
        classes = classes or most + 1
        _check_labels(name, train_y, test_y, classes)

    def scaled(x):
        return x.astype(np.float32) / 255 if x.dtype == np.uint8 else x.astype(np.float32)

    def draw(n, rng, beside=0):
        if n + beside > len(train_y):
            more = f" and {beside} others" if beside else ""
            raise ValueError(f"n={n}{more}: {name} has {len(train_y)} training examples")
        rows = rng.choice(len(train_y), n, replace=False)
        if beside:
            others = np.setdiff1d(np.arange(len(train_y)), rows)
            rows = np.concatenate([rows, rng.choice(others, beside, replace=False)])
        return scaled(train_x[rows]), train_y[rows]

    def whole_or_part(n, rng):
        if n is None or n == len(test_y):
            return scaled(test_x), test_y
        if n > len(test_y):
            raise ValueError(f"--test_size={n}: {name} has {len(test_y)} test examples")
        rows = rng.choice(len(test_y), n, replace=False)
        return scaled(test_x[rows]), test_y[rows]

    def draw_labels(n, rng):
        return (
            train_y[rng.integers(0, len(train_y), n)] if regression else rng.integers(0, classes, n)
        )

    def split_anew(seed):
        checks.integer("resplit", seed, 0, expected="a seed, an integer from 0 on")
        order = np.random.default_rng(seed).permutation(len(train_y) + len(test_y))
        (some_x, others_x), (some_y, others_y) = (
            np.split(np.concatenate(both)[order], [len(train_y)])
            for both in ((train_x, test_x), (train_y, test_y))
        )
        pairs = (some_x, some_y), (others_x, others_y)
        return from_arrays(*pairs, name=name, classes=None if regression else classes)

    return Source(
        name=name,
        input_shape=train_x.shape[1:],
        outputs=train_y.shape[1] if regression else classes or 0,
        classes=None if regression else classes,
        pool=len(train_y),
        draw=draw,
        test=whole_or_part,
        draw_labels=draw_labels,
        split_anew=split_anew,
    )


def _pair(name, split, value):
    expected = "a pair (x, y) of arrays"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        checks.refuse(f"{name}: {split}", value, expected)
    return tuple(_numbers(f"{name}: {split} {part}", v, expected) for part, v in zip("xy", value))


def _numbers(name, value, expected):
    try:
        found = np.asarray(value)
    except Exception:  # rows of several lengths, whatever an __array__ raises
        checks.refuse(name, value, expected)
    if found.dtype.kind not in "buif" or found.ndim == 0:
        raise ValueError(
            f"{name} is {found.dtype} {list(found.shape)}; expected numbers, {expected}"
        )
    return found


def _checked(name, split, x, y):
    """The arrays of one split, each in the form that `from_arrays` keeps."""
    if x.dtype.kind not in "buif" or y.dtype.kind not in "buif":
        raise ValueError(f"{name}: {split} x is {x.dtype} and y is {y.dtype}; expected numbers")
    if x.ndim < 2 or len(x) != len(y) or len(y) < 2:
        raise ValueError(
            f"{name}: {split} x has the shape {x.shape} and y {y.shape}; expected "
            "[examples, ...] and as many targets, two at least"
        )
    for letter, values in (("x", x), ("y", y)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name}: {split} {letter} holds NaN or infinity; expected finite numbers"
            )
    if y.dtype.kind == "f":
        y = y.astype(np.float32).reshape(len(y), -1)
        if y.shape[1] > 1 and (np.sort(y) == np.eye(1, y.shape[1], y.shape[1] - 1)).all():
            raise ValueError(f"{name}: {split} y is one-hot; expected class numbers, y.argmax(1)")
    elif y.shape != (len(x),):
        raise ValueError(
            f"{name}: {split} y has the shape {y.shape} and is {y.dtype}; expected class numbers "
            f"({len(x)},), or float targets of a regression"
        )
    else:
        y = y.astype(np.int64)
    return x, y


def _check_labels(name, train_y, test_y, classes):
    for split, labels in (("train", train_y), ("test", test_y)):
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise ValueError(
                f"{name}: the label of {split} example {wrong[0]} is {labels[wrong[0]]}; "
                f"expected 0 to {classes - 1}, of {classes} classes"
            )


def from_function(reference: str, data_dir: str | None = None) -> Source:
    """A user's data set: `module:function`, a function `(data_dir) -> Source`, or `-> ((x_train,
    y_train), (x_test, y_test))`, from which `from_arrays` makes one.

    Raises:
      ValueError: no such function, or one that returns something else.
    """
    function = lookup.function("dataset", reference, ("data_dir",))
    try:
        given_back = function(data_dir)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # out of the function's own code
        raise ValueError(
            f"--dataset={reference}: it cannot be called with data_dir={data_dir!r}: {error}; "
            "expected a function (data_dir) -> ((x_train, y_train), (x_test, y_test))"
        ) from None
    if isinstance(given_back, Source):
        return given_back
    try:
        (train_x, train_y), (test_x, test_y) = given_back
    except (TypeError, ValueError):
        raise ValueError(
            f"--dataset={reference}: it returned {type(given_back).__name__}; expected "
            "((x_train, y_train), (x_test, y_test)) or a tf_gsnr.data.Source"
        ) from None
    pairs = (train_x, train_y), (test_x, test_y)
    return from_arrays(*pairs, name=f"--dataset={reference}")


def from_tfds(name: str, data_dir: str | None = None, download: bool = True) -> Source:
    """An image-classification data set of TensorFlow Datasets; pixels are scaled to 0..1."""
    train, test, classes = _read_tfds(name, data_dir, download)
    return from_arrays(train, test, name=name, classes=classes)


def _has_network(seconds: float = 10) -> bool:
    """Whether the host that TensorFlow Datasets asks first can be found, or a proxy is set."""
    answer = threading.Event()

    def look_up():
        try:
            socket.getaddrinfo("storage.googleapis.com", 443)
            answer.set()
        except OSError:
            pass

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer.is_set() or bool(urllib.request.getproxies())


def _read_tfds(name, data_dir, download):
    import tensorflow as tf
    import tensorflow_datasets as tfds  # slow to import, and the toy data do without

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = ["toy", *tfds.list_builders()]
        raise ValueError(
            f"unknown dataset {name!r}{lookup.suggestion(name, known)}; available: toy, mnist, "
            "cifar10, any image-classification data set of TensorFlow Datasets "
            "(https://www.tensorflow.org/datasets/catalog), or module:function, a function "
            "(data_dir) -> ((x_train, y_train), (x_test, y_test))"
        ) from None
    except (AssertionError, ValueError) as error:  # a version that there is not, a bad name
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(
            f"--dataset={name}: cannot be loaded ({reason}); expected a data set of TensorFlow "
            "Datasets"
        ) from None
    features = builder.info.features
    if builder.info.supervised_keys != ("image", "label") or None in features["image"].shape:
        raise ValueError(
            f"dataset {name!r} has the features {', '.join(features)}"
            + (f", images of shape {features['image'].shape}" if "image" in features else "")
            + "; expected an image, of one size for all examples, and a label"
        )
    there = builder.is_prepared()
    if not there and not download:
        raise ValueError(
            f"dataset {name!r} is not in data_dir={str(builder.data_dir)!r}, and --dry_run "
            "downloads nothing"
        )
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
    if not {"train", "test"} <= set(builder.info.splits):
        raise ValueError(
            f"dataset {name!r} has the splits {list(builder.info.splits)}; expected train and test"
        )
    splits = []
    for split in ("train", "test"):
        try:
            dataset = builder.as_dataset(split=split, batch_size=-1, as_supervised=True)
            images, labels = tfds.as_numpy(dataset)
        except tf.errors.OpError as error:
            raise ValueError(
                f"dataset {name!r}: the {split} files in {builder.data_dir} (--data_dir) are "
                f"damaged ({str(error.message).splitlines()[0][:100]}). Delete that directory, "
                "and they are downloaded anew"
            ) from None
        splits.append((images, labels.astype(np.int64)))
    return *splits, features["label"].num_classes
