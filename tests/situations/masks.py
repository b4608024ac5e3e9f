"""Sample weights, class weights, masks, attention."""

import keras
import numpy as np

from situations.parts import (
    IMAGES,
    LABELS,
    LOSSES,
    ONE_HOT,
    RNG,
    SERIES,
    TAGS,
    TOKENS,
    WEIGHTS,
    L,
    N,
    X,
    case,
    fit,
    heads,
    how,
    logits,
    mlp,
    seq,
)

case(
    "sample weights, zeros among them",
    "weights: examples that do not count",
    mlp(),
    how(weighted_metrics=["mae"], metrics=["mse"]),
    fit(sample_weight=np.where(np.arange(N) % 3 == 0, 0, WEIGHTS)),
    moments="same",
)
case(
    "sample weights per timestep",
    "weights: [examples, time]",
    lambda: seq([6, 3], L.Dense(4, "tanh"), L.Dense(1)),
    how(weighted_metrics=["mae"]),
    fit(SERIES, SERIES[..., :1], sample_weight=RNG.uniform(0, 1, [N, 6]).astype("float32")),
    moments="either",
)
case(
    "sample weights per pixel",
    "weights: segmentation, rare classes",
    lambda: seq([8, 8, 2], L.Conv2D(3, 3, padding="same")),
    how(logits()),
    fit(
        IMAGES,
        RNG.integers(0, 3, [N, 8, 8]),
        sample_weight=RNG.uniform(0, 1, [N, 8, 8]).astype("float32"),
    ),
    moments="either",
)
case(
    "sample weights for each output",
    "weights: a dict of weights",
    lambda: heads(lambda h, o: {"a": o["a"], "c": o["c"]}),
    how({"a": "mse", "c": "mae"}),
    fit(y={"a": X[:, :1], "c": X[:, 1:2]}, sample_weight={"a": WEIGHTS, "c": WEIGHTS[::-1].copy()}),
    moments="either",
)
case(
    "class weights, classes as integers",
    "weights: imbalanced classes",
    mlp(3),
    how(logits(), weighted_metrics=["accuracy"]),
    fit(y=LABELS, class_weight={0: 1.0, 1: 0.3, 2: 2.0}),
)
case(
    "class weights, one-hot",
    "weights: imbalanced classes",
    mlp(3),
    how(LOSSES.CategoricalCrossentropy(from_logits=True)),
    fit(y=ONE_HOT, class_weight={0: 1.0, 1: 0.3, 2: 2.0}),
)
case(
    "class weights, several outputs",
    "weights: Keras takes them for one output alone",
    lambda: heads(lambda h, o: [o["a"], o["c"]]),
    how(["mse", "mse"]),
    fit(y=[X[:, :1], X[:, 1:2]], class_weight={0: 1.0, 1: 2.0}),
    fit="raises",
)
case(
    "mask_zero, a loss per token",
    "masks: tagging of padded sentences",
    lambda: seq([6], L.Embedding(9, 4, mask_zero=True), L.Dense(4, "relu"), L.Dense(3)),
    how(logits(), weighted_metrics=["accuracy"]),
    fit(TOKENS, TAGS),
    moments="same",
    engines=("vectorized",),
)
case(
    "mask_zero and sample weights",
    "masks: tagging with weighted sentences",
    lambda: seq([6], L.Embedding(9, 4, mask_zero=True), L.Dense(3)),
    how(logits()),
    fit(TOKENS, TAGS, sample_weight=WEIGHTS[:, None]),
    moments="either",
)
case(
    "mask_zero and sample weights of rank one",
    "masks: Keras multiplies [n, t] by [n], which fails",
    lambda: seq([6], L.Embedding(9, 4, mask_zero=True), L.Dense(3)),
    how(logits()),
    fit(TOKENS, TAGS, sample_weight=WEIGHTS),
    fit="raises",
)
case(
    "Masking, an example of padding alone",
    "masks: sensor series, one of them empty",
    lambda: seq([6, 3], L.Masking(), L.LSTM(4, return_sequences=True), L.Dense(1)),
    how(),
    fit(SERIES * (np.arange(N) != 3)[:, None, None], SERIES[..., :1]),
    moments="either",
)
case(
    "masked bidirectional LSTM",
    "masks: text classifier",
    lambda: seq([6], L.Embedding(9, 4, mask_zero=True), L.Bidirectional(L.LSTM(3)), L.Dense(3)),
    how(logits()),
    fit(TOKENS, LABELS),
    moments="same",
)


def transformer(dropout=0.0, **call):
    ids = keras.Input([6], dtype="int32")
    h = L.Embedding(9, 4, mask_zero=True)(ids)
    h = L.Add()([h, L.MultiHeadAttention(2, 2, dropout=dropout)(h, h, **call)])
    h = L.LayerNormalization()(h)
    return keras.Model(ids, L.Dense(3)(L.Dense(6, "gelu")(h)))


case(
    "attention with padding and causal masks",
    "masks: small language model",
    lambda: transformer(use_causal_mask=True),
    how(logits()),
    fit(np.maximum(TOKENS, 1), TAGS),
    moments="same",
)
case(
    "attention with dropout, padded",
    "masks: transformer classifier of padded text",
    lambda: transformer(0.3),
    how(logits()),
    fit(TOKENS, TAGS),
    moments="same",
)


def grouped():
    x = keras.Input([6, 3])
    h = L.Dense(4)(x)
    h = L.GroupQueryAttention(2, 4, 2)(h, h)
    norm = getattr(L, "RMSNormalization", L.LayerNormalization)()  # not in the oldest Keras
    return keras.Model(x, L.Dense(2)(L.GlobalMaxPooling1D()(norm(h))))


case(
    "grouped-query attention",
    "masks: none, decoder block",
    grouped,
    how(),
    fit(SERIES),
    moments="same",
)
