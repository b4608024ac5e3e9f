"""Is it feature learning that raises the GSNR? Section 3.2; figure 6 and table 1.

A 2-20-1 network on the toy data, trained whole and with its first layer frozen (then it is a linear
regression on fixed features), from the same weights and on the same training set. Reported: the
GSNR (25) of the second layer's parameters, and the Pearson correlation of each hidden feature with
the target.

Index letters: c hidden feature.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tf_gsnr import arrays, metrics, models
from tf_gsnr.descent import single
from tf_gsnr.descent.microbatches import of_data
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.experiments.framework.statistics import pearson
from tf_gsnr.experiments.freezing.settings import Settings, epochs


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of one training, one per measured step."""
    start = time.monotonic()
    rng = np.random.default_rng([configuration["seed"], settings.n])
    source = workbench.source
    train, test = source.draw(settings.n, rng), source.test(settings.test_size, rng)
    model, functions = _network(configuration["frozen"], settings, workbench)
    scale = settings.initial_scale
    model.set_weights(
        [rng.normal(0, scale, w.shape) if w.ndim > 1 else w * 0 for w in model.get_weights()]
    )
    microbatches = of_data(*train, len(train[1]))
    text = ", ".join(f"{k}={v}" for k, v in configuration.items())
    last_loss = np.inf
    for epoch in epochs(settings):
        if epoch:
            loss, _ = functions.descend(
                microbatches, tf.constant(settings.every), tf.constant(last_loss, tf.float64)
            )
            last_loss = float(loss)
            if not np.isfinite(last_loss):
                raise Diverged(
                    f"the training loss is {last_loss} before step {epoch} ({text}): the descent "
                    "diverged (a smaller --learning_rate?)"
                )
            workbench.progress.advance(settings.every, f"{text} | step {epoch}")
        moments = tf.nest.map_structure(np.asarray, functions.moments(microbatches))
        paths = [v.path for v in model.trainable_variables]
        second = [i for i, path in enumerate(paths) if "/output/" in path]
        ratios = metrics.gsnr(moments, bias_corrected=False)
        kernel = next(ratios[i] for i in second if paths[i].endswith("kernel"))
        signs = metrics.same_sign(moments, bias_corrected=False)
        yield {
            "experiment": "freezing",
            "dataset": "toy",
            **configuration,
            "epoch": epoch,
            "train_loss": float(moments.loss),
            "test_loss": float(np.mean((model(test[0]).numpy() - test[1]) ** 2)),
            "gsnr_plain/second_layer": arrays.mean(arrays.flat([ratios[i] for i in second])),
            "same_sign_plain/second_layer": arrays.mean(arrays.flat([signs[i] for i in second])),
            **{f"gsnr_plain/feature{c:02d}": value for c, value in enumerate(kernel[:, 0])},
            **{f"correlation/feature{c:02d}": r for c, r in enumerate(_correlations(model, test))},
            "seconds": time.monotonic() - start,
        }


def _network(frozen, settings, workbench):
    """The network, whole or with its first layer frozen, and its descent; traced once."""
    if frozen not in workbench.traced:
        source = workbench.source
        model = models.build("toy_mlp", source.input_shape, source.outputs, settings.width, seed=0)
        model.get_layer("hidden").trainable = not frozen
        options = dict(engine=workbench.engine_for(model, "mse"), jit_compile=workbench.jit_compile)
        workbench.traced[frozen] = (
            model,
            single.build(model, "mse", settings.learning_rate, **options),
        )
    return workbench.traced[frozen]


def _correlations(model, data):
    """Pearson correlation of each hidden feature with the target; NaN for a dead one."""
    hidden = model.get_layer("hidden")(data[0]).numpy().astype(float)
    y = data[1][:, 0].astype(float)
    return [pearson(feature, y) for feature in hidden.T]
