"""The experiments' descent on many devices and in many processes is that of one device."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from distributed_worker import OSGR
from processes import WORKER, finish, free_ports, start

from tf_gsnr import models
from tf_gsnr.descent import devices
from tf_gsnr.records import read_config, read_records
from tf_gsnr.report import runs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("descent") / "found.json"
    return finish(start("descent", file), file)


def assert_same_records(one, other):
    assert len(one) == len(other) == len(OSGR["epochs"])
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "experiment", "dataset"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, nan_ok=True), name


def test_two_devices(found):
    assert_same_records(*found)


def command(directory, index, ports):
    """The command line, as process `index` of several; in float64."""
    keras_json = directory / "keras.json"
    keras_json.write_text('{"floatx": "float64", "backend": "tensorflow"}')
    task = {"type": "worker", "index": index}
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tf_gsnr.main", "--strategy=multi_worker", "--name=two"),
            *(f"--{k}={','.join(map(str, np.ravel(v)))}" for k, v in OSGR.items()),
            f"--runs_dir={directory}",
        ],
        env=os.environ
        | {
            "CUDA_VISIBLE_DEVICES": "",
            "KERAS_HOME": str(directory),
            "TF_CONFIG": json.dumps({"cluster": cluster, "task": task}),
        },
        cwd=WORKER.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes(found, tmp_path):
    ports = free_ports(2)
    processes = [command(tmp_path, index, ports) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for name in ("two", "two-worker1"):
        assert_same_records(read_records(tmp_path / name), found[0])
    assert read_config(tmp_path / "two-worker1")["worker"] == 1
    (run,) = runs.find([tmp_path])
    assert run.name == "two" and len(run.parts) == 1


def test_refusals(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match="TF_CONFIG is not set; expected the cluster"):
        devices.strategy("multi_worker", devices.STRATEGIES)
    with pytest.raises(ValueError, match="one device; available: none.*--shard=i/k"):
        devices.strategy("mirrored", ())
    model = models.build("cifar_cnn", (32, 32, 3), 10, 2, seed=0)
    with pytest.raises(ValueError, match="batch normalisation.*--strategy=none"):
        devices.build(model, "mse", 0.1, tf.distribute.OneDeviceStrategy("CPU:0"))
