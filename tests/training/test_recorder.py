"""The run directory of a training: GSNRModel's rows, states, faults; and the short progress bar."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import tf_gsnr
from tf_gsnr import records
from tf_gsnr.status import training
from tf_gsnr.training import epochs
from tf_gsnr.training.bar import ProgressBar

RNG = np.random.default_rng(0)
X = RNG.normal(size=[96, 6]).astype("float32")
Y = X[:, :2] + 0.1 * RNG.normal(size=[96, 2]).astype("float32")


def network(name="net"):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "relu", name="hidden"), keras.layers.Dense(2, name="last")]
    return keras.Sequential([keras.Input([6]), *layers], name=name)


def fit(model, n_epochs=3, *callbacks, **options):
    keras.utils.set_random_seed(1)
    options = dict(batch_size=16, verbose=0, validation_data=(X[:32], Y[:32])) | options
    return model.fit(X, Y, epochs=n_epochs, callbacks=list(callbacks), **options).history


def recorded(run_dir, **options):
    model = tf_gsnr.GSNRModel(network(), run_dir=run_dir, **options)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def state_of(run_dir):
    return json.loads((run_dir / "state.json").read_text())["state"]


def test_a_row_an_epoch_says_what_history_says(tmp_path):
    run = tmp_path / "run"
    model = recorded(run, per_layer=True)
    history = fit(model)
    rows = records.read_records(run)
    assert [r["step"] for r in rows] == [6, 12, 18] and [r["epoch"] for r in rows] == [0, 1, 2]
    names = {"gsnr": "gsnr/mean", "osgr": "osgr_predicted", "gap_growth": "gap_predicted"}
    names |= {"noise_scale": "noise_scale", "same_sign": "same_sign/mean", "loss": "loss"}
    names |= {"gsnr_median": "gsnr/median", "val_loss": "test_loss"}
    names |= {f"gsnr/net/{layer}": f"gsnr/net/{layer}" for layer in ("hidden", "last")}
    for in_fit, there in names.items():
        found = [row.get(there, np.nan) for row in rows]
        np.testing.assert_allclose(found, history[in_fit], rtol=1e-6, err_msg=in_fit)
    for row in rows:
        assert row["batch_size"] == 16 and row["examples"] == 96 and row["parameters"] == 74
        assert row["gap_share/net/hidden"] + row["gap_share/net/last"] == pytest.approx(1)
        weights = np.array([56, 18]) / 74
        signs = [row[f"same_sign/net/{layer}"] for layer in ("hidden", "last")]
        assert row["same_sign/mean"] == pytest.approx(np.dot(weights, signs), abs=0.05)
        assert row["osgr_predicted_se"] > 0 and 0 < row["gsnr/least"] < row["gsnr/mean"]
    assert state_of(run) == "done" and (run / "page.html").exists()
    config = records.read_config(run)
    assert [layer["layer"] for layer in config["layers"]] == ["net/hidden", "net/last"]
    assert [layer["route"] for layer in config["layers"]] == ["dense", "dense"]
    assert not list(run.glob("*.partial*"))


def test_layers_are_recorded_and_not_logged(tmp_path):
    history = fit(recorded(tmp_path / "run"))
    assert not [name for name in history if name.startswith("gsnr/")]
    assert "gsnr/net/hidden" in records.read_records(tmp_path / "run")[0]


def test_trains_as_plain_keras_does(tmp_path):
    plain, measured = network(), recorded(tmp_path / "run")
    plain.compile(keras.optimizers.Adam(0.01), "mse")
    fit(plain), fit(measured)
    for a, b in zip(plain.get_weights(), measured.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_rows_within_a_long_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(epochs, "ROW_SECONDS", 0.0)
    monkeypatch.setattr(epochs, "ROW_SHARE", 0.0)
    fit(recorded(tmp_path / "run"), 2)
    rows = records.read_records(tmp_path / "run")
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["epoch"] for r in rows] == [0] * 6 + [1] * 6
    assert "loss" in rows[0] and "test_loss" not in rows[0]
    seconds = [r["seconds"] for r in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_same_model_trained_on_goes_on_in_its_records(tmp_path):
    run = tmp_path / "run"
    model = recorded(run)
    fit(model, 2)
    fit(model, 3, initial_epoch=2)
    assert [r["step"] for r in records.read_records(run)] == [6, 12, 18]
    model.save(tmp_path / "model.keras")
    loaded = tf_gsnr.GSNRModel(keras.saving.load_model(tmp_path / "model.keras"), run_dir=run)
    fit(loaded, 4, initial_epoch=3)
    assert [r["step"] for r in records.read_records(run)] == [6, 12, 18, 24]


def test_another_batch_size_is_said(tmp_path):
    run = tmp_path / "run"
    model = recorded(run)
    fit(model, 1)
    fit(model, 2, initial_epoch=1, batch_size=32)
    assert [r["step"] for r in records.read_records(run)] == [6, 9]
    assert (
        "From step 6 on with other settings: batch_size 32 instead of 16."
        in (run / "page.html").read_text()
    )
    model.save(tmp_path / "model.keras")
    loaded = tf_gsnr.GSNRModel(keras.saving.load_model(tmp_path / "model.keras"), run_dir=run)
    with pytest.raises(ValueError, match="batch_size was 16 and is now 48"):
        fit(loaded, 3, initial_epoch=2, batch_size=48)


def test_another_training_does_not_touch_what_is_there(tmp_path):
    run = tmp_path / "run"
    fit(recorded(run))
    before = (run / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match="begins at step 0: give another run_dir, or overwrite"):
        fit(recorded(run))
    with pytest.raises(ValueError, match="measure_every was 1 and is now 2"):
        fit(recorded(run, measure_every=2))
    assert (run / "records.jsonl").read_bytes() == before and state_of(run) == "done"
    fit(recorded(run, overwrite=True), 1)
    assert len(records.read_records(run)) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"class_name": "Functional"}')
    with pytest.raises(ValueError, match="holds no run of this program; choose another run_dir"):
        fit(recorded(tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "config.json").exists()


@pytest.mark.parametrize("by", ["GSNRModel", "GSNRCallback"])
def test_a_training_that_is_broken_off_says_so(tmp_path, by):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    run = tmp_path / "run"
    if by == "GSNRModel":
        model, more = recorded(run), []
    else:
        model, more = network(), [tf_gsnr.GSNRCallback(X, Y, run_dir=run)]
        model.compile("sgd", "mse")
    with pytest.raises(KeyboardInterrupt):
        fit(model, 3, *more, Stop())
    del model, more
    gc.collect()
    assert state_of(run) == "stopped"
    assert "stopped before its end" in (run / "page.html").read_text()


KILLED = """
import sys, keras, numpy as np, tf_gsnr
x = np.random.default_rng(0).normal(size=[64, 6]).astype("float32")
model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2)])
model.compile("sgd", "mse")
callback = tf_gsnr.GSNRCallback(x, x[:, :2], every_steps=1, run_dir=sys.argv[1])
model.fit(x, x[:, :2], batch_size=16, epochs=100000, verbose=0, callbacks=[callback])
"""


def test_a_killed_training_leaves_a_page_that_opens(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (run / "records.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state_of(run) == "running"  # it could not say
    assert training.read(run).state["state"] == "stopped"
    text = tf_gsnr.page(run).read_text()
    assert "stopped before its end" in text and '"refresh":null' in text


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    run, model = tmp_path / "run", recorded(tmp_path / "run")
    fit(model, 1)
    written = len(records.read_records(run))
    monkeypatch.setattr(records.RunDirectory, "append", full)
    with caplog.at_level("ERROR", logger="absl"):
        history = fit(model, 4, initial_epoch=1)
    assert len(history["gsnr"]) == 3
    said = [r.getMessage() for r in caplog.records if "nothing more is recorded" in r.getMessage()]
    assert len(said) == 1 and "No space left" in said[0]
    assert len(records.read_records(run)) == written > 0


def test_what_is_not_measured_is_named(tmp_path):
    @keras.saving.register_keras_serializable()
    class Own(keras.layers.Layer):
        """Uses a neighbour's kernel, so that what passes through either is not all of it."""

        def build(self, shape):
            self.scale = self.add_weight(shape=[1], name="scale")

        def call(self, x):
            return x * self.scale

    run, shared = tmp_path / "run", keras.layers.Dense(6, name="shared")
    inputs = keras.Input([6])
    tied = keras.layers.Lambda(lambda z: z @ shared.kernel, name="tied")
    model = keras.Model(inputs, keras.layers.Dense(2)(tied(Own()(shared(inputs)))), name="net")
    model = tf_gsnr.GSNRModel(model, run_dir=run)
    model.compile("sgd", "mse")
    fit(model, 1)
    table = training.layers(training.read(run))
    routes = {one["layer"]: one for one in table}
    kernel = [layer for path, layer in routes.items() if "shared" in path]
    assert kernel and not kernel[0]["measured"] and len(kernel[0]["route"]) > 20


def test_the_progress_bar_is_short(capsys):
    model = tf_gsnr.GSNRModel(network())
    model.compile("sgd", "mse")
    history = fit(model, 1, verbose=2)
    line = capsys.readouterr().out
    assert {"gsnr", "osgr"} <= set(re.findall(r"(\w+): ", line))
    assert not {"noise_scale", "gsnr_median", "same_sign"} & set(re.findall(r"(\w+): ", line))
    assert "noise_scale" in history
    model = tf_gsnr.GSNRModel(network(), progress=("noise_scale",), per_layer=True)
    model.compile("sgd", "mse")
    fit(model, 1, verbose=1)
    lines = capsys.readouterr().out
    assert "noise_scale" in lines and "osgr" not in lines and "hidden" not in lines
    own = keras.callbacks.ProgbarLogger()
    fit(model, 1, own, verbose=1)
    assert "osgr" in capsys.readouterr().out  # a user's own bar is left alone
    plain = network()
    plain.compile("sgd", "mse")
    fit(plain, 1, tf_gsnr.GSNRCallback(X, Y), ProgressBar(), verbose=2)
    line = capsys.readouterr().out
    assert "gsnr/mean" in line and "gsnr/noise_scale" not in line


def test_bad_names_for_the_bar_are_refused():
    for wrong in ("gsnr", ("loss",), ["accuracy"]):
        with pytest.raises(ValueError, match="progress="):
            tf_gsnr.GSNRModel(network(), progress=wrong)
        with pytest.raises(ValueError, match="numbers="):
            ProgressBar(wrong)
    with pytest.raises(ValueError, match="overwrite='yes'"):
        tf_gsnr.GSNRModel(network(), run_dir="x", overwrite="yes")


def test_what_is_continued_keeps_its_first_histogram_and_its_time(tmp_path):
    run = tmp_path / "run"
    model = recorded(run)
    fit(model, 1)
    seconds = records.read_config(run)["seconds"]
    assert seconds > 0
    model.save(tmp_path / "model.keras")
    first = json.loads((run / "histograms.json").read_text())["first"]
    loaded = tf_gsnr.GSNRModel(keras.saving.load_model(tmp_path / "model.keras"), run_dir=run)
    fit(loaded, 2, initial_epoch=1)
    histograms = json.loads((run / "histograms.json").read_text())
    assert histograms["first"] == first and histograms["last"]["step"] == 12
    assert records.read_config(run)["seconds"] > seconds


def test_a_directory_that_is_refused_is_refused_after_one_step(tmp_path):
    run, steps = tmp_path / "run", []
    fit(recorded(run))
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(batch)
    )
    with pytest.raises(ValueError, match="begins at step 0"):
        fit(recorded(run), 3, count)
    assert len(steps) <= 1
