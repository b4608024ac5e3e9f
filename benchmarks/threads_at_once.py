"""Several threads on one model: are their moments, and what others predict meanwhile, right?

    python benchmarks/threads_at_once.py [--rounds 20] [--threads 6]

In each round threads call `gradient_moments` on a new model, each with options of its own, while
one more asks the model for predictions. Prints how many calls were right (as those of one thread),
wrong or raised, how many predictions were not those of the model, and how many layers have
something left on them.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import collections
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OPTIONS = [
    {},
    dict(sign_counts=True),
    dict(engine="vectorized"),
    dict(batch_size=7),
    dict(training=True, seed=1),
    dict(contributions=True),
    dict(batch_size=5, sign_counts=True),
    dict(engine="layerwise", batch_size=11),
]


def networks():
    """Kinds of models that are captured in different ways."""
    import keras

    layers = keras.layers
    inputs = keras.Input([12])
    parts = {
        "dense": [layers.Dense(8, "relu"), layers.LayerNormalization(), layers.Dense(3)],
        "recurrent": [layers.Reshape([4, 3]), layers.LSTM(5), layers.Dense(3)],
        "convolution": [
            layers.Reshape([6, 2]),
            layers.Conv1D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ],
    }
    return {name: keras.Sequential([inputs, *found], name=name) for name, found in parts.items()}


def one_round(model, x, y, options, count):
    """Adds to `count` what came of these calls, made at once."""
    import numpy as np

    import tf_gsnr

    loss = "mse"
    alone = [tf_gsnr.gradient_moments(model, x, y, loss, **o) for o in options]
    tf_gsnr.forget(model)  # traced anew, by whoever is first
    before = model(x).numpy()
    ended = threading.Event()

    def look():
        while not ended.is_set():
            count["predictions"] += 1
            count["wrong predictions"] += not np.array_equal(model(x).numpy(), before)

    def call(k):
        try:
            found = tf_gsnr.gradient_moments(model, x, y, loss, **options[k])
        except Exception as error:
            count["raised"] += 1
            print(f"{model.name}, {options[k]}: {type(error).__name__}: {error}"[:300], flush=True)
            return
        pairs = zip(found.mean + found.m2, alone[k].mean + alone[k].m2)
        right = all(np.allclose(a, b, 1e-4, 1e-6) for a, b in pairs)
        count["right" if right else "wrong"] += 1

    watcher = threading.Thread(target=look)
    threads = [threading.Thread(target=call, args=[k]) for k in range(len(options))]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    watcher.join()
    count["layers with something left"] += sum("call" in vars(layer) for layer in model.layers)


def main():
    import keras
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=6, help=f"at most {len(OPTIONS)}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    kinds = ("right", "wrong", "raised", "predictions", "wrong predictions")
    count = collections.Counter(dict.fromkeys((*kinds, "layers with something left"), 0))
    for k in range(arguments.rounds):
        keras.utils.set_random_seed(arguments.seed + k)
        chosen = [OPTIONS[i] for i in rng.permutation(len(OPTIONS))[: arguments.threads]]
        x, y = (rng.normal(size=[24, size]).astype("float32") for size in (12, 3))
        model = list(networks().values())[k % 3]
        one_round(model, x, y, chosen, count)
    print(", ".join(f"{name} {number}" for name, number in count.items()))


if __name__ == "__main__":
    main()
