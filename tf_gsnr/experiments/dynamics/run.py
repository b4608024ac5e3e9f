"""How the GSNR evolves while a network learns real labels, or random ones. Section 3.1; figure 5.

The same network is trained by Keras, with SGD, from the same weights, on the same images in the
same order: once with their labels, once with labels drawn at random. After each epoch the weights
are held, and the per-example gradients of a fixed probe, part of the training set, give the GSNR
(25) and the same-sign proportion, averaged over all parameters. Shallow models go the same way.

Batch norm: gradients and losses are those of the network in inference mode, with statistics
averaged over the probe at these very weights (`recalibration.averaged_statistics`), so that an
example's gradient is its own, and epoch 0 is a network like the others. The exact statistics of the
whole set take a pass per layer: for the twenty of ResNet18 more time than the epoch itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, data, metrics, models
from tf_gsnr.experiments.dynamics import signs
from tf_gsnr.experiments.dynamics.settings import (
    EVALUATION,
    GRADIENT,
    STATISTICS,
    STEP,
    Settings,
    work_until,
)
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.gradients import recalibration
from tf_gsnr.gradients.measure import gradient_moments

PIECE = 1000  # probe examples between two looks at the progress
MICRO_BATCH = 125  # of a measurement: speed and memory only, but for the batch-norm statistics


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of one training, one per measured epoch; it goes on from the checkpoint."""
    begin = time.monotonic()
    seed = configuration["seed"]
    network = workbench.once(
        configuration["model"], lambda: _build(configuration["model"], settings, workbench)
    )
    (x, y), test = _examples(configuration, settings, workbench.source)
    probe = x[: settings.probe], y[: settings.probe]
    first, elapsed = _restore(network.model, configuration, settings, workbench)
    text = ", ".join(f"{k}={v}" for k, v in configuration.items())
    for epoch in range(first, settings.epochs + 1):

        def advance(work, place=f"{text} | epoch {epoch} of {settings.epochs}"):
            workbench.progress.advance(work, place)

        if epoch:
            # The order is a function of seed and epoch: the same after an interruption.
            order = np.random.default_rng([seed, settings.n, 2, epoch]).permutation(settings.n)
            network.train(x[order], y[order], advance)
        if epoch % settings.every == 0:
            yield {
                "experiment": "dynamics",
                "dataset": settings.dataset,
                **configuration,
                "epoch": epoch,
                "n": settings.n,
                "width": settings.width,
                "learning_rate": settings.learning_rate,
                "initial_scale": settings.initial_scale,
                "batch_size": settings.batch_size,
                "layers": sum(bool(layer.trainable_variables) for layer in network.model.layers),
                **network.measure(probe, test, advance),
                "seconds": elapsed + time.monotonic() - begin,
            }
        _save(network.model, configuration, epoch, elapsed + time.monotonic() - begin, workbench)
    workbench.directory.clear_checkpoint()


def _examples(configuration, settings, source):
    """The training set and the test set of a seed: the images do not depend on the labels' share.

    Test labels are the true ones, whatever was learnt.
    """
    rng = np.random.default_rng([configuration["seed"], settings.n, 0])
    x, y = source.draw(settings.n, rng)
    test = source.test(settings.test_size, rng)
    rng = np.random.default_rng([configuration["seed"], settings.n, 1])
    return (x, data.randomise(y, configuration["p_random"], source, rng)), test


class _Network(NamedTuple):
    """A network with what is done to it.

    Attributes:
      model: compiled.
      train: `(x, y, advance) -> None`: an epoch of SGD in this order.
      measure: `(probe, test, advance) -> dict`: the numbers of a record, at fixed weights.
    """

    model: keras.Model
    train: Callable
    measure: Callable


def check(settings: Settings, source):
    """Raises ValueError where the networks do not fit the data, or the data have no classes."""
    if source.classes is None:
        raise ValueError(
            f"--dataset={settings.dataset}: its targets are a regression's; dynamics needs classes"
        )
    for name in settings.model:
        models.build(name, source.input_shape, source.outputs, settings.width, settings.seed)


def _build(name, settings, workbench):
    source, size = workbench.source, settings.batch_size
    model = models.build(name, source.input_shape, source.outputs, settings.width, settings.seed)
    loss = models.loss(name, source.classes)
    jit_compile = workbench.jit_compile
    # Plain SGD has no state but the weights: they and the epoch are all that a checkpoint needs.
    model.compile(
        keras.optimizers.SGD(settings.learning_rate),
        loss,
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=jit_compile,
    )
    refresh = recalibration.averaged_statistics(model)

    def train(x, y, advance):
        step = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: advance(STEP * size)
        )
        history = model.fit(x, y, size, shuffle=False, callbacks=[step], verbose=0).history
        if not np.isfinite(history["loss"][0]):
            raise Diverged(
                f"the training loss of {name} is {history['loss'][0]}: it diverged (a smaller "
                f"--learning_rate than {settings.learning_rate}?)"
            )

    def measure(probe, test, advance):
        x, y = probe

        def batches():
            for i in range(0, len(y), MICRO_BATCH):
                yield tf.constant(x[i : i + MICRO_BATCH])
                advance(STATISTICS * MICRO_BATCH)

        refresh(batches())
        moments = None
        for i in range(0, len(y), PIECE):
            piece = slice(i, i + PIECE)
            record = gradient_moments(
                model,
                x[piece],
                y[piece],
                engine=workbench.engine,
                batch_size=MICRO_BATCH,
                sign_counts=True,
                jit_compile=jit_compile,
            )
            moments = record if moments is None else moments.merge(record)
            advance(GRADIENT * len(y[piece]))
        on = {
            name: model.evaluate(*examples, batch_size=MICRO_BATCH, verbose=0, return_dict=True)
            for name, examples in (("train", probe), ("test", test))
        }
        advance(EVALUATION * (len(y) + len(test[1])))
        return {
            "train_loss": float(moments.loss),
            "train_accuracy": on["train"]["accuracy"],
            "test_loss": on["test"]["loss"],
            "test_accuracy": on["test"]["accuracy"],
            **metrics.summarize(moments, model),
            "step_sign/mean": arrays.mean(arrays.flat(metrics.step_sign(moments))),
            **signs.by_layer(moments, model),
        }

    return _Network(model, train, measure)


def _restore(model, configuration, settings, workbench):
    """The next epoch and the seconds so far; the weights are the checkpoint's, or the seed's."""
    saved = workbench.directory.load_checkpoint()
    if saved.get("of") == configuration:
        model.set_weights(saved["weights"])
        workbench.progress.skip(work_until(saved["epoch"], settings))
        return saved["epoch"] + 1, saved["seconds"]
    source, name, seed = workbench.source, configuration["model"], configuration["seed"]
    fresh = models.build(name, source.input_shape, source.outputs, settings.width, seed)
    last = fresh.layers[-1]
    last.set_weights([settings.initial_scale * w for w in last.get_weights()])
    model.set_weights(fresh.get_weights())
    return 0, 0.0


def _save(model, configuration, epoch, seconds, workbench):
    workbench.directory.save_checkpoint(
        {
            "of": configuration,
            "epoch": epoch,
            "seconds": seconds,
            "weights": model.get_weights(),
        }
    )
