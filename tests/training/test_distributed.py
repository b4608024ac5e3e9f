"""Many devices and many processes find what one device finds."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import finish, free_ports, start

import tf_gsnr


def assert_same_moments(a, b):
    for one, other in zip(a, b):
        assert one["count"] == other["count"] == 52
        assert (one["positives"], one["negatives"]) == (other["positives"], other["negatives"])
        for name in ("mean", "m2", "loss"):
            for u, v in zip(tf.nest.flatten(one[name]), tf.nest.flatten(other[name])):
                np.testing.assert_allclose(u, v, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    file = tmp_path_factory.mktemp("mirrored") / "found.json"
    return finish(start("mirrored", file), file)


def test_mirrored_moments(mirrored):
    (one, *_), (two, *_) = mirrored
    assert_same_moments(one, two)


@pytest.mark.parametrize("index", [1, 2])
def test_mirrored_fit(mirrored, index):
    (weights, history), (weights_two, history_two) = mirrored[0][index], mirrored[1][index]
    for a, b in zip(weights, weights_two):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert {"gsnr", "osgr", "gap_growth", "gsnr/mean"} <= set(history)
    for name, values in history.items():
        np.testing.assert_allclose(history_two[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes(tmp_path, mirrored):
    ports = free_ports(2)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    files = [tmp_path / f"{index}.json" for index in range(2)]
    processes = [
        start(
            "worker",
            file,
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        )
        for index, file in enumerate(files)
    ]
    try:
        found = [finish(process, file) for process, file in zip(processes, files)]
    finally:
        for process in processes:
            process.kill()
    assert found[0] == found[1]
    moments, refusal = found[0]
    assert_same_moments(mirrored[0][0], moments)
    assert "do not start from the same place: runs/mine and" in refusal


def test_refuses_strategies():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    x = np.zeros([4, 2], np.float32)
    central = tf.distribute.experimental.CentralStorageStrategy()
    with pytest.raises(ValueError, match="unsupported; available: MirroredStrategy"):
        tf_gsnr.gradient_moments(model, x, x[:, :1], "mse", strategy=central)
    with pytest.raises(ValueError, match="CentralStorageStrategy: unsupported; available: Mirr"):
        with central.scope():
            wrapped = tf_gsnr.GSNRModel(keras.Sequential([keras.layers.Dense(1)]))
            wrapped.compile("sgd", "mse")
            wrapped.fit(x, x[:, :1], verbose=0)
    with pytest.raises(ValueError, match="strategy.scope"):
        one = tf.distribute.OneDeviceStrategy("CPU:0")
        tf_gsnr.gradient_moments(model, x, x[:, :1], "mse", strategy=one)
