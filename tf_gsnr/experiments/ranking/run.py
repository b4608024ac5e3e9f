"""Does GSNR early in training tell which network will generalise, beyond what its loss tells?

A network is trained by Keras's `fit`, by SGD, for every learning rate, batch size, width, share of
random labels and seed. Twice early, at fixed weights, the per-example gradients of the training set
are measured: after a number of epochs that all share, and where the training loss first is below a
value that all share. Twice late the gap is measured, the same way. Compared at the same epoch,
networks differ in how far they have come, which their losses show; compared at the same training
loss, in how long it took them. Neither comparison is of GSNR alone: see `correlations`.

The test labels are as noisy as those of the training set: the gap is of one distribution, (3).
The training set, its order, the test set and the random labels are a function of the seed, so that
configurations of one seed differ by nothing else. Losses and gradients are those of the network in
inference mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, data, metrics, models
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.experiments.ranking.settings import Settings, steps_per_epoch, work
from tf_gsnr.gradients.measure import gradient_moments

PIECE = 1000  # examples of one evaluation: memory only
MICRO_BATCH = 125  # of a measurement: speed and memory only
LOOKS = 50  # the training loss is looked at in each of so many steps, then at intervals of 2 %


def check(settings: Settings, source):
    """Raises ValueError where a network does not fit the data."""
    for width in settings.width:
        models.build(settings.model, source.input_shape, source.outputs, width, settings.seed)


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The one record of a training."""
    begin = time.monotonic()
    network = workbench.once(
        configuration["width"], lambda: _build(configuration["width"], settings, workbench)
    )
    train, test = _examples(configuration, settings, workbench.source)
    record: dict = {
        "experiment": "ranking",
        "dataset": settings.dataset,
        "model": settings.model,
        **configuration,
        "epoch": settings.epochs,
        "n": settings.n,
    }
    record |= {name: getattr(settings, name) for name in ("early_epochs", "early_loss")}
    record |= {"final_loss": settings.final_loss}
    record |= _trained(network, train, test, configuration, settings, workbench)
    record["seconds"] = time.monotonic() - begin
    yield record


def _examples(configuration, settings, source):
    """Training set and test set of a seed, both with this share of random labels."""
    seed, p_random = configuration["seed"], configuration["p_random"]
    rng, noise = (np.random.default_rng([seed, settings.n, stream]) for stream in (0, 1))
    train, test = source.draw(settings.n, rng), source.test(settings.test_size, rng)
    return [(x, data.randomise(y, p_random, source, noise)) for x, y in (train, test)]


class _Network(NamedTuple):
    """A network of one width, with what is traced of it.

    Attributes:
      model: compiled.
      evaluate: `(x, y) -> (loss, error)`, means over examples; the error NaN in a regression.
      moments: `(x, y) -> Moments` of the per-example gradients.
    """

    model: keras.Model
    evaluate: Callable
    moments: Callable


def _build(width, settings, workbench):
    source = workbench.source
    model = models.build(settings.model, source.input_shape, source.outputs, width, settings.seed)
    loss = models.loss(settings.model, source.classes)
    of_examples = models.per_example(loss)
    model.compile(keras.optimizers.SGD(), loss, jit_compile=workbench.jit_compile)

    @tf.function(reduce_retracing=True)
    def sums(x, y):
        outputs = model(x, training=False)
        losses = tf.reduce_sum(tf.cast(of_examples(y, outputs), tf.float64))
        if source.classes is None:
            return losses, tf.constant(np.nan, tf.float64)
        wrong = tf.argmax(outputs, 1) != tf.cast(tf.reshape(y, [-1]), tf.int64)
        return losses, tf.reduce_sum(tf.cast(wrong, tf.float64))

    def evaluate(x, y):
        pieces = [sums(x[i : i + PIECE], y[i : i + PIECE]) for i in range(0, len(y), PIECE)]
        return tuple(float(sum(column)) / len(y) for column in zip(*pieces))

    def moments(x, y):
        return gradient_moments(
            model,
            x[: settings.probe],
            y[: settings.probe],
            loss,
            engine=workbench.engine,
            batch_size=MICRO_BATCH,
            sign_counts=True,
            jit_compile=workbench.jit_compile,
        )

    return _Network(model, evaluate, moments)


def _trained(network, train, test, configuration, settings, workbench) -> dict:
    """Trains and measures: the numbers of `early_epoch/`, `early_loss/`, `final_epoch/` and
    `final_loss/`, NaN where a training loss is not reached."""
    model, size = network.model, configuration["batch_size"]
    source, seed = workbench.source, configuration["seed"]
    fresh = models.build(
        settings.model, source.input_shape, source.outputs, configuration["width"], seed
    )
    model.set_weights(fresh.get_weights())
    model.optimizer.learning_rate = configuration["learning_rate"]
    epoch, total = steps_per_epoch(size, settings), int(work(configuration, settings))
    at = {"early_epoch": settings.early_epochs * epoch, "final_epoch": settings.epochs * epoch}
    below = {"early_loss": settings.early_loss, "final_loss": settings.final_loss}
    text = ", ".join(f"{k}={v}" for k, v in configuration.items())
    found: dict = {}
    looked = 0

    def look(step):
        nonlocal looked
        if step not in at.values() and step % max(step // LOOKS, 1) and step != total:
            return
        loss, error = network.evaluate(*train)
        if not np.isfinite(loss):
            raise Diverged(f"the training loss is {loss} at step {step} ({text})")
        due = [name for name in at if step == at[name]]
        due += [name for name in below if name not in found and loss <= below[name]]
        for name in due:
            test_loss, test_error = network.evaluate(*test)
            found[name] = {
                "epoch": step / epoch,
                "train_loss": loss,
                "train_error": error,
                "gap_loss": test_loss - loss,
                "gap_error": test_error - error,
            }
            if name.startswith("early"):
                found[name] |= _of_gradients(network.moments(*train), settings.n)
        if {"final_epoch", "final_loss"} <= found.keys() or step == total:
            model.stop_training = True
        workbench.progress.advance(step - looked, f"{text} | step {step} of at most {total}")
        looked = step

    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: look(batch + 1)
    )
    batches = _batches(*train, _order(seed, settings.n, size, total))
    model.fit(batches, shuffle=False, callbacks=[callback], verbose=0)
    workbench.progress.skip(total - looked)
    names = found["early_epoch"], found["final_epoch"]
    for place, expected in zip(("early", "final"), names):
        found.setdefault(f"{place}_loss", dict.fromkeys(expected, np.nan))
    return {f"{place}/{k}": v for place in sorted(found) for k, v in found[place].items()}


def _order(seed, n, size, total):
    """The rows of each step, `[total, size]`: an epoch after the other, each shuffled anew."""
    rng, epoch = np.random.default_rng([seed, n, 2]), n // size
    shuffled = [rng.permutation(n)[: epoch * size] for _ in range(-(-total // epoch))]
    return np.concatenate(shuffled).reshape(-1, size)[:total]


def _batches(x, y, order):
    """The batches one after the other, without a thread: where a training ends before its data,
    TensorFlow 2.21 sometimes waits for ever for those that read ahead."""
    x, y = tf.constant(x), tf.constant(y)
    rows = tf.data.Dataset.from_tensor_slices(order)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return rows.map(lambda i: (tf.gather(x, i), tf.gather(y, i))).with_options(options)


def _of_gradients(moments, n):
    """What is ranked by. Estimates are corrected, and kept where they cannot be told from zero:
    left out, they would leave out the networks of least signal."""
    trace = float(arrays.total(moments.variance(1)))
    squares = metrics.osgr_terms(moments)[1]
    return {
        "gsnr_mean": arrays.mean(arrays.flat(metrics.gsnr(moments))),
        "gsnr_of_sums": (squares - trace / moments.count) / trace,  # |G|^2 / tr(Sigma)
        "osgr_predicted": metrics.osgr(moments, n),
        "noise_scale": metrics.noise_scale(moments),
        "same_sign": arrays.mean(arrays.flat(metrics.same_sign(moments))),
        "gradient_norm": float(np.sqrt(squares)),
        "gradient_variance": trace,
    }
