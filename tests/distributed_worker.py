"""Run by the tests of strategies in processes of their own: writes what was found.

python distributed_worker.py mirrored FILE         two virtual devices in one process
python distributed_worker.py worker FILE           one of several processes of TF_CONFIG
python distributed_worker.py descent FILE          an experiment on two virtual devices
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
from tf_gsnr import data, experiments, progress, records
from tf_gsnr.descent import devices
from tf_gsnr.experiments.framework.experiment import Workbench

RNG = np.random.default_rng(0)
X = RNG.normal(size=[52, 6]).astype("float32")
LABELS = RNG.integers(0, 3, 52)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# Three micro-batches on two devices; in float64 the differences of losses keep their digits.
OSGR = dict(
    dataset="toy",
    n=[21],
    p_random=[0.5],
    width=[4],
    epochs=[0, 3],
    training_sets=2,
    learning_rate=0.01,
    test_size=50,
    batch_size=8,
)


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


def two_devices():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def mirrored():
    for each in (None, two_devices()):
        yield moments(each), training(each, 1), training(each, 3)


def worker():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    yield moments(strategy)
    devices.check_same_start(strategy, {"epoch": 3}, "runs/mine")
    try:
        devices.check_same_start(strategy, devices.worker(strategy), "runs/mine")
    except ValueError as error:
        yield str(error)


def descent():
    keras.config.set_dtype_policy("float64")
    osgr = experiments.load("osgr")
    settings = osgr.settings(**OSGR)
    for name, each in {"one": None, "two": two_devices()}.items():
        directory = records.RunDirectory(f"{sys.argv[2]}.{name}", settings._asdict())
        bar = progress.Progress(1)
        source, how = data.load("toy"), dict(replicas=1, strategy=each)
        bench = Workbench(source, directory, bar, traced={}, **how)
        (configuration,) = osgr.configurations(settings)
        for record in osgr.run(configuration, settings, bench):
            directory.append(record)
        yield directory.records()


if __name__ == "__main__":
    modes = {"mirrored": mirrored, "worker": worker, "descent": descent}
    results = list(modes[sys.argv[1]]())
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(results, file)
