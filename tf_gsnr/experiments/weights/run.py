"""Weights against the change of their gradients: section 3.3, figure 7.

Why does the GSNR rise while features are learnt? By (28) a step of the layers below changes the
mean gradient g_sc of the weight W_sc against the sign of W_sc, and so pushes W g below zero, where
|W| and |g| grow together. A network is trained on one training set; every few epochs, a step of
gradient descent is tried from where its weights are, and taken back:

    Delta g = g(theta - lambda g) - g(theta)

once for the whole step, and once for each layer by a step of the layers below it alone. Reported:
the Pearson correlation of W with Delta g; the share of weights with W g < 0; now and then, (28)
itself and what else Delta g is made of (`feature_term`). W are the kernels of the layers that have
layers below, of one layer or of all together; the top tenth is that of the largest |W|. Weights
whose gradient is exactly zero (dead features) are left out.

g is the mean gradient of the loss, not the direction of descent.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_gsnr import models
from tf_gsnr.descent import single
from tf_gsnr.descent.microbatches import of_data
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.experiments.weights import gradient_change
from tf_gsnr.experiments.weights.feature_term import feature_terms
from tf_gsnr.experiments.weights.settings import (
    MEASUREMENT_WORK,
    Settings,
    epochs,
    term_epochs,
    term_work,
    work,
)
from tf_gsnr.experiments.weights.statistics import statistics
from tf_gsnr.gradients import network

CHUNK = 1000  # examples a micro-batch: speed and memory only
CHECKPOINT_SECONDS = 20


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of one training, one per measured epoch."""
    begin = time.monotonic()
    seed, progress = configuration["seed"], workbench.progress
    network = _network(settings, workbench)
    source = workbench.source
    data = source.draw(settings.n, np.random.default_rng([seed, settings.n]))
    microbatches = of_data(*data, CHUNK)
    epoch = _start(seed, network, settings, workbench)
    progress.skip(work(configuration, settings) * epoch / settings.epochs)
    saved = time.monotonic()
    for measured in epochs(settings):
        if measured < epoch:
            continue
        while epoch < measured:
            for batch in _batches(
                data, microbatches, settings.batch_size, [seed, settings.n, epoch]
            ):
                network.descent.descend(batch, tf.constant(1), tf.constant(np.inf, tf.float64))
            epoch += 1
            progress.advance(1, f"seed={seed} | epoch {epoch}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(seed, epoch, network, workbench)
            saved = time.monotonic()
        changes = tf.nest.map_structure(np.asarray, network.changes(microbatches))
        if not np.isfinite(changes.loss):
            raise Diverged(
                f"the training loss is {changes.loss} at epoch {epoch} (seed={seed}): the descent "
                "diverged (a smaller --learning_rate?) or the data hold NaN"
            )
        progress.advance(MEASUREMENT_WORK, f"seed={seed} | epoch {epoch}")
        layers = _columns(network.kernels, changes)
        if epoch in term_epochs(settings):
            for layer, terms in network.terms.items():
                layers[layer] |= tf.nest.map_structure(np.asarray, terms(microbatches))._asdict()
            progress.advance(term_work(settings), f"seed={seed} | epoch {epoch}")
        yield {
            "experiment": "weights",
            "dataset": settings.dataset,
            "model": settings.model,
            **configuration,
            "epoch": epoch,
            "n": settings.n,
            "learning_rate": settings.learning_rate,
            "batch_size": min(settings.batch_size or settings.n, settings.n),
            "train_loss": float(changes.loss),
            **statistics(layers),
            "seconds": time.monotonic() - begin,
        }
    workbench.directory.clear_checkpoint()


class _Network(NamedTuple):
    """The network and what is traced of it.

    Attributes:
      model, descent: of `descent.build`.
      kernels: by the names of their layers, lowest first.
      changes: `data -> Changes`.
      terms: for each fully connected layer with layers below, `data -> Terms`.
    """

    model: keras.Model
    descent: single.Descent
    kernels: dict
    changes: Callable
    terms: dict


def _network(settings, workbench) -> _Network:
    if "network" not in workbench.traced:
        model, source = initial(settings, workbench.source, settings.seed), workbench.source
        check_chain(model, settings)
        loss = models.loss(settings.model, source.classes)
        loss_fn = models.per_example(loss)
        options = dict(engine=workbench.engine_for(model, loss), jit_compile=workbench.jit_compile)
        places = gradient_change.kernels(model)

        def graph(function, *arguments):
            return tf.function(
                functools.partial(function, *arguments),
                jit_compile=workbench.jit_compile,
                autograph=False,
            )

        arguments = loss_fn, settings.learning_rate
        layers = [model.get_layer(name) for name in list(places)[1:]]
        workbench.traced["network"] = _Network(
            model,
            single.build(model, loss, settings.learning_rate, **options),
            {name: model.trainable_variables[k] for name, k in places.items()},
            graph(gradient_change.changes, model, *arguments),
            {
                layer.name: graph(feature_terms, model, layer, *arguments)
                for layer in layers
                if isinstance(layer, keras.layers.Dense)
            },
        )
    return workbench.traced["network"]


def check(settings: Settings, source):
    """Raises ValueError where the network does not fit the data, or section 3.3."""
    check_chain(initial(settings, source, settings.seed), settings)


def check_chain(model, settings: Settings):
    """Raises ValueError unless the network is what section 3.3 speaks of.

    Each layer's input must be the output of the layer before it, and no layer's output may depend
    on other examples than its own.
    """
    if not isinstance(model, keras.Sequential):
        raise ValueError(
            f"--model={settings.model}: expected a keras.Sequential, where the layers below a "
            f"layer are those before it, got {type(model).__name__}"
        )
    names = list(gradient_change.kernels(model))
    own = {layer.name for layer in model.layers}
    if len(names) < 2 or not own.issuperset(names):
        raise ValueError(
            f"--model={settings.model}: its kernels are those of {names or 'no layer'}; expected "
            "two at least, a layer and one below it, each in a layer of the network itself"
        )
    names = [layer.name for layer in network.all_batch_norms(model)]
    if names:
        raise ValueError(
            f"--model={settings.model}: batch normalisation ({', '.join(names)}), whose statistics "
            "a step of the layers below moves, too, has no part in (26) to (28); expected a "
            "network without it"
        )


def _columns(kernels, changes):
    """The weights of each layer as `weight_statistics` takes them."""
    columns = [
        dict(w=kernel.numpy(), g=g, whole=whole, below=below)
        for kernel, g, whole, below in zip(
            kernels.values(), changes.gradient, changes.whole, changes.below
        )
    ]
    del columns[0]["below"]  # there is nothing below
    return dict(zip(kernels, columns))


def initial(settings: Settings, source, seed: int) -> keras.Model:
    """The network with the initial weights of a seed."""
    return models.build(settings.model, source.input_shape, source.outputs, settings.width, seed)


def _start(seed, network, settings, workbench) -> int:
    """Sets the weights, the initial ones or those of the checkpoint, and returns their epoch."""
    saved = workbench.directory.load_checkpoint() if workbench.directory else {}
    if saved.get("of") == {"seed": seed}:
        network.model.set_weights(saved["weights"])
        return saved["epoch"]
    network.model.set_weights(initial(settings, workbench.source, seed).get_weights())
    return 0


def _save(seed, epoch, network, workbench):
    weights = network.model.get_weights()
    workbench.directory.save_checkpoint({"of": {"seed": seed}, "epoch": epoch, "weights": weights})


def _batches(data, microbatches, batch_size, stream):
    """The mini-batches of an epoch, in an order of its own; all examples without a batch size."""
    x, y = data
    if batch_size is None or batch_size >= len(y):
        yield microbatches
        return
    order = np.random.default_rng(stream).permutation(len(y))
    for first in range(0, len(y) - batch_size + 1, batch_size):  # one shape: the rest is left out
        rows = order[first : first + batch_size]
        yield of_data(x[rows], y[rows], CHUNK)
