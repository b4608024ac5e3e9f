"""The layer-wise engine against BackPACK, torch.func, Opacus and the naive map, side by side.

    python benchmarks/peers.py --torch_python PATH/TO/ENVIRONMENT/bin/python

The same network, weights and data for all; each method in a process of its own, which take turns
of several runs each, so that caches and pages are warm as they are in training.
PyTorch's environment is made from benchmarks/requirements-peers.txt. Prints, per method, the median
time, the peak memory of its process and how far its mean and variance are from ours.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

OURS = ("plain (TensorFlow)", "tf_gsnr layerwise", "naive vectorized_map")
THEIRS = ("plain", "BackPACK SumGradSquared", "BackPACK Variance", "torch.func", "Opacus")


def naive(model, loss_fn):
    """What one writes without this package: `tf.vectorized_map` over `GradientTape`."""
    import tensorflow as tf

    def run(x, y):
        def one(example):
            x, y = example
            with tf.GradientTape() as tape:
                loss = loss_fn(y[None], model(x[None]))[0]
            return tape.gradient(loss, model.trainable_variables)

        g = tf.vectorized_map(one, (x, y))
        mean = [tf.reduce_mean(v, 0) for v in g]
        return mean, [tf.reduce_sum(tf.square(v - m), 0) for v, m in zip(g, mean)]

    return run


def serve(name, path):
    """The TensorFlow side of a method; speaks as peers_torch.py does."""
    import keras
    import networks
    import tensorflow as tf
    from resources import peak_mib, steady

    from tf_gsnr.gradients import losses
    from tf_gsnr.gradients.layerwise import engine as layerwise
    from tf_gsnr.models import per_example

    data = dict(np.load(path))
    model, _, _ = networks.NETWORKS[str(data["network"])](1)
    model.set_weights([data[k] for k in sorted(data) if k.startswith("weight")])
    x, y = tf.constant(data["x"]), tf.constant(data["y"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss_fn = per_example(loss)
    if name == "plain (TensorFlow)":

        def run(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(loss_fn(y, model(x)))
            return tape.gradient(loss, model.trainable_variables), []

    elif name == "tf_gsnr layerwise":
        measure = layerwise.build(model, losses.of_batch(model, loss))

        def run(x, y):
            moments = measure(x, y).moments
            return moments.mean, moments.m2

    else:
        run = naive(model, loss_fn)
    compiled = tf.function(run, autograph=False)

    def once():
        return compiled(x, y)  # results stay tensors, as PyTorch's do

    for _ in range(3):
        once()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(steady(once), flush=True)
    mean, m2 = tf.nest.map_structure(np.asarray, once())
    arrays = {f"mean{j:02d}": v for j, v in enumerate(mean)}
    np.savez(f"{path}.{name}.npz", **arrays, **{f"m2{j:02d}": v for j, v in enumerate(m2)})
    print(peak_mib(), flush=True)


class Process:
    """A method in a process of its own."""

    def __init__(self, name, path, torch_python):
        self.name, self.path = name, path
        program = [sys.executable, str(HERE / "peers.py"), "--serve", name, path]
        if name in THEIRS:
            program = [torch_python, str(HERE / "peers_torch.py"), name, path]
        self.process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.times = []
        self.alive = self.process.stdout.readline().strip() == "ready"

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def result(self):
        """`(peak MiB, {array name: value})`."""
        memory = self.ask("end")
        return memory, dict(np.load(f"{self.path}.{self.name}.npz"))


def compare(network, batch, seconds, torch_python):
    import networks
    from layouts import to_torch

    model, x, y = networks.NETWORKS[network](batch)
    weights = [np.asarray(v) for v in model.trainable_variables]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "data.npz")
        arrays = {f"weight{j:02d}": w for j, w in enumerate(weights)}
        np.savez(path, x=x, y=y, network=network, threads=os.cpu_count(), **arrays)
        names = OURS + (THEIRS if torch_python else ())
        processes = [Process(name, path, torch_python) for name in names]
        running = [p for p in processes if p.alive]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(running[0].times) < 5:
            for process in running:
                time.sleep(0.3)  # until the threads of the one before have stopped spinning
                process.times.append(process.ask("run"))
        results = {p.name: p.result() for p in running}
        _, ours = results["tf_gsnr layerwise"]
        for process in processes:
            if not process.alive:
                print(f"| {network} | {batch} | {process.name} | failed | | | |", flush=True)
                continue
            memory, found = results[process.name]
            median = 1000 * sorted(process.times)[len(process.times) // 2]
            errors = []
            for kind in ("mean", "m2"):
                worst = 0.0
                for j in range(len(weights)):
                    key = f"{kind}{j:02d}"
                    if key in found:
                        mine = ours[key]
                        mine = to_torch(mine, weights) if process.name in THEIRS else mine
                        worst = max(worst, np.abs(found[key] - mine).max() / np.abs(mine).max())
                errors.append(f"{worst:.0e}" if f"{kind}00" in found else "")
            name = "plain (PyTorch)" if process.name == "plain" else process.name
            row = [network, batch, name, f"{median:.1f}", f"{memory:.0f}", *errors]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python", default="", help="of PyTorch's environment")
    parser.add_argument("--cases", default="mnist:512,mlp:128", help="network:batch, ...")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(*arguments.serve)
    header = ["network", "batch", "method", "ms", "peak MiB", "mean differs", "m2 differs"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for case in arguments.cases.split(","):
        network, batch = case.split(":")
        compare(network, int(batch), arguments.seconds, arguments.torch_python)


if __name__ == "__main__":
    main()
