"""What each number that `fit` shows costs: a step without it against one with all, at every step.

    python benchmarks/shown_numbers.py [--seconds 6]

Ratios to a plain step, Adam, medians over rounds in which all take turns; the last columns are what
is saved by leaving a group of numbers out, in per cent of a plain step.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

ROWS = [("mlp", 128), ("transformer", 32), ("cifar_cnn", 32), ("recommender", 64)]
GROUPS = {
    "gsnr, gsnr_median": ("gsnr", "gsnr_median"),
    "same_sign": ("same_sign",),
    "gap_growth": ("gap_growth",),
}


def made(name, batch, **options):
    """A compiled model, after its first steps, and an endless stream of its batch."""
    import keras
    import networks
    import tensorflow as tf

    import tf_gsnr

    keras.utils.set_random_seed(0)
    model, x, y = networks.NETWORKS[name](batch)
    if options:
        model = tf_gsnr.GSNRModel(model, **options)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch, drop_remainder=True)
    data = data.cache().repeat()
    model.fit(data, steps_per_epoch=3, verbose=0)
    if options:
        model._gsnr_training.look_every = None
    return model, iter(data)


def ratios(name, batch, seconds, run_dir):
    """Of each way to a plain step."""
    from tf_gsnr.shown import IN_FIT

    ways = {"plain": {}, "all": dict(shown=IN_FIT)}
    for group, names in GROUPS.items():
        ways[group] = dict(shown=tuple(n for n in IN_FIT if n not in names))
    ways["with run_dir"] = dict(shown=IN_FIT, run_dir=run_dir)
    models = {way: made(name, batch, **options) for way, options in ways.items()}
    times = {way: [] for way in ways}

    def steps(way, count):
        model, stream = models[way]
        model.make_train_function()
        start = time.perf_counter()
        for _ in range(count):
            model.train_function(stream)
        return (time.perf_counter() - start) / count

    for way in ways:
        steps(way, 10)
    count = max(1, round(0.05 / steps("plain", 3)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["plain"]) < 5:
        for way in ways:
            times[way].append(steps(way, count))
    return {
        way: statistics.median(a / b for a, b in zip(times[way], times["plain"])) for way in ways
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of timing per row")
    arguments = parser.parse_args()
    header = ["network", "batch", "all", "with run_dir", *(f"without {g}" for g in GROUPS)]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for name, batch in ROWS:
        with tempfile.TemporaryDirectory() as directory:
            found = ratios(name, batch, arguments.seconds, Path(directory) / "run")
        saved = [f"{100 * (found['all'] - found[group]):+.0f} %" for group in GROUPS]
        cells = [name, batch, f"{found['all']:.2f}", f"{found['with run_dir']:.2f}", *saved]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
