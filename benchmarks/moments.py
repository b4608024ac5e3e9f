"""What `gradient_moments` costs: a micro-batch against the plain gradient of the same one.

    python benchmarks/moments.py [--only mlp] [--seconds 6]

The plain gradient is a compiled function of loss and gradient, called for each micro-batch. "all":
a call on ten micro-batches, with what comes before and after. "streamed": what ten more of them
take, in a call on twenty. The first call of each, which traces and checks, is not timed. "signs":
with exact counts of signs. Medians over rounds in which all take turns; an asterisk marks a
streamed micro-batch that misses its target.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# (network, batch, target)
ROWS = [
    ("mlp", 32, 1.8),
    ("mlp", 128, 1.5),
    ("mlp", 512, 1.5),
    ("mnist", 128, 1.5),
    ("cifar_cnn", 32, 1.5),
    ("cifar_cnn", 128, 1.5),
    ("transformer", 32, 1.5),
    ("recommender", 64, 1.5),
    ("resnet18_64", 8, 1.5),
    ("mobilenet", 8, 1.5),
    ("efficientnet", 8, 1.5),
]
SIGNS_MORE = 0.6
MANY = 10  # micro-batches


def measured(name, batch, seconds):
    """Milliseconds of a plain gradient, and ratios: all and streamed, without and with signs."""
    import keras
    import networks
    import numpy as np
    import tensorflow as tf

    import tf_gsnr

    keras.utils.set_random_seed(0)
    model, x, y = networks.NETWORKS[name](batch)
    x, y = (np.concatenate([v] * 2 * MANY) for v in (x, y))
    ten = batch * MANY
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batches = [
        (tf.constant(x[i : i + batch]), tf.constant(y[i : i + batch])) for i in range(0, ten, batch)
    ]

    @tf.function(autograph=False)
    def plain(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=False))
        gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
        return [tf.convert_to_tensor(g) for g in gradients]

    def ours(signs, examples):
        options = dict(loss=loss, batch_size=batch, sign_counts=signs)
        tf_gsnr.gradient_moments(model, x[:examples], y[:examples], **options)

    runs = [lambda: [plain(*one) for one in batches]]
    for signs in (False, True):
        runs += [lambda s=signs: ours(s, ten), lambda s=signs: ours(s, 2 * ten)]
    times = [[] for _ in runs]
    for run in runs:
        run()
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, found in zip(runs, times):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    ratios = []
    for once, twice in (times[1:3], times[3:5]):
        ratios.append(statistics.median(a / p for a, p in zip(once, times[0])))
        more = ((b - a) / p for a, b, p in zip(once, twice, times[0]))
        ratios.append(statistics.median(more))
    return 1000 * statistics.median(times[0]) / MANY, *ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks, separated by commas; default: all")
    parser.add_argument("--seconds", type=float, default=6, help="of timing per row")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        name, batch, target = ROWS[arguments.row]
        ms, *ratios = measured(name, batch, arguments.seconds)
        targets = [target, target + SIGNS_MORE]
        cells = [name, batch, f"{ms:.1f}"]
        for whole, streamed, most in zip(ratios[::2], ratios[1::2], targets):
            cells += [f"{whole:.2f}", f"{streamed:.2f}{'*' * (streamed > most)}", f"{most:.1f}"]
        return print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    chosen = arguments.only.split(",") if arguments.only else [row[0] for row in ROWS]
    header = ["network", "batch", "plain ms", "all", "streamed", "target"]
    header += ["signs: all", "streamed", "target"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for i, row in enumerate(ROWS):
        if row[0] in chosen:  # each in a process of its own
            command = [sys.executable, __file__, "--row", str(i)]
            subprocess.run([*command, "--seconds", str(arguments.seconds)], check=True)


if __name__ == "__main__":
    main()
