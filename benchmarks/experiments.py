"""What the experiments cost: measuring beside descending, and replicas beside the loop over them.

    python benchmarks/experiments.py [--seconds 5] [--only osgr|replicas]

osgr: an epoch of the OSGR experiment on images like MNIST's, measured at 1 epoch in 20 (moments,
the losses of 10,000 test images twice, those of the training set once, all numbers of a record),
against an epoch of plain gradient descent with the same batches and nothing else, its loop in the
graph. Of a measurement, two forward passes of the test images (before the step and after it) cost
as much whatever n is: the last column is what they alone add to the 20 epochs. The experiment's own
descent takes less than the plain one where there are several micro-batches: two are in work at
a time.

replicas: a step of one of the M = 100 models on toy data, trained
  together  as one program (`descent.build_ensemble`)
  in turn   in a Python loop over the models, each with its loop over the steps in the graph
  step by step  in a Python loop over the models and over the steps, a compiled step a call, as in a
            plain script
Together is faster for two reasons: XLA fuses what are otherwise a hundred launches of operations a
step, and groups of models fill the cores. Where the launches are few beside the arithmetic (n =
1000, width 50), only the latter is left.

Medians of interleaved runs.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from engines import interleaved  # noqa: E402

from tf_gsnr import data, models  # noqa: E402
from tf_gsnr.descent import microbatches, single  # noqa: E402
from tf_gsnr.experiments.osgr import one_step  # noqa: E402
from tf_gsnr.models import per_example  # noqa: E402

MODELS = 100
EVERY = 20
INFINITY = tf.constant(np.inf, tf.float64)


def microbatches_of(x, y, batch=500):
    return microbatches.of_data(x, y, batch)


def osgr_epochs(n, width):
    """`(experiment, plain, test_passes)`: EVERY epochs of the former two; of one measurement."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rng = np.random.default_rng(0)
    model = models.build("mnist_cnn", (28, 28, 1), 10, width, seed=0)

    def images(n):
        x = rng.uniform(size=[n, 28, 28, 1]).astype("float32")
        return microbatches_of(x, rng.integers(0, 10, n))

    train, test = images(n), images(10_000)
    functions = single.build_ensemble(model, loss, 1e-3, 1)
    start = [w[None] for w in model.get_weights()]
    own = train[0][None], train[1][None], train[2]

    def experiment():
        weights, _, _ = functions.descend(start, own, tf.constant(EVERY - 1), INFINITY[None])
        return one_step.measured(functions, model, weights, [own], test, [[0, 0]])

    def test_passes():
        return [functions.losses(start, test).numpy() for _ in range(2)]

    return experiment, plain_descent(model, loss, train), test_passes


def plain_descent(model, loss, microbatches):
    """EVERY epochs of gradient descent and nothing else, as one would write it down."""
    loss_fn, variables = per_example(loss), model.trainable_variables
    x, y, _ = microbatches

    @tf.function(autograph=False)
    def epochs():
        def gradient(i):
            with tf.GradientTape() as tape:
                total = tf.reduce_sum(loss_fn(y[i], model(x[i], training=False)))
            return tape.gradient(total, [v.value for v in variables])

        def microbatch(i, *total):
            return i + 1, *(a + b for a, b in zip(total, gradient(i)))

        def epoch(k):
            _, *total = tf.while_loop(
                lambda i, *_: i < x.shape[0], microbatch, (1, *gradient(0)), parallel_iterations=1
            )
            for variable, g in zip(variables, total):
                variable.assign_sub(1e-3 / (x.shape[0] * x.shape[1]) * g)
            return k + 1

        return tf.while_loop(lambda k: k < EVERY, epoch, (0,), parallel_iterations=1)

    return lambda: epochs()[0].numpy()


def toy_steps(n, width, steps):
    """Functions that take `steps` steps with MODELS models, or with one of them."""
    source, rng = data.load("toy"), np.random.default_rng(0)
    model = models.build("toy_mlp", (2,), 1, width, seed=0)
    sets = [microbatches_of(*source.draw(n, rng)) for _ in range(MODELS)]
    own = tf.stack([s[0] for s in sets]), tf.stack([s[1] for s in sets]), sets[0][2]
    many = single.build_ensemble(model, "mse", 1e-3, MODELS)
    start = [np.stack([w] * MODELS) for w in model.get_weights()]
    one = single.build(model, "mse", 1e-3)
    loss_fn = per_example("mse")
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def script_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(loss_fn(y, model(x, training=False)))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, [v.value for v in variables]), variables))
        return loss

    def together():
        last = tf.fill([MODELS], INFINITY)
        return many.descend(start, own, tf.constant(steps), last)[1].numpy()

    def in_turn():
        return one.descend(sets[0], tf.constant(steps), INFINITY)[0].numpy()

    def step_by_step():
        x, y, _ = sets[0]
        x, y = (tf.reshape(v, [-1, v.shape[-1]]) for v in (x, y))
        for _ in range(steps):
            loss = script_step(x, y)
        return loss.numpy()

    return together, in_turn, step_by_step


def table(header):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="of timing per row")
    parser.add_argument("--only", choices=["osgr", "replicas"])
    arguments = parser.parse_args()
    if arguments.only != "replicas":
        names = ["plain, s an epoch", "osgr, s an epoch", "x plain", "of it by test passes"]
        table(["MNIST network, n", "width", *names])
        for n, width in ((1000, 6), (5000, 6), (10_000, 6)):
            ours, plain, test = interleaved(osgr_epochs(n, width), arguments.seconds)
            seconds = (f"{t / EVERY:.3f}" for t in (plain, ours))
            row(n, width, *seconds, f"{ours / plain:.2f}", f"{test / plain:.2f}")
    if arguments.only != "osgr":
        names = ["together", "in turn", "step by step"]
        table(
            ["toy, n", "width", *(f"{name}, us" for name in names), "x in turn", "x step by step"]
        )
        for n, width, steps in ((100, 10, 300), (200, 20, 150), (500, 20, 60), (1000, 50, 30)):
            ours, *others = interleaved(toy_steps(n, width, steps), arguments.seconds)
            times = [ours / MODELS / steps, *(t / steps for t in others)]
            ratios = [f"{t / times[0]:.0f}" for t in times[1:]]
            row(n, width, *(f"{1e6 * t:.1f}" for t in times), *ratios)


if __name__ == "__main__":
    main()
