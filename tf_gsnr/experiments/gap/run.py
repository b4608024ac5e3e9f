"""The generalisation gap as predicted from the training set alone, beside the one measured.

A model is trained on each of M training sets, from the same weights. For each of them every other
set is unseen data, so that what the gap is expected to be is measured by two sums over the same
examples, from which their own difficulty drops out:

    gap = mean over the sets, over their examples n, of (others' models' l[n]) - (own model's l[n])

test_gap is the usual one, what the test loss has fallen by less than the training loss: with the
noise of which examples are in the sets, and the same in expectation only where the test set is of
their kind (MNIST's is easier, by 0.01 to 0.03; with --resplit it is not).

Beside the first set's model train, from the same weights, on the same batches in the same order, by
its optimiser:

  folds   K models, each without a K-th of the examples: what the loss of those has fallen by less.
          That gap is one of (K - 1) N / K examples; as it goes as 1/N, (K - 1) / K of it counts.
  twins   pairs of models whose examples have the weights 1 + eta e[n] and 1 - eta e[n], e[n] = +-1
          at random. The more example n counts, the lower its own loss gets:

              (1/N) sum_n e[n] (l[n](w-) - l[n](w+)) / (2 eta),   the mean over e is

              (1/N) sum_n  - d l[n] / d (weight of n),

          by how much a loss is lowered by being trained on, so, to first order in 1/N, the gap.
          Optimiser, momentum and curvature are in it, as the models are trained.

and its own gradients are followed: see `noise.py`.

Index letters: n example of N, m training set of M.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import data, models
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.experiments.gap import noise
from tf_gsnr.experiments.gap.settings import CURVATURE, MEASUREMENT, STEP, Settings, epochs

MOMENTUM = 0.9
MICRO_BATCH = 500  # of an evaluation: speed and memory only
MOST_PARAMETERS = 500  # for which H is made


def check(settings: Settings, source):
    """Raises ValueError where the data are too few, or the network too large for `curvature`."""
    wanted = settings.training_sets * max(settings.n)
    if source.pool is not None and wanted > source.pool:
        raise ValueError(
            f"--training_sets={settings.training_sets} of n={max(settings.n)} examples: "
            f"{source.name} has {source.pool} training examples"
        )
    model = models.build(
        settings.model, source.input_shape, source.outputs, settings.width, settings.seed
    )
    if settings.curvature and model.count_params() > MOST_PARAMETERS:
        raise ValueError(
            f"--curvature=True: expected at most {MOST_PARAMETERS} parameters, "
            f"the network has {model.count_params()}"
        )


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of a configuration, one per measured epoch, once its models are trained."""
    begin = time.monotonic()
    c = configuration
    trainer = workbench.once(
        (c["optimizer"], c["batch_size"], c["n"]), lambda: _Trainer(c, settings, workbench)
    )
    n, sets = c["n"], settings.training_sets
    x, y = _examples(c, settings, workbench.source)  # of the sets, then of the test set
    own = [slice(m * n, (m + 1) * n) for m in range(sets)]  # of which example n is
    first = x[own[0]], y[own[0]]
    initial = trainer.build(c["seed"]).get_weights()
    rng = _rng(c, 2)
    part = rng.permutation(np.arange(n) % settings.folds)  # of example n
    signs = rng.choice([-1.0, 1.0], [settings.twins, n])
    text = ", ".join(f"{k}={v}" for k, v in c.items())

    def trained(name, weights, examples=first, evaluated=first, watch=False):
        def advance(work):
            workbench.progress.advance(work, f"{text} | {name}")

        return trainer.train(initial, weights, examples, evaluated, _rng(c, 3), advance, watch)

    models_of_sets = [
        trained(f"set {m + 1} of {sets}", np.ones(n), (x[rows], y[rows]), (x, y), watch=m == 0)
        for m, rows in enumerate(own)
    ]
    one = models_of_sets[0]
    folds = [
        trained(f"fold {k + 1} of {settings.folds}", _kept(part != k))
        for k in range(settings.folds)
    ]
    pairs = [
        [trained(f"twins {i + 1} of {settings.twins}", 1 + s * settings.eta * e) for s in (1, -1)]
        for i, e in enumerate(signs)
    ]
    for i, epoch in enumerate(epochs(settings)):
        losses = np.array([m.losses[i] for m in models_of_sets])  # [set of the model, example]
        start = one.losses[0]
        gaps_of_folds = [_gap_of_fold(m, part == k, i) for k, m in enumerate(folds)]
        held = np.array(gaps_of_folds) * (settings.folds - 1) / settings.folds
        twins = np.array(
            [
                np.mean(e * (b.losses[i] - a.losses[i])) / (2 * settings.eta)
                for e, (a, b) in zip(signs, pairs)
            ]
        )
        yield {
            "experiment": "gap",
            "dataset": settings.dataset,
            "resplit": settings.resplit,
            "model": settings.model,
            **c,
            "epoch": epoch,
            "width": settings.width,
            "learning_rate": trainer.rate,
            "train_loss": float(np.mean([losses[m, rows].mean() for m, rows in enumerate(own)])),
            "test_loss": float(losses[:, sets * n :].mean()),
            **_with_error("gap", _gaps_of_sets(losses, own)),
            **_gap_to_test_set(losses - start, own),
            **_with_error("folds", held),
            **_with_error("twins", twins),
            "first_order": one.first_order[i],
            "curvature": one.curvature[i],
            "influence": one.influence[i],
            "seconds": time.monotonic() - begin,
        }


def _with_error(name, values):
    """Mean and standard error over models."""
    return {
        name: float(values.mean()),
        f"{name}_se": float(values.std(ddof=1) / len(values) ** 0.5),
    }


def _kept(kept):
    """Weights of the examples of a fold, whose mean is 1."""
    return np.where(kept, len(kept) / kept.sum(), 0.0)


def _gaps_of_sets(losses, own):
    """`[set]`: by how much the others' models' loss on a set is above its own model's."""
    gaps = []
    for m, rows in enumerate(own):
        of_others = np.delete(losses, m, axis=0)[:, rows].mean()
        gaps.append(of_others - losses[m, rows].mean())
    return np.array(gaps)


def _gap_to_test_set(change, own):
    """By how much less the loss has fallen on the test set; its error, as if all were draws."""
    tests = change[:, own[-1].stop :]
    trains = [change[m, rows] for m, rows in enumerate(own)]
    of_sets = [t.var(ddof=1) / len(t) / len(own) ** 2 for t in trains]
    error = tests.mean(0).var(ddof=1) / tests.shape[1] + sum(of_sets)
    return {
        "test_gap": float(tests.mean() - np.mean([t.mean() for t in trains])),
        "test_gap_se": float(np.sqrt(error)),
    }


def _gap_of_fold(one, held, i):
    """By how much less the loss has fallen on the part held out than on the rest."""
    change = one.losses[i] - one.losses[0]
    return change[held].mean() - change[~held].mean()


def _rng(configuration, stream):
    """A random stream of this configuration's own."""
    c = configuration
    return np.random.default_rng([c["seed"], c["n"], round(c["p_random"] * 1e6), stream])


def _examples(configuration, settings, source):
    """The training sets and the test set, one after the other, with labels of the same noise."""
    rng = _rng(configuration, 0)
    n, p = configuration["n"], configuration["p_random"]
    x, y = source.draw(n, rng, beside=n * (settings.training_sets - 1))
    test_x, test_y = source.test(settings.test_size, rng)
    y = [data.randomise(labels, p, source, rng) for labels in (y, test_y)]
    return np.concatenate([x, test_x]), np.concatenate(y)


class _Trained(NamedTuple):
    """What a training leaves, per measured epoch.

    Attributes:
      losses: of the examples at which it was evaluated, `[examples]` each.
      first_order, curvature, influence: of the model that was watched, numbers.
    """

    losses: list
    first_order: list
    curvature: list
    influence: list


def optimizer(name: str, settings: Settings) -> keras.optimizers.Optimizer:
    """The named optimiser."""
    if name == "adam":
        return keras.optimizers.Adam(settings.adam_rate)
    if name == "momentum":
        return keras.optimizers.SGD(settings.learning_rate * (1 - MOMENTUM), MOMENTUM)
    return keras.optimizers.SGD(settings.learning_rate)


class _Trainer:
    """One network and optimiser, traced once, in which all models are trained in turn."""

    def __init__(self, configuration, settings, workbench):
        source = workbench.source
        self.settings, self.engine = settings, workbench.engine
        self.size = configuration["batch_size"] or configuration["n"]
        self.build = lambda seed: models.build(
            settings.model, source.input_shape, source.outputs, settings.width, seed
        )
        self.model = self.build(configuration["seed"])
        self.loss = models.loss(settings.model, source.classes)
        self.optimizer = optimizer(configuration["optimizer"], settings)
        self.optimizer.build(self.model.trainable_variables)
        self.fresh = [np.array(v) for v in self.optimizer.variables]
        self.rate = float(self.optimizer.learning_rate)
        losses = models.per_example(self.loss)

        @tf.function(autograph=False, jit_compile=workbench.jit_compile)
        def step(x, y, weights):
            with tf.GradientTape() as tape:
                mean = tf.reduce_mean(weights * losses(y, self.model(x, training=True)))
            variables = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(mean, variables), variables)

        @tf.function(autograph=False, jit_compile=workbench.jit_compile)
        def evaluate(x, y):
            return losses(y, self.model(x, training=False))

        @tf.function(autograph=False)
        def derivatives(x, y):
            return noise.derivatives(self.model, losses, x, y)

        self.step, self.evaluate, self.derivatives = step, evaluate, derivatives

    def losses(self, x, y):
        """Of the examples, float64."""
        parts = [slice(i, i + MICRO_BATCH) for i in range(0, len(y), MICRO_BATCH)]
        return np.concatenate([self.evaluate(x[p], y[p]).numpy() for p in parts]).astype(np.float64)

    def train(self, initial, weights, examples, evaluated, rng, advance, watch) -> _Trained:
        """Trains the network from its initial weights, its examples weighted.

        Args:
          initial: weights of the network.
          weights: `[n]`, factors of the examples' losses.
          examples: `(x, y)`, on which it trains.
          evaluated: `(x, y)`, whose losses are measured.
          rng: of the order of the examples, the same for all models of a configuration.
          advance: told of the work done.
          watch: whether to follow the predictions from gradients.
        """
        x, y = map(tf.constant, examples)
        evaluated = tuple(map(tf.constant, evaluated))
        weights = tf.constant(weights, tf.float32)
        self.model.set_weights(initial)
        for variable, value in zip(self.optimizer.variables, self.fresh):
            variable.assign(value)
        found = _Trained([], [], [], [])
        watched = noise.Noise(self, examples) if watch else None
        for epoch in range(self.settings.epochs + 1):
            if epoch:
                self._epoch(x, y, weights, rng, watched)
                advance((STEP + bool(watched and watched.follow) * CURVATURE) * len(y))
            if epoch % self.settings.every == 0:
                found.losses.append(self.losses(*evaluated))
                advance(len(evaluated[1]))
                if not np.isfinite(found.losses[-1].mean()):
                    raise Diverged(f"the loss at epoch {epoch} is not finite")
                if watched:
                    found.first_order.append(watched.sum())
                    found.curvature.append(watched.curvature())
                    found.influence.append(watched.influence())
                    advance(MEASUREMENT * min(len(y), self.settings.probe))
        return found

    def _epoch(self, x, y, weights, rng, watched):
        n = len(y)
        full = self.size == n
        order = np.arange(n) if full else rng.permutation(n)
        for start in range(0, n - self.size + 1, self.size):
            rows = order[start : start + self.size]
            batch = (x, y, weights) if full else (tf.gather(v, rows) for v in (x, y, weights))
            if watched:
                watched.before_step()
            self.step(*batch)
