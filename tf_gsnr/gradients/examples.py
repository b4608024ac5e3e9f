"""Data of any kind that `fit` takes -> micro-batches of few shapes; the rest refused by name.

"Nested data" are dicts, lists and tuples of arrays with a leading axis of examples: numpy arrays,
`tf.Tensor`, `tf.SparseTensor`, `tf.RaggedTensor`, scipy.sparse matrices, pandas frames, whatever
has `__array__`; None stands for an optional input that is not given. Sparse and ragged stay so.
Index letters: n example.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import checks


def stack_microbatches(x, y, batch_size: int):
    """Cuts arrays into `(x, y, valid)` with leading axes `[micro-batches, batch_size]`.

    The last micro-batch is filled up with copies of the last example, which are not valid.
    """
    n = len(y)
    batch_size = min(batch_size, n)
    rows = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1)
    valid = (np.arange(len(rows)) < n).reshape(-1, batch_size)
    return (
        x[rows].reshape(-1, batch_size, *x.shape[1:]),
        y[rows].reshape(-1, batch_size, *y.shape[1:]),
        valid,
    )


def micro_batches(
    x, y, sample_weight, batch_size: int, fill: bool = True, size: int | None = None
) -> Iterable:
    """Micro-batches `(x, y, sample_weight, valid)` of tensors, nested as the data are.

    A dataset whose examples all have one shape is batched anew. One whose batches have several
    lengths keeps its batches, and they are cut where they are larger than a micro-batch, so that
    the shapes of micro-batches differ in length only.

    Args:
      x: nested data; or a `tf.data.Dataset`, `keras.utils.PyDataset` or Python generator of
        batches `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)` that has an end. Whether a
        generator, or a dataset of unknown cardinality, has one cannot be known: it is awaited.
      y, sample_weight: nested data, or None. As in `fit`, the floating-point numbers of x, y and
        sample_weight come as `keras.config.floatx()`, and those of datasets as they are.
      batch_size: the most examples of a micro-batch.
      fill: whether each is filled up to one size, with copies of the last row that are not valid.
      size: that size; default: of the first one.

    Raises:
      ValueError: data that do not fit together, have no end, no axis of examples or no example.
    """
    checks.positive_integer("batch_size", batch_size)
    dtype = None if is_stream(x) else keras.config.floatx()
    return _cut(_batches(x, y, sample_weight, batch_size), batch_size, fill, size, dtype)


TOGETHER, TOGETHER_BYTES = 16, 2**25  # micro-batches in a window, at most, and their size


def windows(x, y, sample_weight, batch_size: int, size: int | None = None) -> Iterable:
    """As `micro_batches`; where all is dense, up to 16 of them in one.

    Then x, y and sample_weight have `k batch` rows, filled up to whole micro-batches, and `valid`
    is `[k, batch]`.
    """
    checks.positive_integer("batch_size", batch_size)
    dtype = None if is_stream(x) else keras.config.floatx()
    if not is_stream(x):
        x, y, sample_weight = _checked(x, y, sample_weight)
    row, k = _bytes_of_a_row(x, y, sample_weight), None
    if row is not None:
        k = max(1, min(TOGETHER, TOGETHER_BYTES // max(1, row * (size or batch_size))))
    batches = _batches(x, y, sample_weight, batch_size * (k or 1))
    return _cut(batches, batch_size, True, size, dtype, k)


def _bytes_of_a_row(x, y, sample_weight) -> int | None:
    """Of dense numbers whose shapes are known; None of others."""
    data = (x, y, sample_weight)
    if is_stream(x):
        if not isinstance(x, tf.data.Dataset) or not _have_one_shape(x.element_spec):
            return None
        data = x.element_spec
    leaves = [v for v in tf.nest.flatten(data) if v is not None]
    if not all(isinstance(v, (np.ndarray, tf.Tensor, tf.TensorSpec)) for v in leaves):
        return None
    kinds = [(tf.as_dtype(v.dtype), tf.TensorShape(v.shape)[1:]) for v in leaves]
    if any(dtype == tf.string or not shape.is_fully_defined() for dtype, shape in kinds):
        return None
    return sum(dtype.size * shape.num_elements() for dtype, shape in kinds)


def is_stream(x) -> bool:
    """Whether `x` gives batches that hold their own targets."""
    return isinstance(x, (tf.data.Dataset, keras.utils.PyDataset, types.GeneratorType))


def _cut(batches, batch_size, fill, size, dtype, together=None):
    empty = True
    for batch in batches:
        n = count(batch)
        if n == 0:
            continue
        empty = False
        size = size or min(batch_size, n)
        step = size * (together or 1) if fill else batch_size
        take = _takers(batch)
        for start in range(0, n, step):
            stop = min(start + step, n)
            taken = slice(start, stop)
            end = start + -(-(stop - start) // size) * size if fill else stop
            if stop < end:
                taken = np.minimum(np.arange(start, end), n - 1)
            valid = np.arange(start, end) < n
            valid = tf.constant(valid.reshape(-1, size) if together else valid)
            yield (*(_cast(part, dtype) for part in _apply(take, taken)), valid)
    if empty:
        raise ValueError("x has no examples; expected at least one")


def _batches(x, y, sample_weight, batch_size):
    """Batches `(x, y, sample_weight)` of any size, checked; arrays are a single one."""
    if not is_stream(x):
        return [_checked(x, y, sample_weight)]
    if y is not None or sample_weight is not None:
        raise ValueError(f"x is a {_kind(x)}: y and sample_weight come with it, pass None")
    if isinstance(x, tf.data.Dataset):
        if x.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("x is an infinite tf.data.Dataset: cut it, pass x.take(batches)")
        elements = x.rebatch(batch_size) if _have_one_shape(x.element_spec) else x
    elif isinstance(x, keras.utils.PyDataset):
        if x.num_batches is None:
            raise ValueError("x is an infinite keras.utils.PyDataset: expected num_batches")
        elements = (x[i] for i in range(x.num_batches))
    else:
        if inspect.getgeneratorstate(x) != inspect.GEN_CREATED:
            raise ValueError(
                "x is a generator that was read from before, and what it gave is gone: make a new "
                "one, or pass arrays, a Dataset or a PyDataset where data are read several times"
            )
        elements = x
    return (_checked(*_unpacked(x, element), " of a batch", _UNBATCHED) for element in elements)


_UNBATCHED = "; expected batches of examples: batch it, by `.batch(batch_size)`"


def _kind(x):
    kinds = (tf.data.Dataset, "tf.data.Dataset"), (keras.utils.PyDataset, "keras.utils.PyDataset")
    return next((name for kind, name in kinds if isinstance(x, kind)), "generator")


def _unpacked(x, element):
    """`(x, y, sample_weight)` of what a stream gives."""
    nested = isinstance(element, (tuple, list, dict))
    if not nested and not isinstance(x, tf.data.Dataset):  # as Keras has it
        _refuse_element(_kind(x), type(element).__name__)
    if isinstance(element, (tuple, list)) and not 1 <= len(element) <= 3:
        _refuse_element(_kind(x), f"{len(element)} entries")
    optional = tf.experimental.Optional  # how Keras's own datasets say None
    return keras.utils.unpack_x_y_sample_weight(
        tf.nest.map_structure(lambda v: None if isinstance(v, optional) else v, element)
    )


def _refuse_element(kind, found):
    raise ValueError(
        f"x is a {kind}: expected elements (x,), (x, y) or (x, y, sample_weight), got {found}"
    )


def _have_one_shape(spec) -> bool:
    """Whether all examples of a dataset have one shape, dense; checks what is known of them."""
    if isinstance(spec, tuple) and not 1 <= len(spec) <= 3:
        _refuse_element("tf.data.Dataset", spec)
    nothing = type(tf.type_spec_from_value(None))
    given = [leaf for leaf in tf.nest.flatten(spec) if not isinstance(leaf, nothing)]
    leaves = [leaf for leaf in given if not isinstance(leaf, tf.OptionalSpec)]
    for leaf in leaves:
        if not isinstance(leaf, (tf.TensorSpec, tf.SparseTensorSpec, tf.RaggedTensorSpec)):
            _refuse_element("tf.data.Dataset", leaf)
        if leaf.shape.rank == 0:
            raise ValueError(f"x is a tf.data.Dataset with scalars in its elements{_UNBATCHED}")
    lengths = [leaf.shape[0] for leaf in leaves if leaf.shape.rank is not None]
    _check_lengths({n for n in lengths if n is not None}, " of a batch", _UNBATCHED)
    return all(
        isinstance(leaf, tf.TensorSpec)
        and leaf.shape.rank is not None
        and leaf.shape[1:].is_fully_defined()
        for leaf in given
    )


def _checked(x, y, sample_weight, where="", hint=""):
    """Nested arrays and tensors of one length; raises ValueError for what is none."""
    batch = tuple(
        _arrays(name, value, hint)
        for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight))
    )
    leaves = [v for v in tf.nest.flatten(batch) if v is not None]
    for v in tf.nest.flatten(batch[2]):
        if v is not None and not _is_real(v.dtype):
            raise ValueError(
                f"sample_weight: of dtype {tf.as_dtype(v.dtype).name}; expected numbers"
            )
    if all(v is None for v in tf.nest.flatten(batch[0])):
        raise ValueError(f"x={x!r}: expected examples, a fixed set of arrays or a tf.data.Dataset")
    if y is None and sample_weight is not None:
        raise ValueError("sample_weight with y=None: expected the targets whose losses it weights")
    _check_lengths({int(_length(v)) for v in leaves}, where, hint)
    return batch


def _is_real(dtype) -> bool:
    dtype = tf.as_dtype(dtype)
    return dtype.is_floating or dtype.is_integer or dtype.is_bool


def _check_lengths(lengths, where, hint):
    if len(lengths) > 1:
        raise ValueError(
            f"x, y and sample_weight{where} differ in their number of examples: {sorted(lengths)}; "
            f"expected one length{hint}"
        )


def _arrays(name, value, hint=""):
    """Nested arrays and tensors of nested data; raises ValueError for what Keras does not take."""

    def array(v):
        if v is None:
            return None
        v = _array(name, v)
        if len(v.shape) == 0:
            raise ValueError(f"{name} is a scalar; expected a leading axis of examples{hint}")
        return v

    if value is not None and not tf.nest.flatten(value):
        raise ValueError(f"{name}={value!r}: expected arrays or tensors, got none")
    return tf.nest.map_structure(array, value)


def _array(name, v):
    if tf.is_tensor(v):  # sparse and ragged ones are, too
        return v
    if hasattr(v, "tocoo"):  # scipy.sparse
        entries = v.tocsr().tocoo()
        indices = np.stack([entries.row, entries.col], 1).astype("int64")
        return tf.sparse.reorder(tf.SparseTensor(indices, entries.data, entries.shape))
    if hasattr(v, "iloc"):  # pandas; Keras makes a series a column
        v = v.to_numpy() if v.ndim == 2 else v.to_numpy()[:, np.newaxis]
    if not hasattr(v, "__array__"):
        raise ValueError(
            f"{name}: expected arrays or tensors, got {type(v).__name__}. A list is a list of "
            f"inputs or outputs: make numbers or strings an array, np.array({name}); of a data "
            "loader pass a generator, (batch for batch in loader)"
        )
    try:
        v = np.asarray(v)
    except Exception as error:  # a symbolic tensor, whatever an __array__ raises
        raise ValueError(
            f"{name}: {type(v).__name__} is no array ({str(error).splitlines()[0]}); expected "
            "arrays or tensors"
        ) from error
    try:
        tf.as_dtype(v.dtype)
        return tf.convert_to_tensor(v) if v.dtype == object else v
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: an array of dtype {v.dtype} is no tensor ({error}); expected numbers or "
            "strings, all rows of one shape (tf.ragged.constant takes rows of several)"
        ) from error


def _cast(data, dtype):
    """Nested tensors whose floating-point numbers are of this dtype; None leaves them."""

    def cast(v):
        return v if v is None or dtype is None or not v.dtype.is_floating else tf.cast(v, dtype)

    return tf.nest.map_structure(cast, data)


def count(data) -> Any:
    """The number of rows of nested data, of the first that is not None.

    An int where it is known, a scalar tensor in a graph where it is not.

    Raises:
      ValueError: there is nothing but None.
    """
    for leaf in tf.nest.flatten(data):
        if isinstance(leaf, Batches):
            return sum(map(count, leaf.batches))
        if leaf is not None:
            return _length(leaf)
    raise ValueError(f"{data!r}: expected arrays, one of them not None")


def _length(v):
    n = v.shape[0]
    if n is not None:
        return n
    if isinstance(v, tf.RaggedTensor):
        n = v.nrows()
    else:
        n = v.dense_shape[0] if isinstance(v, tf.SparseTensor) else tf.shape(v)[0]
    return n if isinstance(n, int) or not tf.executing_eagerly() else int(n)


def rows(data, taken) -> Any:
    """Nested tensors of some rows of nested data, eagerly or in a graph; None stays None.

    Args:
      taken: a slice, or integers `[rows]`.
    """
    arrays = tf.nest.map_structure(lambda v: None if v is None else _array("data", v), data)
    return _apply(_takers(arrays), np.asarray(taken) if isinstance(taken, list) else taken)


def _apply(takers, taken):
    return tf.nest.map_structure(lambda take: take(taken), takers)


def _takers(data):
    """Nested functions `slice or indices -> tensor`: what they need of the data they ask once."""
    return tf.nest.map_structure(_taker, data)


def _taker(v) -> Callable:
    if v is None:
        return lambda taken: None
    if isinstance(v, tf.SparseTensor):
        return _sparse_taker(v)
    if isinstance(v, tf.RaggedTensor):
        return lambda taken: v[taken] if isinstance(taken, slice) else _ragged_rows(v, taken)
    if tf.is_tensor(v):
        return lambda taken: v[taken] if isinstance(taken, slice) else tf.gather(v, taken)
    return lambda taken: tf.gather(v, taken) if tf.is_tensor(taken) else tf.constant(v[taken])


def _ragged_rows(v, taken):
    """Rows of a `RaggedTensor`; unlike `tf.gather` it keeps lengths that are known to be equal."""
    if not isinstance(v, tf.RaggedTensor):
        return tf.gather(v, taken)
    places = _places(v.row_splits, taken)
    values = _ragged_rows(v.values, places.flat_values)
    if v.uniform_row_length is not None:
        n = tf.cast(count(taken), v.row_splits.dtype)
        return tf.RaggedTensor.from_uniform_row_length(
            values, v.uniform_row_length, nrows=n, validate=False
        )
    return tf.RaggedTensor.from_row_splits(values, places.row_splits, validate=False)


def _places(splits, taken):
    """Where the values of these rows are, `[rows, (values)]`."""
    taken = tf.cast(taken, splits.dtype)
    return tf.ragged.range(
        tf.gather(splits, taken), tf.gather(splits, taken + 1), row_splits_dtype=splits.dtype
    )


def _sparse_taker(v):
    v = tf.sparse.reorder(v)
    n = _length(v)
    splits = tf.searchsorted(v.indices[:, 0], tf.range(tf.cast(n, tf.int64) + 1))
    splits = tf.cast(splits, tf.int64)

    def take(taken):
        if isinstance(taken, slice):
            taken = tf.range(n)[taken]
        places = _places(splits, taken)
        others = tf.gather(v.indices, places.flat_values)[:, 1:]
        return tf.SparseTensor(
            tf.concat([places.value_rowids()[:, tf.newaxis], others], 1),
            tf.gather(v.values, places.flat_values),
            tf.concat([[tf.cast(count(taken), tf.int64)], v.dense_shape[1:]], 0),
        )

    return take


class Batches(keras.utils.PyDataset):
    """Batches `(x, y, sample_weight)` that are kept, to be read again."""

    def __init__(self, batches: list):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def collect(x, y=None, sample_weight=None) -> tuple:
    """`(x, y, sample_weight)` that are always the same: a dataset is read once, and kept.

    Returns:
      Nested arrays and tensors; or `(Batches, None, None)` of a dataset or generator.

    Raises:
      ValueError: as `micro_batches`.
    """
    batches = [b for b in _batches(x, y, sample_weight, _ALL) if count(b)]
    if not batches:
        raise ValueError("x has no examples; expected at least one")
    return (Batches(batches), None, None) if is_stream(x) else batches[0]


_ALL = 2**31 - 1


def check_labels(model, y, start, error):
    """Raises ValueError if the error comes of a label outside the classes, with its example.

    Args:
      y: the targets of a micro-batch that begins at example `start`.
    """
    if "label" not in str(error):
        return
    labels = tf.nest.flatten(y)
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != len(labels):  # not known which are whose
        return
    for one, output in zip(labels, outputs):
        classes = output.shape[-1]
        if not isinstance(one, tf.Tensor) or not one.dtype.is_integer or classes is None:
            continue
        one = one.numpy()
        wrong = np.argwhere((one < 0) | (one >= classes))
        if len(wrong):
            n = int(wrong[0][0])
            raise ValueError(
                f"y: the label of example {start + n} is {one[tuple(wrong[0])]}; "
                f"expected 0 to {classes - 1}, the model has {classes} outputs"
            ) from error


def not_finite(arrays) -> np.ndarray:
    """The examples that hold NaN or infinity, int `[some]`, in nested dense arrays of examples."""
    wrong = np.zeros(0, int)
    for value in tf.nest.flatten(arrays):
        if isinstance(value, (np.ndarray, tf.Tensor)) and np.asarray(value).dtype.kind == "f":
            rows = np.asarray(value).reshape(len(value), -1)
            wrong = np.union1d(wrong, np.flatnonzero(~np.isfinite(rows).all(axis=1)))
    return wrong


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite; the message says of which example."""


def check_finite(model, moments, bad: int):
    """Raises ValueError unless all losses and gradients are finite.

    Args:
      moments: numpy arrays.
      bad: the first example whose loss is not finite, or -1.
    """
    if bad >= 0:
        raise NotFinite(
            f"the loss of example {bad} is not finite: look for NaN or inf in x, y or "
            "sample_weight there, for labels outside the classes, or for weights that diverged"
        )
    for variable, mean, m2 in zip(model.trainable_variables, moments.mean, moments.m2):
        if not (np.isfinite(mean).all() and np.isfinite(m2).all()):
            raise NotFinite(
                f"the gradient of {variable.path} is not finite, though every loss is: look for a "
                "function without derivative at its input (sqrt or log at 0), or scale the loss"
            )


def as_fit_gives_them(model, x, y, sample_weight, batch_size) -> tuple:
    """`(x, y, sample_weight)` after what the model's own `fit` does to them before a step.

    That is nothing, but for a model with `preprocess_samples` (a task of keras_hub): then it is a
    dataset of what that makes of batches.
    """
    preprocess = getattr(model, "preprocess_samples", None)
    if preprocess is None or getattr(model, "preprocessor", None) is None:
        return x, y, sample_weight
    if not is_stream(x):
        data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        x = tf.data.Dataset.from_tensor_slices(data).batch(batch_size)
    if not isinstance(x, tf.data.Dataset):
        raise ValueError(
            f"model {model.name!r} preprocesses its data: expected arrays or a tf.data.Dataset, "
            f"got a {_kind(x)}"
        )
    return x.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE), None, None
