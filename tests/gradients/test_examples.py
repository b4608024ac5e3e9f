"""Data of any kind -> micro-batches: what comes out row by row, and what is refused by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr.gradients import examples, network
from tf_gsnr.training import probe

N = 10
X = np.arange(N * 3, dtype="float32").reshape(N, 3)
Y = np.arange(N)
W = np.linspace(0, 1, N).astype("float32")
RAGGED = tf.ragged.constant([list(range(1, 2 + n % 4)) for n in range(N)], dtype=tf.int32)
NUMBERS = 1 + np.arange(N * 4).reshape(N, 4)
DENSE = np.where((NUMBERS % 3 == 1) & (NUMBERS > 8), NUMBERS, 0).astype("float32")  # 2 empty rows
SPARSE = tf.sparse.from_dense(DENSE)
WORDS = np.array([f"word {n}" for n in range(N)])
PAIRS = tf.RaggedTensor.from_uniform_row_length(tf.concat([RAGGED, RAGGED], 0), 2)


def plain(v):
    """The rows of a tensor of any kind, as lists."""
    if isinstance(v, tf.RaggedTensor):
        return v.to_list()
    return np.asarray(tf.sparse.to_dense(v) if isinstance(v, tf.SparseTensor) else v).tolist()


def read(batches, leaf=lambda x, y, w: x):
    """The valid rows of one leaf of all micro-batches, and the sizes of these."""
    found, sizes = [], []
    for x, y, w, valid in batches:
        part = leaf(x, y, w)
        assert part.shape[0] == valid.shape[0]
        sizes.append(int(valid.shape[0]))
        found += [row for row, ok in zip(plain(part), valid.numpy()) if ok]
        padding = plain(part)[int(valid.numpy().sum()) :]
        assert all(row == found[-1] for row in padding)  # copies of the last
    return found, sizes


KINDS = {
    "numpy": X,
    "tensor": tf.constant(X),
    "variable": keras.Variable(X),
    "ragged": RAGGED,
    "ragged, inner shape": tf.RaggedTensor.from_row_lengths(NUMBERS, [0, 1] * 4 + [3, 3]),
    "ragged, equal lengths": PAIRS,
    "sparse": SPARSE,
    "sparse, rank 3": tf.sparse.from_dense(DENSE.reshape(N, 2, 2)),
    "sparse, unordered": tf.SparseTensor([[9, 1], [3, 0], [3, 2]], [1.0, 2.0, 3.0], [N, 3]),
    "strings": tf.constant(WORDS[:, None]),
}


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_in_order_in_batches_of_one_size(kind, batch_size):
    data = KINDS[kind]
    whole = tf.sparse.reorder(data) if kind == "sparse, unordered" else data
    found, sizes = read(examples.micro_batches(data, Y, None, batch_size))
    assert found == plain(whole)
    assert set(sizes) == {min(batch_size, N)}
    found, sizes = read(examples.micro_batches(data, Y, None, batch_size, fill=False))
    assert found == plain(whole) and sum(sizes) == N


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
@pytest.mark.parametrize("most", [1, 2, 16])
@pytest.mark.parametrize("kind", ["numpy", "tensor", "dataset", "ragged", "sparse", "strings"])
def test_windows_hold_the_same_micro_batches(kind, most, batch_size, monkeypatch):
    monkeypatch.setattr(examples, "TOGETHER", most)
    data = (X, Y, W) if kind in ("numpy", "dataset") else (KINDS[kind], Y, None)
    if kind == "dataset":
        data = (tf.data.Dataset.from_tensor_slices(data).batch(4), None, None)
    one_by_one = list(examples.micro_batches(*data, batch_size))
    rows = []
    for *window, valid in examples.windows(*data, batch_size):
        if kind in ("ragged", "sparse", "strings"):  # as they are
            assert valid.shape.rank == 1
            rows.append([*map(plain, filter(lambda v: v is not None, window)), plain(valid)])
            continue
        k, n = valid.shape
        assert 1 <= k <= most and all(v.shape[0] == k * n for v in window if v is not None)
        for i in range(k):
            parts = (v[i * n : (i + 1) * n] for v in window if v is not None)
            rows.append([*map(plain, parts), plain(valid[i])])
    wanted = [[plain(v) for v in batch if v is not None] for batch in one_by_one]
    assert rows == wanted


@pytest.mark.parametrize("kind", ["ragged", "ragged, equal lengths", "sparse", "sparse, rank 3"])
def test_sparse_and_ragged_stay_so_and_shapes_do_not_vary(kind):
    data = KINDS[kind]
    traces = []

    @tf.function(autograph=False)
    def shape(v):
        traces.append(v.shape)
        return tf.shape(v)

    for x, *_ in examples.micro_batches(data, Y, None, 4):
        assert type(x) is type(data) and x.dtype == data.dtype
        assert x.shape.as_list() == [4, *data.shape[1:]]
        shape(x)
    assert len(traces) == 1 and traces[0].as_list() == [4, *data.shape[1:]]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"sparse, unordered", "variable"}))
def test_rows_in_a_graph(kind):
    data = KINDS[kind]
    wanted = [plain(data)[n] for n in (7, 7, 0)]
    for taken in ([7, 7, 0], np.array([7, 7, 0]), tf.constant([7, 7, 0])):
        assert plain(examples.rows(data, taken)) == wanted
    spec = tf.type_spec_from_value(data) if tf.is_tensor(data) else tf.TensorSpec([None, 3])

    @tf.function(autograph=False, input_signature=[spec, tf.TensorSpec([None], tf.int32)])
    def taken(v, n):
        return examples.rows({"a": (v, None)}, n)["a"][0], examples.rows(v, slice(2, 5))

    found, part = taken(data, [7, 7, 0])
    assert plain(found) == wanted and plain(part) == plain(data)[2:5]


def test_scipy_sparse():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    for make in (scipy_sparse.csr_matrix, scipy_sparse.coo_array, scipy_sparse.csc_matrix):
        batches = list(examples.micro_batches(make(DENSE), Y, None, 4))
        assert isinstance(batches[0][0], tf.SparseTensor)
        assert read(batches)[0] == DENSE.tolist()


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": X[:, 0], "b": X[:, 1]}, index=range(5, 15))
    batches = list(examples.micro_batches(frame, frame["a"], None, 4))
    assert read(batches)[0] == X[:, :2].tolist()
    assert read(batches, lambda x, y, w: y)[0] == X[:, :1].tolist()  # a column, as in Keras


@pytest.mark.parametrize("words", [WORDS, WORDS.astype(object), WORDS[:, None].astype(object)])
def test_strings(words):
    found, _ = read(examples.micro_batches(words, Y, None, 4))
    assert found == np.char.encode(words.astype(str)).tolist()


def test_nested_data_with_none():
    x = {"a": X, "b": None, "c": [SPARSE, (RAGGED, WORDS)]}
    y = {"u": Y, "v": {"w": None, "z": X}}
    batches = list(examples.micro_batches(x, y, {"u": W, "v": {"w": None, "z": W}}, 4))
    one_x, one_y, one_w, _ = batches[-1]
    assert one_x["b"] is None and one_y["v"]["w"] is None and one_w["v"]["w"] is None
    assert read(batches, lambda x, y, w: x["c"][1][0])[0] == RAGGED.to_list()
    assert read(batches, lambda x, y, w: x["c"][0])[0] == DENSE.tolist()
    assert read(batches, lambda x, y, w: y["v"]["z"])[0] == X.tolist()
    assert read(batches, lambda x, y, w: w["u"])[0] == W.tolist()


def test_no_targets():
    for batch in examples.micro_batches(X, None, None, 4):
        assert batch[1] is None and batch[2] is None


def test_floats_come_as_keras_has_them():
    x = {"a": X.astype("float64"), "b": tf.cast(SPARSE, tf.float64), "c": Y}
    ((x, y, w, _),) = examples.micro_batches(x, tf.constant(Y, tf.float16), None, 64)
    assert [x["a"].dtype, x["b"].dtype, x["c"].dtype] == [tf.float32, tf.float32, tf.int64]
    assert y.dtype == tf.float32
    data = tf.data.Dataset.from_tensors(X.astype("float64"))
    assert next(iter(examples.micro_batches(data, None, None, 4)))[0].dtype == tf.float64


def several_lengths():
    """A dataset of sequences of several lengths in batches of 4; its cardinality is unknown."""

    def rows():
        for n in range(N):
            yield np.arange(1, 2 + n % 4, dtype="int32"), np.int32(n)

    specs = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)
    return tf.data.Dataset.from_generator(rows, output_signature=specs)


@pytest.mark.parametrize("batch_size, sizes", [(64, [4, 4, 4]), (4, [4] * 3), (3, [3] * 5)])
def test_padded_batches_of_several_lengths(batch_size, sizes):
    data = several_lengths().padded_batch(4)
    batches = list(examples.micro_batches(data, None, None, batch_size))
    assert {x.shape[1] for x, *_ in batches} == {4, 2}
    found, found_sizes = read(batches, lambda x, y, w: y)
    assert found == list(range(N)) and found_sizes == sizes
    rows = [[v for v in row if v] for row in read(batches)[0]]
    assert rows == RAGGED.to_list()
    own = read(examples.micro_batches(data, None, None, batch_size, fill=False))[1]
    assert sum(own) == N and max(own) <= batch_size


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_datasets_of_one_shape_are_batched_anew(batch):
    for data in ((X, Y, W), (X, Y), (X,), {"a": X}, (X, {"u": Y})):
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(batch)
        for one in (dataset, dataset.filter(lambda *_: True)):  # of unknown cardinality, too
            batches = list(examples.micro_batches(one, None, None, 4))
            assert read(batches, lambda x, y, w: tf.nest.flatten(x)[0]) == (X.tolist(), [4, 4, 4])
            entries = len(data) if isinstance(data, tuple) else 1
            assert [v is None for v in batches[0][:3]] == [False, entries < 2, entries < 3]


def test_a_dataset_smaller_than_a_micro_batch_is_not_filled_up():
    dataset = tf.data.Dataset.from_tensors((X, Y))
    assert read(examples.micro_batches(dataset, None, None, 256))[1] == [N]


@pytest.mark.parametrize("x, rows", [(SPARSE, DENSE.tolist()), (RAGGED, RAGGED.to_list())])
def test_datasets_of_sparse_and_ragged_batches(x, rows):
    dataset = tf.data.Dataset.from_tensor_slices((x, Y)).batch(4)
    for batch_size, sizes in ((64, [4] * 3), (3, [3] * 5)):
        batches = list(examples.micro_batches(dataset, None, None, batch_size))
        assert isinstance(batches[0][0], type(x))
        assert read(batches) == (rows, sizes)


def test_none_within_a_dataset():
    dataset = tf.data.Dataset.from_tensors(({"a": X, "b": None}, Y))
    for x, *_ in examples.micro_batches(dataset, None, None, 4):
        assert x["b"] is None
    empty = tf.experimental.Optional.empty(tf.TensorSpec([None, 3]))
    dataset = tf.data.Dataset.from_tensors(({"a": X, "b": empty}, Y))
    for x, *_ in examples.micro_batches(dataset, None, None, 4):
        assert x["b"] is None


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        rows = slice(4 * i, 4 * i + 4)
        return {"a": X[rows], "b": examples.rows(RAGGED, rows)}, Y[rows]


class Endless(Sequence):
    num_batches = None


def test_py_datasets_and_generators():
    sequence = Sequence()
    for data in (sequence, (sequence[i] for i in range(3))):
        batches = list(examples.micro_batches(data, None, None, 3))
        assert read(batches, lambda x, y, w: x["b"]) == (RAGGED.to_list(), [3] * 5)
        assert read(batches, lambda x, y, w: y)[0] == Y.tolist()


def test_a_size_of_its_own():
    batches = list(examples.micro_batches(X[:3], Y[:3], None, 8, size=8))
    assert read(batches) == (X[:3].tolist(), [8])


def test_count():
    assert examples.count({"a": None, "b": (RAGGED, X)}) == N
    assert examples.count(SPARSE) == N
    assert examples.count([None, X[:4]]) == 4
    with pytest.raises(ValueError, match="expected arrays"):
        examples.count((None, None))

    def in_a_graph(data, spec):
        function = tf.function(lambda v: tf.convert_to_tensor(examples.count(v)))
        return function.get_concrete_function(spec)(data)

    assert in_a_graph(SPARSE, tf.SparseTensorSpec([None, 4])) == N
    assert in_a_graph(RAGGED, tf.RaggedTensorSpec([None, None], tf.int32)) == N
    assert in_a_graph(tf.constant(X), tf.TensorSpec([None, 3])) == N


def test_collect_reads_once():
    shuffled = several_lengths().shuffle(N).padded_batch(4)
    held = examples.collect(shuffled)
    assert examples.count(held) == N
    reads = [read(examples.micro_batches(*held, 3), lambda x, y, w: y)[0] for _ in range(2)]
    assert reads[0] == reads[1] and sorted(reads[0]) == Y.tolist()
    held = examples.collect((X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8))
    for _ in range(2):
        assert read(examples.micro_batches(*held, 4)) == (X.tolist(), [4] * 3)
    assert examples.collect(X, {"u": Y})[1]["u"] is Y


def refused():
    return {
        "lengths": ((X[:5], Y, None), r"differ in their number of examples: \[5, 10\]"),
        "lengths of sparse": ((SPARSE, Y[:5], None), r"\[5, 10\]"),
        "lengths of ragged": ((X[:5], RAGGED, None), r"\[5, 10\]"),
        "lengths of weights": ((X, Y, W[:3]), r"\[3, 10\]"),
        "lengths of one input": (([X, RAGGED[:2]], Y, None), r"\[2, 10\]"),
        "scalar": ((np.float32(3), Y, None), "x is a scalar; expected a leading axis"),
        "scalar target": ((X, tf.constant(3), None), "y is a scalar"),
        "list of numbers": ((X, [0, 1] * 5, None), r"y: expected arrays.*got int.*np.array\(y\)"),
        "list of strings": ((["a", "b"], Y, None), r"x: expected arrays.*got str.*np.array\(x\)"),
        "none": ((None, Y, None), "x=None: expected examples"),
        "only none": (({"a": None}, Y, None), "x={'a': None}: expected examples"),
        "no example": ((X[:0], Y[:0], None), "x has no examples"),
        "weights only": ((X, None, W), "sample_weight with y=None"),
        "dates": ((np.zeros(3, "datetime64[s]"), Y[:3], None), "x: an array of dtype datetime64"),
        "objects": ((np.array([[1], [2, 3]], object), Y[:2], None), "of dtype object.*one shape"),
        "infinite": ((tf.data.Dataset.from_tensors((X, Y)).repeat(), None, None), r"\.take\("),
        "y twice": (
            (tf.data.Dataset.from_tensors((X, Y)), Y, None),
            "y and sample_weight come with",
        ),
        "weights twice": ((tf.data.Dataset.from_tensors((X, Y)), None, W), "come with it"),
        "scalars": ((tf.data.Dataset.range(10), None, None), r"scalars in its elements.*\.batch\("),
        "not batched": ((several_lengths(), None, None), r"scalars in its elements.*\.batch\("),
        "not batched, rank unknown": (
            (tf.data.Dataset.from_generator(lambda: iter([1, 2]), tf.int32), None, None),
            r"x is a scalar.*\.batch\(",
        ),
        "not batched, by lengths": (
            (tf.data.Dataset.from_tensor_slices((X, np.eye(N))), None, None),
            r"differ in their number of examples: \[3, 10\].*\.batch\(",
        ),
        "four entries": ((tf.data.Dataset.from_tensors((X, Y, W, W)), None, None), r"\(x, y\)"),
        "windows": ((tf.data.Dataset.from_tensors(X).window(2), None, None), "got DatasetSpec"),
        "no batch": ((tf.data.Dataset.from_tensors((X, Y)).take(0), None, None), "no examples"),
        "endless": ((Endless(), None, None), "infinite keras.utils.PyDataset.*num_batches"),
        "sequence and y": ((Sequence(), Y, None), "keras.utils.PyDataset: y and sample_weight"),
        "generator of arrays": (((x for x in [X]), None, None), "generator: expected.*ndarray"),
        "iterator": ((iter([(X, Y)]), None, None), r"list_iterator.*\(batch for batch in loader\)"),
    }


@pytest.mark.parametrize("case", refused())
def test_refused_by_name(case):
    data, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        next(iter(examples.micro_batches(*data, 4)))
    data, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        examples.collect(*data)


def test_a_generator_is_read_once():
    batches = ((X, Y) for _ in range(2))
    assert read(examples.micro_batches(batches, None, None, 64))[1] == [N, N]
    with pytest.raises(ValueError, match="read from before.*make a new"):
        examples.micro_batches(batches, None, None, 64)


def test_fixed_batch_size():
    L = keras.layers
    assert network.fixed_batch_size(keras.Sequential([keras.Input([3]), L.Dense(1)])) is None
    fixed = keras.Sequential([keras.Input([3], batch_size=5), L.Dense(1)])
    assert network.fixed_batch_size(fixed) == 5
    stateful = keras.Sequential([keras.Input([4, 3], batch_size=2), L.GRU(1, stateful=True)])
    assert network.fixed_batch_size(stateful) == 2
    a, b = keras.Input([1], batch_size=2), keras.Input([1], batch_size=3)
    with pytest.raises(ValueError, match=r"batch sizes \[2, 3\]"):
        network.fixed_batch_size(keras.Model([a, b], [L.Dense(1)(a), L.Dense(1)(b)]))


def test_labels_outside_the_classes_are_named_by_output():
    inputs = keras.Input([3])
    heads = {"u": keras.layers.Dense(9)(inputs), "v": keras.layers.Dense(1)(inputs)}
    model, error = keras.Model(inputs, heads), ValueError("Received a label value of 9")
    with pytest.raises(ValueError, match="label of example 29 is 9; expected 0 to 8"):
        examples.check_labels(model, {"u": tf.constant(Y), "v": None}, 20, error)
    examples.check_labels(model, {"u": tf.constant(Y % 9), "v": tf.constant(X)}, 0, error)
    examples.check_labels(model, RAGGED, 0, error)


def test_what_fits_a_model():
    model = keras.Sequential([keras.Input([3], batch_size=5), keras.layers.Dense(1)])
    probe.check_fits(model, X, "x")
    probe.check_fits(model, X[:, :, None], "x")
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \(3,\), as model .* takes"):
        probe.check_fits(model, SPARSE, "x")
    with pytest.raises(ValueError, match="2 inputs are given; expected 1, as model .* takes"):
        probe.check_fits(model, [X, None], "x")
    held, *_ = examples.collect(tf.data.Dataset.from_tensors((X[:, :2], Y)))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        probe.check_fits(model, held, "x")


def test_a_probe_set_that_is_a_dataset():
    def fitted(x, y=None, **options):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        callback = tf_gsnr.GSNRCallback(x, y, batch_size=4, **options)
        return model.fit(X, Y % 2, verbose=0, callbacks=[callback]).history

    arrays = fitted(X, Y % 2, sample_weight=W, test_data=(X, Y % 2))
    dataset = tf.data.Dataset.from_tensor_slices((X, Y % 2, W)).batch(3)
    for name, value in fitted(dataset, test_data=dataset).items():
        np.testing.assert_allclose(value, arrays[name], rtol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="infinite"):
        fitted(dataset.repeat())


A, B = Y[:, None] + np.zeros([1, 2], "float32"), Y[:, None] * np.ones([1, 1], "float32")
OUTPUTS = {
    "names that no layer has": (lambda a, b: {"z": a, "c": b}, {"z": A}, {"z": "mse"}),
    "nested": (
        lambda a, b: {"p": {"z": a}, "c": b},
        {"p": {"z": A}, "c": B},
        {"p": {"z": "mse"}, "c": "mae"},
    ),
    "a dict's in the order of its names": (lambda a, b: {"z": a, "c": b}, [B, A], "mse"),
    "the array of the only loss": (lambda a, b: {"a": a, "b": b}, A, {"a": "mse"}),
    "a list of it": (lambda a, b: {"a": a, "b": b}, [A], {"a": "mse"}),
    "a loss for one of a list": (lambda a, b: [a, b], [A, B], [None, "mae"]),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_targets_and_losses_as_keras_pairs_them(case):
    outputs, y, loss = OUTPUTS[case]
    inputs = keras.Input(X.shape[1:])
    layers = keras.layers.Dense(2, name="a"), keras.layers.Dense(1, name="b")
    model = keras.Model(inputs, outputs(*(layer(inputs) for layer in layers)))
    measured = tf_gsnr.gradient_moments(model, X, y, loss).loss
    model.compile("sgd", loss)
    theirs = np.ravel(model.evaluate(X, y, len(X), verbose=0))[0]
    np.testing.assert_allclose(measured, theirs, 1e-5)
