"""What GSNR in `model.fit` costs: a step of GSNRModel against one of plain Keras.

    python benchmarks/fit.py [--only mlp] [--seconds 8]

A row is a network and a batch size. The ratio is that of a training step with everything shown that
is shown by default, measured at every step, every 4th and every 16th: the median over rounds in
which plain Keras and all the others take turns. The first step, with all that is traced, and the
peak of memory are those of a process of its own. "kept" is what the meter holds between two steps,
in bytes a parameter. A figure that misses its target is marked by an asterisk.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # else convolutions are slow on some CPUs
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# (network, batch, optimiser, target of the ratio at every step)
ROWS = [
    ("mlp", 32, "adam", 1.6),
    ("mlp", 128, "adam", 1.3),
    ("mnist", 128, "adam", 1.3),
    ("cifar_cnn", 32, "adam", 1.3),
    ("cifar_cnn", 128, "adam", 1.3),
    ("cifar_cnn", 128, "sgd", 1.3),
    ("transformer", 32, "adam", 1.3),
    ("recommender", 64, "adam", 1.3),
    ("resnet18_64", 32, "adam", 1.3),
    ("mobilenet", 32, "adam", 1.3),
    ("efficientnet", 32, "adam", 1.3),
    ("gpt2", 8, "adam", 1.6),
]
EVERY = {1: None, 4: 1.1, 16: 1.05}
FIRST, FIRST_MORE = 3, 3.0  # times plain, plus seconds
KEPT = 8  # bytes a parameter
COPIES, BLOCK_MIB = 3, 32  # of the parameters, and one block: by how much the peak may be higher
PROGRAM_MIB = 128  # besides, for the graphs themselves


def made(row, measured):
    """A compiled model and an endless stream of its batch."""
    import keras
    import networks
    import tensorflow as tf

    import tf_gsnr

    name, batch, optimizer, _ = row
    keras.utils.set_random_seed(0)
    model, x, y = networks.NETWORKS[name](batch)
    model = tf_gsnr.GSNRModel(model) if measured else model
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch, drop_remainder=True)
    return model, data.cache().repeat()


def alone(row, measured):
    """Seconds of the first step, and MiB at the peak, of this process."""
    from resources import peak_mib

    model, data = made(row, measured)
    start = time.perf_counter()
    model.fit(data, steps_per_epoch=1, verbose=0)
    first = time.perf_counter() - start
    model.fit(data, steps_per_epoch=2, verbose=0)
    parameters = sum(v.numpy().size for v in model.trainable_variables)
    print(json.dumps(dict(first=first, peak=peak_mib(), parameters=parameters)))


def side_by_side(row, seconds):
    """Milliseconds of a plain step, the ratios, and the bytes that the meter keeps."""
    (plain, data), (ours, _) = made(row, False), made(row, True)
    ways = {0: plain} | dict.fromkeys(EVERY, ours)
    for model in (plain, ours):
        model.fit(data, steps_per_epoch=3, verbose=0)
    training = ours._gsnr_training
    training.look_every = None  # as in a fit that nobody looks at before the epoch's end
    streams = {way: iter(data) for way in ways}

    def steps(way, count):
        model = ways[way]
        if way:
            training.every, training.steps = way, 0
        model.make_train_function()
        start = time.perf_counter()
        for _ in range(count):
            model.train_function(streams[way])
        return (time.perf_counter() - start) / count

    for way in ways:
        steps(way, 17)
    one = steps(0, 3)
    count = {way: max(1, round(0.05 / one / (way or 1))) * (way or 1) for way in ways}
    times = {way: [] for way in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for way in ways:
            times[way].append(steps(way, count[way]))
    ratios = {way: statistics.median(a / b for a, b in zip(times[way], times[0])) for way in EVERY}
    kept = sum(v.numpy().nbytes for v in ours._meter.variables)
    print(json.dumps(dict(ms=1000 * statistics.median(times[0]), ratios=ratios, kept=kept)))


def child(*arguments):
    """What a process of its own prints, of this program with these arguments."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def marked(text, value, target):
    return f"{text}*" if value > target else text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks, separated by commas; default: all")
    parser.add_argument("--seconds", type=float, default=8, help="of timing per row")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, row = arguments.child[0], ROWS[int(arguments.child[1])]
        return (
            side_by_side(row, arguments.seconds) if task == "both" else alone(row, task == "ours")
        )
    chosen = arguments.only.split(",") if arguments.only else [row[0] for row in ROWS]
    header = ["network", "batch", "plain ms", "every step", "target", "4th", "16th"]
    header += ["first step s: plain", "ours", "peak MiB: plain", "ours", "kept"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    missed = []
    for i, row in enumerate(ROWS):
        name, batch, optimizer, target = row
        if name not in chosen:
            continue
        both = child("--child", "both", i, "--seconds", arguments.seconds)
        plain, ours = (child("--child", way, i) for way in ("plain", "ours"))
        size = 4 * plain["parameters"] / 2**20
        kept = both["kept"] / plain["parameters"]
        most = plain["peak"] + COPIES * size + BLOCK_MIB + PROGRAM_MIB
        found = [
            *(
                marked(f"{ratio:.2f}", ratio, EVERY[int(way)] or target)
                for way, ratio in both["ratios"].items()
            ),
            f"{plain['first']:.1f}",
            marked(f"{ours['first']:.1f}", ours["first"], FIRST * plain["first"] + FIRST_MORE),
            f"{plain['peak']:.0f}",
            marked(f"{ours['peak']:.0f}", ours["peak"], most),
            marked(f"{kept:.1f}", both["kept"], max(KEPT * plain["parameters"], 2**20)),
        ]
        label = name if optimizer == "adam" else f"{name}, {optimizer}"
        missed += [label] * any(text.endswith("*") for text in found)
        cells = [label, batch, f"{both['ms']:.1f}", found[0], target, *found[1:]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    targets = ", ".join(f"every {k}th {t}" for k, t in EVERY.items() if t)
    print(f"\ntargets: {targets}, first step {FIRST} times plain plus {FIRST_MORE:.0f} s,")
    print(f"peak: plain, {COPIES} copies of the parameters, {BLOCK_MIB + PROGRAM_MIB} MiB")
    print("missed by: " + (", ".join(missed) if missed else "none"))


if __name__ == "__main__":
    main()
