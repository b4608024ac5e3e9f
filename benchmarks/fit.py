"""What GSNR in `model.fit` costs: GSNRModel and GSNRCallback against plain `fit`, on MNIST.

    python benchmarks/fit.py --data_dir=DIR

Prints, for each way of training, the seconds of an epoch and their ratio to plain Keras, medians
over interleaved rounds. The first epoch of each, in which TensorFlow traces, is not timed.
"""

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # else convolutions are slow on some CPUs

import argparse
import statistics
import time

import keras
import numpy as np

import tf_gsnr
from tf_gsnr import data, models

TARGETS = {"GSNRModel, every step": 1.5, "every 4th": 1.15, "every 16th": 1.05}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", help="where TensorFlow Datasets keeps MNIST")
    parser.add_argument("--examples", type=int, default=60000, help="in an epoch")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=10, help="p of the MNIST network")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--probe", type=int, default=1000, help="examples of the callback's probe")
    parser.add_argument("--only", default="", help="ways whose name contains this, beside plain")
    arguments = parser.parse_args()
    source = data.load("mnist", arguments.data_dir)
    x, y = source.draw(arguments.examples, np.random.default_rng(0))
    probe = x[: arguments.probe], y[: arguments.probe]
    shown = ("gsnr", "gsnr_median", "noise_scale", "osgr", "gap_growth")
    ways = {"plain fit": (None, [])}
    for name, k in zip(TARGETS, (1, 4, 16)):
        ways[name] = (dict(measure_every=k), [])
    ways["every step, without same_sign"] = (dict(measure_every=1, shown=shown), [])
    ways["every step, shown of the last batch"] = (dict(measure_every=1, pool="batch"), [])
    ways["GSNRCallback, each epoch"] = (None, [tf_gsnr.GSNRCallback(*probe)])
    fits = {
        name: fit_of(wrap, callbacks, arguments, x, y)
        for name, (wrap, callbacks) in ways.items()
        if arguments.only in name or name == "plain fit"
    }
    times = {name: [] for name in fits}
    for _ in range(arguments.rounds):
        for name, fit in fits.items():
            start = time.perf_counter()
            fit(arguments.examples)
            times[name].append(time.perf_counter() - start)
    print(f"{arguments.examples} examples, batch {arguments.batch_size}, width {arguments.width}")
    print(f"{'':38}{'s an epoch':>12}{'of plain':>10}{'target':>8}")
    for name, seconds in times.items():
        # Each round against plain fit in the same round: the machine's moods cancel.
        ratio = statistics.median(s / plain for s, plain in zip(seconds, times["plain fit"]))
        median = statistics.median(seconds)
        print(f"{name:38}{median:12.2f}{ratio:10.3f}{TARGETS.get(name, ''):>8}")


def fit_of(wrap, callbacks, arguments, x, y):
    """A function that trains for one epoch on the first `n` examples, traced already."""
    network = models.build("mnist_cnn", x.shape[1:], 10, arguments.width, seed=0)
    model = network if wrap is None else tf_gsnr.GSNRModel(network, engine=arguments.engine, **wrap)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])

    def fit(n):
        model.fit(
            x[:n], y[:n], batch_size=arguments.batch_size, verbose=0, callbacks=list(callbacks)
        )

    fit(arguments.examples)
    return fit


if __name__ == "__main__":
    main()
