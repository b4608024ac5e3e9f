"""Types of numbers, and where data come from."""

import keras
import tensorflow as tf

from situations.parts import BATCH, WEIGHTS, L, N, X, Y, around, case, fit, how, mlp, seq

for name, policy, tolerance in (
    ("mixed_float16 and its loss scale", "mixed_float16", 5e-3),
    ("mixed_bfloat16", "mixed_bfloat16", 2e-2),
    ("float64", "float64", 1e-9),
):
    case(
        name,
        "numbers: dtype policy",
        lambda: around(L.BatchNormalization(), L.Dropout(0.2), L.ReLU()),
        how(metrics=["mae"]),
        fit(),
        policy=policy,
        tolerance=tolerance,
        moments="same" if policy == "float64" else None,
    )
for name, x in (
    ("float16 inputs", X.astype("float16")),
    ("boolean inputs", X > 0),
    ("integers into Dense", (3 * X).astype("int64")),
    ("float64 arrays", X.astype("float64")),
):
    case(name, "numbers: types of inputs", mlp(), how(), fit(x), moments="same")
case(
    "one layer in float64",
    "numbers: a policy of one layer",
    lambda: seq([5], L.Dense(6, "tanh"), L.Dense(4, dtype="float64"), L.Dense(2)),
    how(),
    fit(),
    moments="same",
)

# ------------------------------------------------------------------------------------ how data come
case("batches of one", "data: batch_size=1", mlp(), how(), fit(X[:6], Y[:6], batch_size=1))
case("a last batch of one", "data: remainder of one", mlp(), how(), fit(X[:17], Y[:17]))
case(
    "a last batch of one, batch norm",
    "data: remainder of one, whose variance is zero",
    lambda: around(L.BatchNormalization()),
    how(),
    fit(X[:17], Y[:17]),
)
case("validation_split", "data: validation", mlp(), how(metrics=["mae"]), fit(validation_split=0.3))
case(
    "validation data with weights",
    "data: validation",
    mlp(),
    how(metrics=["mae"]),
    fit(validation_data=(X, Y, WEIGHTS), validation_batch_size=6),
)
case("shuffled", "data: shuffle of arrays by the seed", mlp(), how(), fit(shuffle=True))


def batches():
    return [
        (X[i : i + BATCH], Y[i : i + BATCH], WEIGHTS[i : i + BATCH]) for i in range(0, N, BATCH)
    ]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(batches())

    def __getitem__(self, index):
        return batches()[index]


def generator():
    while True:
        yield from batches()


def dataset(**elements):
    return tf.data.Dataset.from_tensor_slices(elements or (X, Y))


def unknown():
    signature = tuple(tf.TensorSpec([None, *b.shape[1:]], tf.float32) for b in batches()[0])
    return tf.data.Dataset.from_generator(lambda: iter(batches()), output_signature=signature)


def dict_elements():
    both = tf.data.Dataset.from_tensor_slices({"x": X, "y": Y})
    return both.map(lambda d: ({"x": d["x"]}, {"y": d["y"]})).batch(8)


def named():
    x = keras.Input([5], name="x")
    return keras.Model({"x": x}, {"y": L.Dense(2, name="y")(x)})


for name, data, make in (
    ("tf.data", lambda: dict(x=dataset().batch(8)), mlp()),
    ("tf.data without remainder", lambda: dict(x=dataset().batch(8, drop_remainder=True)), mlp()),
    ("tf.data of unknown length", lambda: dict(x=unknown()), mlp()),
    ("tf.data that repeats", lambda: dict(x=dataset().repeat().batch(8), steps_per_epoch=3), mlp()),
    ("tf.data of dicts", lambda: dict(x=dict_elements()), named),
    ("generator", lambda: dict(x=generator(), steps_per_epoch=3), mlp()),
    ("PyDataset with workers", lambda: dict(x=Batches(workers=2)), mlp()),
):
    case(name, "data: where batches come from", make, how(), data, evaluates=False)
