"""GSNRCallback, its schedules, run directory and TensorBoard files."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import metrics, records
from tf_gsnr.training import rows, schedule, tensorboard

RNG = np.random.default_rng(0)
X = RNG.normal(size=[64, 5]).astype("float32")
LABELS = RNG.integers(0, 3, 64)
X_TEST, LABELS_TEST = RNG.normal(size=[32, 5]).astype("float32"), RNG.integers(0, 3, 32)


def classifier(optimizer=None):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(8, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential([keras.Input([5]), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1, 0.9), loss)
    return model


def fit(model, *callbacks, **kwargs):
    data = dict(epochs=3, batch_size=16, verbose=0) | kwargs
    return model.fit(X, LABELS, callbacks=list(callbacks), **data).history


def test_touches_nothing():
    plain, measured = classifier(), classifier()
    keras.utils.set_random_seed(3)
    fit(plain)
    keras.utils.set_random_seed(3)
    fit(measured, tf_gsnr.GSNRCallback(X, LABELS, test_data=(X_TEST, LABELS_TEST)))
    for a, b in zip(plain.variables, measured.variables):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(plain.optimizer.variables, measured.optimizer.variables):
        np.testing.assert_array_equal(a, b)


def test_logs_are_the_moments_of_the_probe_set(tmp_path):
    model = classifier()
    log = tmp_path / "log.csv"
    callback = tf_gsnr.GSNRCallback(X, LABELS, every_epochs=2, per_layer=True)
    history = fit(model, callback, keras.callbacks.CSVLogger(log), epochs=4)
    moments = tf_gsnr.gradient_moments(model, X, LABELS, sign_counts=True)
    record = tf_gsnr.summarize(moments, model)
    plain = history["gsnr_plain/mean"]
    assert math.isnan(plain[0]) and plain[1] == plain[2] > 0  # the last number stays
    names = {"same_sign/mean": "gsnr/same_sign", "noise_scale": "gsnr/noise_scale"}
    names |= {"osgr_predicted": "gsnr/osgr_predicted", "gsnr_plain/mean": "gsnr_plain/mean"}
    names |= {f"gsnr/{k}": f"gsnr/{k}" for k in ("mean", "median", "p95")}
    shares = [k for k in record if k.startswith("gap_share/")]
    names |= {k: f"gsnr/{k}" for k in shares}
    for name, logged in names.items():
        np.testing.assert_allclose(history[logged][-1], record[name], err_msg=name)
    of_layers = rows.of_moments(moments, model, 64)
    layers = [share.partition("/")[2] for share in shares]
    assert len(layers) == 3
    for layer in layers:
        np.testing.assert_allclose(history[f"gsnr/{layer}"][-1], of_layers[f"gsnr/{layer}"])
    assert not {"gsnr/count", "gsnr/parameters", "gsnr/least"} & set(history)
    assert "gsnr/mean" in log.read_text().splitlines()[0].split(",")
    np.testing.assert_array_equal(callback.moments.mean[0], moments.mean[0])
    assert callback.history["step"].tolist() == [8, 16]


def test_rows_of_layers_are_those_of_their_own_moments():
    model = classifier()
    moments = tf_gsnr.gradient_moments(model, X, LABELS, sign_counts=True)
    row = rows.of_moments(moments, model, 64)
    for i, layer in enumerate(metrics.by_layer([v.path for v in model.trainable_variables])):
        part = metrics.part_of(moments, [2 * i, 2 * i + 1])
        agree = np.concatenate([v.ravel() for v in tf_gsnr.same_sign(part)])
        np.testing.assert_allclose(row[f"same_sign/{layer}"], np.nanmean(agree))
        assert row[f"dead/{layer}"] == sum((v == 0).sum() for v in part.m2)
    assert sum(row[k] for k in row if k.startswith("dead/")) == row["dead"]


def test_run_directory(tmp_path):
    run = tmp_path / "run"
    callback = tf_gsnr.GSNRCallback(X, LABELS, every_steps=2, run_dir=run, keep="gsnr")
    fit(classifier(), callback)
    found = records.read_records(run)
    assert [r["step"] for r in found] == [0, 2, 4, 6, 8, 10, 12]  # the last step too
    assert [r["epoch"] for r in found] == [0, 0, 1, 1, 2, 2, 2]
    assert all(r["gsnr_plain/mean"] > 0 and r["count"] == 64 and r["loss"] > 0 for r in found)
    assert all(r["learning_rate"] == found[0]["learning_rate"] > 0 for r in found)
    assert records.read_config(run)["settings"]["cadence"] == "every 2 steps"
    table = tf_gsnr.read(run, frame=False)
    assert table["step"].tolist() == callback.history["step"].tolist()
    kept = sorted((run / "gsnr").glob("*.npz"))
    assert len(kept) == len(found)
    with np.load(kept[-1]) as last:
        assert [last[k].shape for k in last] == [v.shape for v in classifier().trainable_variables]
    with pytest.raises(ValueError, match="other settings.*overwrite=True"):
        fit(classifier(), tf_gsnr.GSNRCallback(X, LABELS, run_dir=run))
    with pytest.raises(ValueError, match="up to step 12, and this one begins at step 0"):
        fit(classifier(), tf_gsnr.GSNRCallback(X, LABELS, every_steps=2, run_dir=run))
    fit(classifier(), tf_gsnr.GSNRCallback(X, LABELS, run_dir=run, overwrite=True))
    assert [r["step"] for r in records.read_records(run)] == [0, 4, 8, 12]


def test_a_training_that_goes_on_continues_its_records(tmp_path):
    run, saved = tmp_path / "run", tmp_path / "model.keras"
    options = dict(every_steps=2, test_data=(X_TEST, LABELS_TEST), run_dir=run)
    model = classifier()
    fit(model, tf_gsnr.GSNRCallback(X, LABELS, **options), epochs=2)
    model.save(saved)
    fit(model, tf_gsnr.GSNRCallback(X, LABELS, **options), epochs=1)  # which is then killed
    before = records.read_records(run)
    assert [r["step"] for r in before] == [0, 2, 4, 6, 8, 10, 12]
    again = keras.saving.load_model(saved)
    fit(again, tf_gsnr.GSNRCallback(X, LABELS, **options), epochs=1)
    after = records.read_records(run)
    assert [r["step"] for r in after] == [r["step"] for r in before]
    assert after[:5] == before[:5]
    for a, b in zip(after, before):
        np.testing.assert_allclose(a["gap"], a["test_loss"] - a["loss"] - _gap_of(after[0]))
        np.testing.assert_allclose(a["gap"], b["gap"], rtol=0.3, atol=0.02)
    seconds = [r["seconds"] for r in after]
    assert seconds == sorted(seconds)


def _gap_of(row):
    return row["test_loss"] - row["loss"]


class Gaps(keras.callbacks.Callback):
    """The real gap where training begins and after each step; what the logs say there."""

    def __init__(self):
        super().__init__()
        self.gaps, self.losses, self.rows = [], [], []

    def on_train_begin(self, logs=None):
        self.on_train_batch_end(0)

    def on_train_batch_end(self, batch, logs=None):
        data = ((X, LABELS), (X_TEST, LABELS_TEST))
        probe, test = (float(self.model.loss(y, self.model(x, training=False))) for x, y in data)
        self.losses.append((probe, test))
        self.gaps.append(test - probe)
        self.rows.append(dict(logs or {}))


def without_noise(model):
    for layer in model.layers:
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    model.layers[2].rate = 0.0
    return model


def test_osgr_and_gap_of_the_real_step():
    # Full-batch descent by small steps: the probe is the training set, (24) is about just this.
    model, real = without_noise(classifier(keras.optimizers.SGD(1e-3))), Gaps()
    test = (X_TEST, LABELS_TEST)
    callback = tf_gsnr.GSNRCallback(X, LABELS, every_steps=1, test_data=test)
    history = fit(model, callback, real, batch_size=64, epochs=4)
    table = callback.history
    np.testing.assert_allclose(table["gap"], np.array(real.gaps[:4]) - real.gaps[0], atol=1e-5)
    moments = tf_gsnr.gradient_moments(model, X, LABELS)
    growth = 1e-3 * sum(v.sum() for v in moments.variance(1)) / 64
    np.testing.assert_allclose(table["gap_predicted"], growth * np.arange(4), rtol=0.05)
    measured = history["gsnr/osgr_measured"]
    assert np.isfinite(measured).all() and not np.max(history["gsnr/osgr_predicted"]) > 1
    losses = np.array(real.losses)
    drops = losses[:-1] - losses[1:]
    np.testing.assert_allclose(measured, drops[:, 1] / drops[:, 0], rtol=0.02)
    assert (table["osgr_measured_se"] > 0).all()


def test_both_gaps_are_of_the_same_moment_and_begin_at_zero(tmp_path):
    test, real, run = (X_TEST, LABELS_TEST), Gaps(), tmp_path / "run"
    model = without_noise(classifier(keras.optimizers.SGD(0.05)))
    callback = tf_gsnr.GSNRCallback(X, LABELS, every_steps=3, test_data=test, run_dir=run)
    history = fit(model, callback, real, epochs=2)
    measured = records.read_records(run)
    assert [r["step"] for r in measured] == [0, 3, 6, 8]
    growth = 0.0
    for record, after in zip(measured, [*measured[1:], None]):
        for name in ("gap", "gap_predicted"):
            np.testing.assert_allclose(callback.history[name][measured.index(record)], record[name])
        step = record["step"]
        np.testing.assert_allclose(record["gap"], real.gaps[step] - real.gaps[0], atol=1e-5)
        np.testing.assert_allclose(record["gap_predicted"], growth)
        if after is not None:  # the step that was looked at, and those after it as it
            assert real.rows[step + 1]["gsnr/gap"] == pytest.approx(record["gap"])
            growth += record["step_gap_growth_predicted"] * (after["step"] - step)
    assert history["gsnr/gap"][-1] == pytest.approx(measured[-2]["gap"])

    # At the end of an epoch both are of its end.
    real = Gaps()
    callback = tf_gsnr.GSNRCallback(X, LABELS, every_epochs=2, test_data=test)
    history = fit(model, callback, real, epochs=4)
    np.testing.assert_allclose(history["gsnr/gap"][1], real.gaps[8] - real.gaps[0], atol=1e-5)
    np.testing.assert_allclose(history["gsnr/gap"][3], real.gaps[16] - real.gaps[0], atol=1e-5)
    predicted = history["gsnr/gap_predicted"]
    assert predicted[0] == 0 < predicted[1] == predicted[2] < predicted[3]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(every_epochs=2, per_layer=True),
        dict(every_epochs=2, test_data=(X_TEST, LABELS_TEST)),
        dict(schedule=schedule.linear(2, start=5), test_data=(X_TEST, LABELS_TEST)),
        dict(every_steps=100, per_layer=True, sign_counts=False),
    ],
)
def test_columns_are_the_same_in_every_epoch(options, tmp_path):
    log, seen = tmp_path / "log.csv", []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(list(logs)),
        on_epoch_end=lambda epoch, logs: seen.append(list(logs)),
    )
    callback = tf_gsnr.GSNRCallback(X, LABELS, **options)
    history = fit(classifier(), callback, note, keras.callbacks.CSVLogger(log), epochs=4)
    assert all(names == seen[0] for names in seen)
    assert {len(values) for values in history.values()} == {4}
    columns = log.read_text().splitlines()[0].split(",")  # Keras adds a val_ for each
    assert {c for c in columns if not c.startswith("val_")} == {"epoch", *history}
    assert not np.isinf([v for values in history.values() for v in values]).any()


def test_says_once_an_epoch_why_there_is_no_number(caplog):
    """Labels at random: nothing to learn."""
    callback = tf_gsnr.GSNRCallback(X[:9], LABELS[:9], every_steps=1, per_layer=True)
    with caplog.at_level("WARNING", logger="absl"):
        history = fit(classifier(keras.optimizers.SGD(0.0)), callback, epochs=2)
    assert np.isnan(history["gsnr/osgr_predicted"]).all() and history["gsnr_plain/mean"][0] > 0
    lines = [r.getMessage() for r in caplog.records if "gsnr/osgr_predicted" in r.getMessage()]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert "the signal cannot be told from zero with 9 examples" in lines[0]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    board = keras.callbacks.TensorBoard(tmp_path / "keras")
    test = (X_TEST, LABELS_TEST)
    callback = tf_gsnr.GSNRCallback(X, LABELS, log_dir=tmp_path / "own", test_data=test)
    fit(classifier(), callback, board, epochs=2)
    assert "epoch_gsnr/mean" in tags(tmp_path / "keras" / "train")
    own = tags(tmp_path / "own")
    kernels = [v.path for v in classifier().trainable_variables]
    charts = [tags for category in tensorboard.CHARTS.values() for tags in category.values()]
    assert {tag for tags in charts for tag in tags} <= own
    assert "custom_scalars__config__" in own and not {"count", "parameters", "step"} & own
    assert sum(name.startswith("gsnr_log10/") for name in own) == len(kernels)


def tags(directory):
    return {
        value.tag
        for file in directory.glob("events*")
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }


def test_steps_per_execution_and_schedules():
    callback = tf_gsnr.GSNRCallback(X, LABELS, schedule=schedule.listed([4]))
    model = classifier()
    model.compile("sgd", model.loss, steps_per_execution=2)
    history = fit(model, callback, epochs=2)
    assert math.isnan(history["gsnr_plain/mean"][0]) and history["gsnr_plain/mean"][1] > 0
    assert callback.step == 8 and callback.history["step"].tolist() == [4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(every_epochs=0), "every_epochs=0"),
        (dict(every_steps=-1), "every_steps=-1"),
        (dict(every_steps=1, every_epochs=1), "expected one of every_epochs"),
        (dict(schedule=3), "schedule=3"),
        (dict(engine="fast"), "unknown engine"),
        (dict(test_data=X), "expected a pair"),
        (dict(keep="all", run_dir="r"), "keep='all'"),
        (dict(keep="gsnr"), "needs run_dir"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tf_gsnr.GSNRCallback(X, LABELS, **arguments)
    with pytest.raises(TypeError, match="step"):
        tf_gsnr.GSNRCallback(X, LABELS, step=1)


def test_refuses_a_probe_set_that_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \(5,\), as model .* takes"):
        fit(classifier(), tf_gsnr.GSNRCallback(X[:, :4], LABELS))
    with pytest.raises(ValueError, match="number of examples"):
        fit(classifier(), tf_gsnr.GSNRCallback(X, LABELS[:3]))
    with pytest.raises(ValueError, match="label of example"):
        fit(classifier(), tf_gsnr.GSNRCallback(X, LABELS + 2))
    wrong = np.array(X)
    wrong[40] = np.nan  # beyond the first micro-batch
    with pytest.raises(ValueError, match="is not finite"):
        fit(classifier(), tf_gsnr.GSNRCallback(wrong, LABELS, batch_size=16))


def test_schedules_refuse():
    for make in (schedule.linear, schedule.logarithmic):
        with pytest.raises(ValueError, match="positive integer"):
            make(0)
    with pytest.raises(ValueError, match="integers from 0"):
        schedule.listed([-1])


def test_a_training_that_diverges_goes_on_as_it_would_have(caplog, tmp_path):
    model = classifier(keras.optimizers.SGD(1e30))
    callback = tf_gsnr.GSNRCallback(
        X, LABELS, test_data=(X_TEST, LABELS_TEST), run_dir=tmp_path / "run"
    )
    with caplog.at_level("WARNING", logger="absl"):
        history = fit(model, callback)
    assert len(history["loss"]) == 3 and math.isnan(history["gsnr/mean"][-1])
    assert any("not finite" in r.getMessage() for r in caplog.records)
    assert [r["step"] for r in records.read_records(tmp_path / "run")] == [0]
    assert (tmp_path / "run" / "page.html").exists()


@pytest.mark.parametrize("rate", [1e6, 1e18])  # the weights after the first epoch are finite
def test_a_training_that_diverges_in_its_first_epoch_goes_on(rate):
    def trained(*callbacks):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(rate), "mse")
        callbacks = [*callbacks, keras.callbacks.TerminateOnNaN()]
        history = model.fit(X, X[:, :3], 8, epochs=3, verbose=0, callbacks=callbacks)
        return history.history["loss"]

    assert trained() == trained(tf_gsnr.GSNRCallback(X, X[:, :3]))


def test_a_model_that_fit_builds_is_measured_as_soon_as_it_is_built():
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = tf_gsnr.GSNRCallback(X, LABELS, every_steps=5)
    fit(model, callback)
    assert callback.history["step"].tolist() == [1, 5, 10]


def test_a_run_directory_with_data_sets(tmp_path):
    def batches(*data):
        return tf.data.Dataset.from_tensor_slices(data).batch(16)

    train, test = batches(X, LABELS), batches(X_TEST, LABELS_TEST)
    callback = tf_gsnr.GSNRCallback(train, test_data=test, run_dir=tmp_path / "run")
    model = classifier()
    model.fit(train, epochs=2, verbose=0, callbacks=[callback])
    arrays = tf_gsnr.GSNRCallback(X, LABELS, test_data=(X_TEST, LABELS_TEST))
    again = classifier()
    again.fit(train, epochs=2, verbose=0, callbacks=[arrays])
    rows = records.read_records(tmp_path / "run")
    assert [r["step"] for r in rows] == [0, 4, 8]
    for name in ("gsnr_plain/mean", "loss", "gap", "osgr_measured"):
        np.testing.assert_allclose(
            [r.get(name, np.nan) for r in rows], arrays.history[name], rtol=1e-4, atol=1e-6
        )
