"""The generalisation gap as predicted from the training set alone, beside the one measured.

One model is trained; the gap is what its test loss has fallen by less than its training loss.
Beside it train, from the same weights, on the same batches in the same order, by its optimiser:

  folds   K models, each without a K-th of the examples: what the loss of those has fallen by less.
          That gap is one of (K - 1) N / K examples; as it goes as 1/N, (K - 1) / K of it counts.
  twins   pairs of models whose examples have the weights 1 + eta e[n] and 1 - eta e[n], e[n] = +-1
          at random. The more example n counts, the lower its own loss gets:

              (1/N) sum_n e[n] (l[n](w-) - l[n](w+)) / (2 eta),   the mean over e is

              (1/N) sum_n  - d l[n] / d (weight of n),

          by how much a loss is lowered by being trained on, so, to first order in 1/N, the gap.
          Optimiser, momentum and curvature are in it, as the models are trained.

and, of the model's own gradients, with P the derivative of its step by the gradient,

  first_order   (14) summed over the steps: sum_k sum_j P_j rho_j^2 / N. It supposes that what a
                step fits of the noise stays.
  curvature     tr C after  C <- (I - lambda H) C + lambda Sigma / N,  with Sigma the covariance of
                the examples' gradients and H the Gauss-Newton matrix: later steps undo along sharp
                directions what earlier ones fitted. For small networks and full-batch descent.

Index letters: n example of N, k step, j parameter.
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
from tf_gsnr.experiments.gap.settings import MEASUREMENT, STEP, Settings, epochs
from tf_gsnr.gradients.measure import gradient_moments
from tf_gsnr.training import probe

MOMENTUM = 0.9
MICRO_BATCH = 500  # of an evaluation: speed and memory only
MOST_PARAMETERS = 500  # for which H is made


def check(settings: Settings, source):
    """Raises ValueError where the network does not fit, or is too large for `curvature`."""
    model = models.build(
        settings.model, source.input_shape, source.outputs, settings.width, settings.seed
    )
    if settings.curvature and (
        source.classes is not None or model.count_params() > MOST_PARAMETERS
    ):
        raise ValueError(
            f"--curvature=True: expected a regression and at most {MOST_PARAMETERS} parameters, "
            f"the network has {model.count_params()}"
        )


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of a configuration, one per measured epoch, once its models are trained."""
    begin = time.monotonic()
    c = configuration
    trainer = workbench.once(
        (c["optimizer"], c["batch_size"], c["n"]), lambda: _Trainer(c, settings, workbench)
    )
    x, y, test = _examples(c, settings, workbench.source)
    initial = trainer.build(c["seed"]).get_weights()
    rng = _rng(c, 2)
    part = rng.permutation(np.arange(c["n"]) % settings.folds)  # of example n
    signs = rng.choice([-1.0, 1.0], [settings.twins, c["n"]])
    text = ", ".join(f"{k}={v}" for k, v in c.items())

    def trained(name, weights, watch=False):
        def advance(work):
            workbench.progress.advance(work, f"{text} | {name}")

        return trainer.train(initial, weights, (x, y), test, _rng(c, 3), advance, watch)

    one = trained("the model", np.ones(c["n"]), watch=True)
    folds = [
        trained(f"fold {k + 1} of {settings.folds}", _kept(part != k))
        for k in range(settings.folds)
    ]
    pairs = [
        [trained(f"twins {i + 1} of {settings.twins}", 1 + s * settings.eta * e) for s in (1, -1)]
        for i, e in enumerate(signs)
    ]
    for i, epoch in enumerate(epochs(settings)):
        train, tests = one.train[i], one.test[i]
        gaps = (tests - one.test[0], train - one.train[0])
        gaps_of_folds = [_gap_of_fold(m, part == k, i) for k, m in enumerate(folds)]
        held = np.array(gaps_of_folds) * (settings.folds - 1) / settings.folds
        twins = np.array(
            [
                np.mean(e * (b.train[i] - a.train[i])) / (2 * settings.eta)
                for e, (a, b) in zip(signs, pairs)
            ]
        )
        yield {
            "experiment": "gap",
            "dataset": settings.dataset,
            "model": settings.model,
            **c,
            "epoch": epoch,
            "width": settings.width,
            "learning_rate": trainer.rate,
            "train_loss": float(train.mean()),
            "test_loss": float(tests.mean()),
            "gap": float(gaps[0].mean() - gaps[1].mean()),
            # Of test set and training set as draws: the expected gap is that of any of them.
            "gap_se": float(np.sqrt(sum(g.var(ddof=1) / len(g) for g in gaps))),
            **_with_error("folds", held),
            **_with_error("twins", twins),
            "first_order": one.first_order[i],
            "curvature": one.curvature[i],
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


def _gap_of_fold(one, held, i):
    """By how much less the loss has fallen on the part held out than on the rest."""
    change = one.train[i] - one.train[0]
    return change[held].mean() - change[~held].mean()


def _rng(configuration, stream):
    """A random stream of this configuration's own."""
    c = configuration
    return np.random.default_rng([c["seed"], c["n"], round(c["p_random"] * 1e6), stream])


def _examples(configuration, settings, source):
    """Training set and test set; the test labels have the same noise, as they are of one kind."""
    rng = _rng(configuration, 0)
    x, y = source.draw(configuration["n"], rng)
    test_x, test_y = source.test(settings.test_size, rng)
    p = configuration["p_random"]
    return x, data.randomise(y, p, source, rng), (test_x, data.randomise(test_y, p, source, rng))


class _Trained(NamedTuple):
    """What a training leaves, per measured epoch.

    Attributes:
      train, test: the losses of the examples, `[n]` and `[n']` each.
      first_order, curvature: of the model that was watched, numbers.
    """

    train: list
    test: list
    first_order: list
    curvature: list


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
        def jacobian(x):
            with tf.GradientTape() as tape:
                outputs = self.model(x, training=False)[:, 0]
            rows = tape.jacobian(outputs, self.model.trainable_variables)
            return outputs, tf.concat([tf.reshape(r, [x.shape[0], -1]) for r in rows], 1)

        self.step, self.evaluate, self.jacobian = step, evaluate, jacobian

    def losses(self, x, y):
        """Of the examples, float64."""
        parts = [slice(i, i + MICRO_BATCH) for i in range(0, len(y), MICRO_BATCH)]
        return np.concatenate([self.evaluate(x[p], y[p]).numpy() for p in parts]).astype(np.float64)

    def train(self, initial, weights, examples, test, rng, advance, watch) -> _Trained:
        """Trains the network from its initial weights, its examples weighted.

        Args:
          initial: weights of the network.
          weights: `[n]`, factors of the examples' losses.
          examples, test: `(x, y)` each.
          rng: of the order of the examples, the same for all models of a configuration.
          advance: told of the work done.
          watch: whether to follow the predictions from gradients.
        """
        x, y = map(tf.constant, examples)
        test = tuple(map(tf.constant, test))
        weights = tf.constant(weights, tf.float32)
        self.model.set_weights(initial)
        for variable, value in zip(self.optimizer.variables, self.fresh):
            variable.assign(value)
        found = _Trained([], [], [], [])
        noise = _Noise(self, examples) if watch else None
        for epoch in range(self.settings.epochs + 1):
            if epoch:
                self._epoch(x, y, weights, rng, noise)
                advance(STEP * len(y))
            if epoch % self.settings.every == 0:
                found.train.append(self.losses(x, y))
                found.test.append(self.losses(*test))
                advance(len(y) + len(test[1]))
                if not np.isfinite(found.train[-1].mean()):
                    raise Diverged(f"the training loss at epoch {epoch} is not finite")
                first_order, curvature = noise.sums(epoch) if noise else (np.nan, np.nan)
                found.first_order.append(first_order)
                found.curvature.append(curvature)
                if noise:
                    advance(MEASUREMENT * min(len(y), self.settings.probe))
        return found

    def _epoch(self, x, y, weights, rng, noise):
        n = len(y)
        full = self.size == n
        order = np.arange(n) if full else rng.permutation(n)
        for start in range(0, n - self.size + 1, self.size):
            rows = order[start : start + self.size]
            batch = (x, y, weights) if full else (tf.gather(v, rows) for v in (x, y, weights))
            if noise:
                noise.before_step()
            self.step(*batch)


class _Noise:
    """What is predicted from the gradients of the model while it trains."""

    def __init__(self, trainer, examples):
        self.trainer, self.examples = trainer, examples
        self.first_order = 0.0
        self.steps = 0  # since the last measurement
        self.growth = None  # of a step, at the last measurement
        self.follow = trainer.settings.curvature
        if self.follow:
            p = trainer.model.count_params()
            self.covariance = np.zeros([p, p])

    def before_step(self):
        self.steps += 1
        if self.follow:
            self._propagate()

    def _propagate(self):
        """C <- (I - lambda H) C + lambda Sigma / N, at the weights before the step."""
        x, y = self.examples
        outputs, rows = (np.asarray(v, np.float64) for v in self.trainer.jacobian(x))
        n = len(y)
        gradients = 2 * (outputs - y[:, 0])[:, None] * rows  # of (f - y)^2
        centred = gradients - gradients.mean(0)
        hessian = 2 * rows.T @ rows / n
        sigma = centred.T @ centred / n
        self.covariance += self.trainer.rate * (sigma / n - hessian @ self.covariance)

    def sums(self, epoch):
        """`(first_order, curvature)` up to these weights.

        The growth by a step is measured here, and between two measurements their mean counts.
        """
        x, y = self.examples
        t, size = self.trainer, min(len(y), self.trainer.settings.probe)
        moments = gradient_moments(
            t.model, x[:size], y[:size], t.loss, engine=t.engine, batch_size=min(size, 250)
        )
        growth = probe.predicted_growth(moments, t.optimizer, len(y))
        if self.growth is not None:
            self.first_order += self.steps * (growth + self.growth) / 2
        self.growth, self.steps = growth, 0
        curvature = float(np.trace(self.covariance)) if self.follow else float("nan")
        return float(self.first_order), curvature
