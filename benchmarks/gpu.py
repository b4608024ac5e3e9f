"""The engines under XLA: exported as programs, and timed where there is an accelerator.

    python benchmarks/gpu.py [--export FOLDER] [--networks mnist:512,resnet18:32]

With `--export` each compiled method is written as an XLA program (`NAME.hlo.pb`) with its inputs
and outputs (`NAME.npz`), which `exported.py` runs on a machine that has the accelerator but not
TensorFlow. Where TensorFlow sees a GPU, the methods are run in turn and their times printed.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import keras  # noqa: E402
import networks  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from peers import naive  # noqa: E402

from tf_gsnr.gradients import losses  # noqa: E402
from tf_gsnr.gradients.engines import ENGINES  # noqa: E402
from tf_gsnr.models import per_example  # noqa: E402

METHODS = ("plain", "layerwise", "vectorized", "naive")


def compiled(method, name, batch):
    """`(tf.function under XLA, its arguments)`."""
    keras.utils.set_random_seed(0)
    model, x, y = networks.NETWORKS[name](batch)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss_fn = per_example(loss)

    def plain(x, y):
        with tf.GradientTape() as tape:
            mean = tf.reduce_mean(loss_fn(y, model(x)))
        gradients = tape.gradient(mean, [v.value for v in model.trainable_variables])
        return [tf.convert_to_tensor(g) for g in gradients]

    def moments(x, y):
        found = measure(x, y).moments
        return found.mean, found.m2

    if method in ENGINES:
        measure = ENGINES[method](model, losses.of_batch(model, loss))
    body = {"plain": plain, "naive": naive(model, loss_fn)}.get(method, moments)
    return tf.function(body, autograph=False, jit_compile=True), (tf.constant(x), tf.constant(y))


def export(function, arguments, stem):
    """Writes the program before device-specific optimisation, and what it takes and gives.

    Inputs are in the program's order: the arguments, then what the function captures.
    """
    program = function.experimental_get_compiler_ir(*arguments)(stage="hlo_serialized")
    Path(f"{stem}.hlo.pb").write_bytes(program)
    concrete = function.get_concrete_function(*arguments)
    variables = {id(v.handle): v for v in concrete.variables}
    inputs = list(arguments) + [variables.get(id(t), t) for t in concrete.captured_inputs]
    outputs = tf.nest.flatten(function(*arguments))
    arrays = {f"in_{i:04d}": np.asarray(v) for i, v in enumerate(inputs)}
    arrays |= {f"out_{i:04d}": np.asarray(v) for i, v in enumerate(outputs)}
    np.savez(f"{stem}.npz", **arrays)
    return len(program)


def timed(functions, seconds):
    """Per function the median time of one run, in turn."""
    times = [[] for _ in functions]
    for function, arguments in functions:
        for _ in range(3):
            tf.nest.flatten(function(*arguments))[0].numpy()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for (function, arguments), found in zip(functions, times):
            start = time.perf_counter()
            tf.nest.flatten(function(*arguments))[-1].numpy()
            found.append(time.perf_counter() - start)
    return [float(np.median(t)) for t in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", default="", help="folder for the programs")
    parser.add_argument("--networks", default="mnist:512,resnet18:32,transformer:64")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    devices = tf.config.list_physical_devices("GPU")
    print(f"devices: {devices or 'no GPU: nothing is timed'}")
    methods = arguments.methods.split(",")
    for case in arguments.networks.split(","):
        name, batch = case.split(":")
        functions = [compiled(method, name, int(batch)) for method in methods]
        if arguments.export:
            Path(arguments.export).mkdir(parents=True, exist_ok=True)
            for method, (function, inputs) in zip(methods, functions):
                stem = Path(arguments.export) / f"{name}_b{batch}_{method}"
                print(f"{stem}: {export(function, inputs, stem)} bytes", flush=True)
        if devices:
            times = timed(functions, arguments.seconds)
            for method, seconds in zip(methods, times):
                ratio = f"{seconds / times[0]:.2f}"
                row = [name, batch, method, f"{1000 * seconds:.2f} ms", ratio]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
