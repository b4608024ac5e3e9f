"""Long lives: memory and traces over many calls, many losses, many models, beside plain Keras.

    python benchmarks/lives.py [--times 1000] [--models 100] [--only NAME,...]

Each case runs in a process of its own. Prints the memory (resident, MiB) after the first quarter
and at the end, by how much it grew in between, and the mean time of a call of the first and of the
last fifty.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]


def resident_mib() -> float:
    """Of this process now."""
    gc.collect()
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if "VmRSS" in line)
    return int(line.split()[1]) / 1024


def data(n=64):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.normal(size=[n, 8]).astype("float32"), rng.integers(0, 3, n)


def network(compiled=True):
    import keras

    model = keras.Sequential(
        [keras.Input([8]), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)]
    )
    if compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
    return model


def new_losses(i, state):
    """A loss that was never seen, at each call."""
    import keras

    import tf_gsnr

    state.setdefault("model", network())
    cross_entropy = keras.losses.sparse_categorical_crossentropy
    x, y = data()
    tf_gsnr.gradient_moments(state["model"], x, y, lambda t, p: cross_entropy(t, p, True))


def plain_losses(i, state):
    """The same for plain Keras: compiled anew with a new lambda, one step."""
    import keras

    model = state.setdefault("model", network())
    cross_entropy = keras.losses.sparse_categorical_crossentropy
    model.compile("sgd", lambda t, p: cross_entropy(t, p, True))
    x, y = data()
    model.train_on_batch(x, y)


def new_sizes(i, state):
    """A number of examples below batch_size that was never seen."""
    import tf_gsnr

    x, y = data(2 + i)
    tf_gsnr.gradient_moments(state.setdefault("model", network()), x, y, batch_size=2048)


def new_batch_sizes(i, state):
    """A batch_size that was never seen."""
    import tf_gsnr

    x, y = data(1200)
    tf_gsnr.gradient_moments(state.setdefault("model", network()), x, y, batch_size=2 + i)


def failed_calls(i, state):
    """A call that is refused, then one that is right: the second is as fast as ever."""
    import numpy as np

    import tf_gsnr

    model = state.setdefault("model", network())
    x, y = data()
    weights = model.get_weights()
    bad = [(x * np.nan, y), (x, y + 9), (x[:, :3], y)][i % 3]
    try:
        if i % 4 == 3:
            model.set_weights([w * np.nan for w in weights])
        tf_gsnr.gradient_moments(model, *bad)
    except ValueError:
        model.set_weights(weights)
    else:
        raise AssertionError("it went through")
    tf_gsnr.gradient_moments(model, x, y)


def models_wrapped(i, state):
    """A model of its own, wrapped and fitted."""
    import tf_gsnr

    x, y = data()
    tf_gsnr.GSNRModel(network()).fit(x, y, 16, verbose=0)


def models_with_callback(i, state):
    """A model of its own, fitted with a callback."""
    import tf_gsnr

    x, y = data()
    network().fit(x, y, 16, verbose=0, callbacks=[tf_gsnr.GSNRCallback(x, y)])


def models_plain(i, state):
    """A model of its own, fitted by plain Keras."""
    x, y = data()
    network().fit(x, y, 16, verbose=0)


def long_fit(i, state):
    """One model, wrapped, an epoch at each call."""
    import tf_gsnr

    model = state.setdefault("model", tf_gsnr.GSNRModel(network()))
    x, y = data()
    model.fit(x, y, 16, verbose=0)


CALLS = [new_losses, plain_losses, new_sizes, new_batch_sizes, failed_calls, long_fit]
MODELS = [models_wrapped, models_with_callback, models_plain]


def live(function, times):
    state: dict = {}
    took, quarter = [], 0.0
    for i in range(times):
        if i == times // 4:
            quarter = resident_mib()
        begun = time.perf_counter()
        function(i, state)
        took.append(time.perf_counter() - begun)
    end = resident_mib()
    k = min(50, times // 4)
    first, last = sum(took[1 : k + 1]) / k, sum(took[-k:]) / k
    grown = end / quarter - 1
    numbers = f"{quarter:>10.0f} {end:>6.0f} {grown:>+7.0%} {first * 1e3:>9.0f} {last * 1e3:>7.0f}"
    print(f"{function.__name__:<22} {times:>5} {numbers}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    times = {f.__name__: args.times for f in CALLS} | {f.__name__: args.models for f in MODELS}
    if args.child:
        live({f.__name__: f for f in CALLS + MODELS}[args.child], times[args.child])
        return
    names = f"{'MiB at 1/4':>10} {'end':>6} {'growth':>7} {'ms first':>9} {'last':>7}"
    print(f"{'':<22} {'times':>5} {names}")
    for name in args.only.split(",") if args.only else times:
        line = [sys.executable, __file__, "--child", name]
        subprocess.run([*line, f"--times={args.times}", f"--models={args.models}"], check=True)


if __name__ == "__main__":
    main()
