"""Why the GSNR jumps from epoch to epoch: measured at weights around the end of each epoch.

The network of `dynamics` learns real labels by Keras's SGD, from the same weights, on the same
images in the same order as there; in each variant one thing is changed. After an epoch the GSNR of
one probe is measured, at the weights as they are and at others that differ in one thing:

    end              the weights w after the last step
    before_k         those k steps earlier: without the last k batches
    averaged_k       the mean of the weights after the last k steps
    line_minimum     w - g / kappa, with g the mean gradient on another probe, g' that at w - e g
                     and kappa = g.(g - g') / (e |g|^2) the curvature along it: one step to the
                     lowest point along one direction, the steepest; none where lambda kappa is
                     below a quarter, as there is no valley that a step of SGD could cross

and at w on other examples: `other_probe`, and `larger_probe`, both together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import keras
import numpy as np

from tf_gsnr import arrays, metrics, models
from tf_gsnr.experiments.dynamics import signs
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.experiments.jagged.settings import (
    AS_IT_IS,
    AVERAGED,
    BEFORE,
    GRADIENT,
    LARGER,
    MOMENTUM,
    STEP,
    Settings,
)
from tf_gsnr.gradients import network
from tf_gsnr.gradients.measure import gradient_moments

MICRO_BATCH = 125
SHORT = 0.1  # of the learning rate: the step by which a curvature is measured
SHARP = 0.25  # [ours] learning rate times curvature from which on a direction is sharp


def check(settings: Settings, source):
    """Raises ValueError where the network does not fit the data, or the data have no classes."""
    if source.classes is None:
        raise ValueError(
            f"--dataset={settings.dataset}: its targets are a regression's; jagged needs classes"
        )
    shape, outputs = source.input_shape, source.outputs
    model = models.build(settings.model, shape, outputs, settings.width, settings.seed)
    if network.all_batch_norms(model):
        raise ValueError(
            f"--model={settings.model}: its batch norm's statistics belong to the weights at which "
            "they were taken; jagged measures at others, too, and needs a network without"
        )


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of one training, one per epoch. An interrupted one begins anew: it is short."""
    begin = time.monotonic()
    seed, variant = configuration["seed"], configuration["variant"]
    source, size = workbench.source, settings.batch_size
    # The images and their order are those of `dynamics`.
    x, y = source.draw(settings.n, np.random.default_rng([seed, settings.n, 0]))
    model = models.build(settings.model, source.input_shape, source.outputs, settings.width, seed)
    last = model.layers[-1]
    last.set_weights([settings.initial_scale * w for w in last.get_weights()])
    size *= LARGER if variant == "large_batch" else 1
    model.compile(
        optimizer(variant, settings),
        models.loss(settings.model, source.classes),
        jit_compile=workbench.jit_compile,
    )

    def advance(work):
        workbench.progress.advance(work, f"{variant}, seed={seed} | epoch {epoch}")

    def measure(weights, probe):
        """The moments of a probe at these weights: 0 the probe of the records, 1 the other one."""
        assign(model, weights)
        rows = slice(probe * settings.probe, (probe + 1) * settings.probe)
        moments = gradient_moments(
            model,
            x[rows],
            y[rows],
            engine=workbench.engine,
            batch_size=MICRO_BATCH,
            sign_counts=True,
            jit_compile=workbench.jit_compile,
        )
        advance(GRADIENT * settings.probe)
        return moments

    for epoch in range(settings.epochs + 1):
        weights = [values(model)]
        if epoch:
            order = np.random.default_rng([seed, settings.n, 2, epoch]).permutation(settings.n)
            loss, weights = train(model, x[order], y[order], size)
            advance(STEP * settings.n)
            if not np.isfinite(loss):
                raise Diverged(f"the training loss of {variant} is {loss}: it diverged")
        found = {"end": measure(weights[-1], 0)}
        numbers = {}
        if epoch:
            found |= around(weights, variant, measure)
        if epoch and variant == AS_IT_IS:
            more, numbers = along_the_gradient(weights, found, measure, settings.learning_rate)
            found |= more
        assign(model, weights[-1])
        yield {
            "experiment": "jagged",
            "dataset": settings.dataset,
            "model": settings.model,
            **configuration,
            "epoch": epoch,
            "n": settings.n,
            "count": settings.probe,
            "width": settings.width,
            "learning_rate": settings.learning_rate,
            "batch_size": size,
            **{name: number for k, v in found.items() for name, number in of(k, v, model).items()},
            **numbers,
            "seconds": time.monotonic() - begin,
        }


def optimizer(variant: str, settings: Settings) -> keras.optimizers.SGD:
    """Keras's SGD, with the one thing that the variant changes.

    Momentum m multiplies what a gradient moves the weights by in the long run by 1 / (1 - m), so
    its rate is (1 - m) lambda: the same way downhill.
    """
    rate = settings.learning_rate
    if variant == "half_rate":
        return keras.optimizers.SGD(rate / 2)
    if variant == "momentum":
        return keras.optimizers.SGD((1 - MOMENTUM) * rate, momentum=MOMENTUM)
    if variant == "decayed":
        steps = settings.epochs * -(-settings.n // settings.batch_size)
        return keras.optimizers.SGD(keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0))
    return keras.optimizers.SGD(rate)


def train(model, x, y, size: int) -> tuple[float, list]:
    """An epoch in this order: its training loss, and the weights after each of its last steps."""
    steps = -(-len(y) // size)
    kept = max(*AVERAGED, *BEFORE) + 1
    weights = []

    def keep(batch, logs):
        if batch >= steps - kept:
            weights.append(values(model))

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=keep)
    history = model.fit(x, y, size, shuffle=False, callbacks=[callback], verbose=0).history
    return history["loss"][0], weights


def around(weights, variant, measure) -> dict:
    """Moments of the same probe at weights before the last steps, and at averaged ones."""
    before = BEFORE if variant == AS_IT_IS else BEFORE[:1]
    averaged = AVERAGED if variant == AS_IT_IS else AVERAGED[-1:]
    found = {f"before_{k}": measure(weights[-1 - k], 0) for k in before}
    for k in averaged:
        mean = [np.mean(steps, 0, dtype=np.float64) for steps in zip(*weights[-k:])]
        found[f"averaged_{k}"] = measure(mean, 0)
    return found


def along_the_gradient(weights, found, measure, rate) -> tuple[dict, dict]:
    """`(moments, numbers)`: of the other probe, of both, and at the line's minimum.

    The numbers are `curvature`, kappa along the mean gradient, and `cosine`, of the mean gradients
    on the one probe before and after the last step: below 0 where that step went past the valley.
    """
    last, other = weights[-1], measure(weights[-1], 1)
    g = other.mean
    short = SHORT * rate
    there = measure(stepped(last, g, short), 1).mean
    curvature = dot(g, [a - b for a, b in zip(g, there)]) / (short * dot(g, g))
    step = 1 / curvature if rate * curvature > SHARP else 0.0
    end, before = found["end"].mean, found["before_1"].mean
    cosine = dot(end, before) / np.sqrt(dot(end, end) * dot(before, before))
    moments = {
        "other_probe": other,
        "larger_probe": found["end"].merge(other),
        "line_minimum": measure(stepped(last, g, step), 0),
    }
    return moments, {"curvature": float(curvature), "cosine": float(cosine)}


def of(place: str, moments, model) -> dict:
    """The numbers of a place: both mean GSNRs (25), the majority's share of signs in the
    convolutions' parameters (`signs.by_layer`), the loss and the squared mean gradient."""
    share = signs.by_layer(moments, model).get("same_sign_plain/convolutions", np.nan)
    return {
        f"same_sign_plain/{place}": share,
        f"gsnr_plain/{place}": arrays.mean(arrays.flat(metrics.gsnr(moments, False))),
        f"gsnr/{place}": arrays.mean(arrays.flat(metrics.gsnr(moments))),
        f"loss/{place}": float(moments.loss),
        f"squared_gradient/{place}": metrics.osgr_terms(moments)[1],
    }


def values(model) -> list:
    return [v.numpy() for v in model.trainable_variables]


def assign(model, weights):
    for variable, value in zip(model.trainable_variables, weights):
        variable.assign(value)


def stepped(weights, g, step) -> list:
    """w - step g"""
    return [w - step * one for w, one in zip(weights, g)]


def dot(a, b) -> float:
    return float(sum(np.sum(np.float64(u) * v) for u, v in zip(a, b)))
