"""Situations: models, losses, data and options as people use them, a line or a few for each.

`SITUATIONS` is run by `test_situations.py` (training with `GSNRModel` against plain `fit`) and by
`test_situations_moments.py` (`gradient_moments` against a loop over batches of one example). A
situation is trained the same, or refused by name, never else. `kind` names the kind of report,
tutorial or guide by which people meet it; `given` is the number of the program that came with the
task, where it is one of those.

Run one: python -m pytest "tests/test_situations.py::test_fit[center loss]"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

L = keras.layers
O = keras.ops  # noqa: E741
SGD = keras.optimizers.SGD
LOSSES = keras.losses
SPARSE = keras.losses.SparseCategoricalCrossentropy


@dataclasses.dataclass
class Situation:
    """How a model is made, compiled and fitted, and what is expected of the two sides.

    Attributes:
      kind: the kind of public report it stands for.
      make: () -> the user's model; what is random in it is drawn after `set_random_seed`.
      how: () -> arguments of `compile`.
      data: () -> arguments of `fit`; `shuffle=False`, `epochs=2` unless they say otherwise.
      given: number of the program that was given with the task, or None.
      fit: "same" as plain; "refused" by name; "either"; "raises": plain Keras refuses it too.
      moments: the same of `gradient_moments` against the loop; None: not compared.
      engines: of `gradient_moments`, beside "auto": each the same, or refused by name.
      gsnr: options of `GSNRModel`.
      use: (model, how, data) -> history: what the user does, if not one `compile` and one `fit`.
      policy: dtype policy under which everything runs.
      tolerance: of the weights, relative to how far plain training moves them.
      evaluates: whether evaluate and predict are compared, too, on `x` and `y` of the data.
    """

    kind: str
    make: Callable
    how: Callable
    data: Callable
    given: int | None = None
    fit: str = "same"
    moments: str | None = None
    engines: tuple = ()
    gsnr: dict = dataclasses.field(default_factory=dict)
    use: Callable | None = None
    policy: str = "float32"
    tolerance: float = 1e-5
    evaluates: bool = True


SITUATIONS: dict[str, Situation] = {}


def case(name, kind, make, how, data, **more):
    assert name not in SITUATIONS, name
    SITUATIONS[name] = Situation(kind, make, how, data, **more)


# Data. N examples, a ragged last batch.
RNG = np.random.default_rng(0)
N, BATCH = 20, 8
X = RNG.normal(size=[N, 5]).astype("float32")
Y = np.tanh(X[:, :2] + 0.3 * RNG.normal(size=[N, 2])).astype("float32")
LABELS = RNG.integers(0, 3, N)
ONE_HOT = np.eye(3, dtype="float32")[LABELS]
BINARY = (X[:, :1] > 0).astype("float32")
WEIGHTS = RNG.uniform(0.2, 2, N).astype("float32")
SERIES = RNG.normal(size=[N, 6, 3]).astype("float32")
LENGTHS = RNG.integers(2, 7, N)
TOKENS = RNG.integers(1, 9, [N, 6]) * (np.arange(6) < LENGTHS[:, None])
TAGS = RNG.integers(0, 3, [N, 6])
SENTENCES = ["good film", "a very good film indeed", "bad", "bad bad film", "so bad"] * 4
IMAGES = RNG.normal(size=[N, 8, 8, 2]).astype("float32")


def fit(x=X, y=Y, **more):
    """`() -> arguments of fit` for arrays."""
    return lambda: dict(dict(x=x, y=y, batch_size=BATCH), **more)


def how(loss="mse", optimizer=None, rate=0.1, **more):
    """`() -> arguments of compile`; an optimizer or a loss is made anew where it is a function."""
    return lambda: dict(
        optimizer=optimizer() if callable(optimizer) else (optimizer or SGD(rate)),
        loss=loss,
        **more,
    )


def logits(**options):
    return SPARSE(from_logits=True, **options)


def seq(shape, *layers, dtype=None):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def mlp(units=2, activation=None, shape=5):
    """`() -> model`: two dense layers."""
    return lambda: seq([shape], L.Dense(6, "tanh"), L.Dense(units, activation))


def around(*inner, shape=5, units=2):
    """A dense layer, the layers in question, a dense layer."""
    return seq([shape], L.Dense(6), *inner, L.Dense(units))


class Apply(L.Layer):
    """A layer of a function, with no output shape to give."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def built(model, *x):
    model(*x)
    return model


def heads(structure):
    inputs = keras.Input([5])
    h = L.Dense(5, "tanh", name="h")(inputs)
    outputs = {name: L.Dense(1, name=name)(h) for name in "acd"}
    return keras.Model(inputs, structure(h, outputs))
