"""Time and memory of the engines against the plain gradient of the same batch.

    python benchmarks/engines.py [--networks mnist,mlp] [--seconds 5]

Each row: one network and batch. Times are medians of interleaved runs of the whole moments (mean
and variance of every parameter); "x" is the ratio to the plain gradient. Memory is the peak of a
process of its own that does nothing else, less that of one that only builds the model.

The results stay tensors, as in a training step: a copy of each into numpy would cost the multilayer
perceptron 2 ms of the plain step and 5 ms of the moments. What the layer-wise engine adds for a
dense layer is one more product and three passes over its parameters.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# (network, batch, target of the layer-wise engine, engines)
CASES = [
    ("mnist", 512, 1.4),
    ("mlp", 128, 1.5),
    ("cifar", 128, 1.5),
    ("resnet18", 32, 1.6),
    ("transformer", 64, 1.8),
    ("mnist", 128, None),
    ("mnist", 2048, None),
    ("mlp", 512, None),
    ("mlp", 2048, None),
]
TOO_LARGE = {("mlp", 2048), ("mlp", 512), ("resnet18", 32)}  # for [batch, parameters] in memory
METHODS = ("plain", "layerwise", "vectorized")


def step(method, name, batch):
    """A compiled function without arguments that computes a network's gradient or moments."""
    import keras
    import networks
    import tensorflow as tf

    from tf_gsnr.gradients import losses
    from tf_gsnr.gradients.engines import ENGINES
    from tf_gsnr.models import per_example

    keras.utils.set_random_seed(0)
    model, x, y = networks.NETWORKS[name](batch)
    x, y = tf.constant(x), tf.constant(y)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss_fn = per_example(loss)

    def plain(x, y):
        with tf.GradientTape() as tape:
            mean = tf.reduce_mean(loss_fn(y, model(x, training=False)))
        gradients = tape.gradient(mean, [v.value for v in model.trainable_variables])
        return [tf.convert_to_tensor(g) for g in gradients]

    def moments(x, y):
        found = measure(x, y).moments
        return found.mean, found.m2

    if method != "plain":
        measure = ENGINES[method](model, losses.of_batch(model, loss))
    compiled = tf.function(plain if method == "plain" else moments, autograph=False)

    return lambda: compiled(x, y)  # on a CPU it returns when all is computed


def interleaved(steps, seconds):
    """Per step, the median time over rounds in which each runs once."""
    times = [[] for _ in steps]
    for run in steps:
        run()
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, found in zip(steps, times):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [sorted(found)[len(found) // 2] for found in times]


def peak(method, name, batch):
    """Peak memory in MiB of a process that runs a method three times; "none" only imports."""
    code = f"import engines; engines.print_peak({method!r}, {name!r}, {batch})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def print_peak(method, name, batch):
    if method == "none":
        import networks

        networks.NETWORKS[name](batch)
    else:
        run = step(method, name, batch)
        for _ in range(3):
            run()
    from resources import peak_mib

    print(peak_mib())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="", help="comma-separated; default: all")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=5, help="of timing per row")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--first", action="store_true", help="only the rows with a target")
    arguments = parser.parse_args()
    chosen = arguments.networks.split(",") if arguments.networks else []
    header = ["network", "batch", "method", "ms", "x plain", "target", "MiB"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for name, batch, target in CASES:
        if chosen and name not in chosen or arguments.first and target is None:
            continue
        methods = [
            m
            for m in arguments.methods.split(",")
            if not (m == "vectorized" and (name, batch) in TOO_LARGE)
        ]
        times = interleaved([step(m, name, batch) for m in methods], arguments.seconds)
        base = peak("none", name, batch) if arguments.memory else 0
        for method, seconds in zip(methods, times):
            memory = f"{peak(method, name, batch) - base:.0f}" if arguments.memory else ""
            goal = f"{target}" if target and method == "layerwise" else ""
            ratio = f"{seconds / times[0]:.2f}"
            row = [name, batch, method, f"{1000 * seconds:.1f}", ratio, goal, memory]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
