"""Run by test_training_distributed.py in processes of its own: prints moments and histories.

python distributed_worker.py mirrored            two virtual devices in one process
python distributed_worker.py worker FILE         one of several processes of TF_CONFIG
"""

import contextlib
import json
import os
import sys

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import tensorflow as tf

import tf_gsnr

RNG = np.random.default_rng(0)
X = RNG.normal(size=[52, 6]).astype("float32")
LABELS = RNG.integers(0, 3, 52)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(strategy):
    with strategy.scope() if strategy else contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dropout(0.3)]
        return keras.Sequential([keras.Input([6]), *layers, keras.layers.Dense(3)])


def moments(strategy):
    """Of two settings: 7 micro-batches, the last ragged; and random layers."""
    model = network(strategy)
    found = []
    for options in (dict(sign_counts=True), dict(training=True, seed=3)):
        m = tf_gsnr.gradient_moments(
            model, X, LABELS, LOSS, batch_size=8, strategy=strategy, **options
        )
        found.append(tf.nest.map_structure(lambda v: np.asarray(v).tolist(), m._asdict()))
    return found


def training(strategy, measure_every):
    model = network(strategy)
    model.layers[1].rate = 0.0  # replicas draw masks of their own: that is plain Keras
    with strategy.scope() if strategy else contextlib.nullcontext():
        wrapped = tf_gsnr.GSNRModel(model, measure_every=measure_every)
        wrapped.compile(keras.optimizers.Adam(0.01), LOSS, metrics=["accuracy"])
    probe = tf_gsnr.GSNRCallback(X, LABELS)
    history = wrapped.fit(
        X, LABELS, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[probe]
    ).history
    return [w.tolist() for w in model.get_weights()], history


def mirrored():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for each in (None, strategy):
        yield moments(each), training(each, 1), training(each, 3)


def worker():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    yield moments(strategy)


if __name__ == "__main__":
    results = list({"mirrored": mirrored, "worker": worker}[sys.argv[1]]())
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(results, file)
