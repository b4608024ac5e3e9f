"""The OSGR experiment, small: its numbers, its resumption, its run directory, its command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tf_gsnr import data, experiments, metrics, models, progress
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.experiments.osgr import noise
from tf_gsnr.experiments.osgr import run as osgr
from tf_gsnr.records import RunDirectory, read_records

OSGR = experiments.load("osgr")

SMALL = dict(
    dataset="toy",
    n=[20, 30],
    p_random=[0.0, 0.5],
    width=[4],
    epochs=[0, 3],
    training_sets=3,
    learning_rate=0.01,
    test_size=100,
    batch_size=16,
)
REPOSITORY = Path(__file__).parents[2]


def bench(path, settings, traced=None):
    class Silent(progress.Progress):
        def advance(self, *args):
            pass

    source = data.load(settings.dataset)
    directory = RunDirectory(path, settings._asdict())
    directory.write_config({})
    return Workbench(source, directory, Silent(1), traced={} if traced is None else traced)


def test_against_plain_numpy_descent(tmp_path):
    """Both sides of (19) recomputed with explicit gradients of the two-layer network.

    By the training sets, and from the same weights by sets that the models have not seen.
    """
    settings = OSGR.settings(**SMALL, unseen=True)
    configuration = dict(n=30, p_random=0.5, width=4)
    records = list(osgr.run(configuration, settings, bench(tmp_path, settings)))
    assert [r["epoch"] for r in records] == [0, 3]

    source = data.load("toy")
    model = models.build("toy_mlp", (2,), 1, 4, seed=0)
    start = [w.astype(np.float64) for w in model.get_weights()]

    def stream(i):
        return np.random.default_rng([0, 30, 500_000, 4, i])

    def per_example(weights, x, y):
        w1, b1, w2, b2 = weights
        hidden = np.maximum(x @ w1 + b1, 0)
        error = hidden @ w2 + b2 - y
        dz = 2 * error * w2.T * (hidden > 0)
        gradients = [x[:, :, None] * dz[:, None], dz, hidden[:, :, None] * 2 * error[:, None]]
        return error[:, 0] ** 2, [*gradients, 2 * error]

    rng = stream(1)
    test_x, test_y = source.test(100, rng)
    test_y = data.randomise(test_y, 0.5, source, rng)

    def training_set(t, unseen=False):
        rng = stream(2 + t)
        x, y = (v[30:] for v in source.draw(30, rng, 30)) if unseen else source.draw(30, rng)
        return x, data.randomise(y, 0.5, source, rng)

    def step(weights, examples):
        return [w - 0.01 * g.mean(0) for w, g in zip(weights, per_example(weights, *examples)[1])]

    def descended(t, steps):
        weights = start
        for _ in range(steps):
            weights = step(weights, training_set(t))
        return weights

    for record in records:
        for kind, unseen in (("osgr", False), ("osgr_unseen", True)):
            train, test, noise, signal = [], [], [], []
            for t in range(3):
                examples = training_set(t, unseen)
                before = descended(t, record["epoch"])
                both = before, step(before, examples)
                train.append([per_example(w, *examples)[0].mean() for w in both])
                test.append([per_example(w, test_x, test_y)[0].mean() for w in both])
                gradients = per_example(before, *examples)[1]
                noise.append(sum(g.var(0).sum() for g in gradients) / 30)
                signal.append(sum((g.mean(0) ** 2).sum() for g in gradients))
            measured, predicted = metrics.osgr_measured(train, test), 1 - sum(noise) / sum(signal)
            assert record[f"{kind}_measured"] == pytest.approx(measured, rel=2e-3)
            assert record[f"{kind}_predicted"] == pytest.approx(predicted, rel=1e-4)
            if not unseen:
                assert record["train_loss"] == pytest.approx(np.mean(train, 0)[0], rel=1e-5)
        assert record["first_order_ratio"] == pytest.approx(1, abs=0.05) and record["small_step"]


def test_a_large_step_is_marked(tmp_path):
    settings = OSGR.settings(**SMALL | dict(learning_rate=3.0, epochs=[5]))
    (record,) = osgr.run(dict(n=20, p_random=0.0, width=4), settings, bench(tmp_path, settings))
    assert not record["small_step"]


def test_divergence_is_an_error_that_says_where(tmp_path):
    settings = OSGR.settings(**SMALL | dict(learning_rate=1e6, epochs=[50]))
    with pytest.raises(ValueError, match=r"epoch \d+ of training set \d \(n=20.*learning_rate"):
        list(osgr.run(dict(n=20, p_random=0.0, width=4), settings, bench(tmp_path, settings)))


def test_interrupted_in_the_middle_it_ends_with_the_same_records(tmp_path, monkeypatch):
    settings = OSGR.settings(**SMALL)
    configuration = dict(n=30, p_random=0.0, width=4)
    traced = {}
    whole = list(osgr.run(configuration, settings, bench(tmp_path / "whole", settings, traced)))
    monkeypatch.setattr(osgr, "CHECKPOINT_SECONDS", 0)

    class Killed(Exception):
        pass

    for after in (1, 2, 4):  # advances before the interruption
        path = tmp_path / f"killed{after}"
        work = bench(path, settings, traced)
        left = [after]

        def advance(*args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        work.progress.advance = advance
        with pytest.raises(Killed):
            list(osgr.run(configuration, settings, work))
        assert work.directory.load_checkpoint()
        again = list(osgr.run(configuration, settings, bench(path, settings, traced)))
        for a, b in zip(whole, again):
            assert a.keys() == b.keys()
            for name in a.keys() - {"seconds", "experiment", "dataset"}:
                assert a[name] == pytest.approx(b[name], rel=1e-6, nan_ok=True), name
        assert not work.directory.load_checkpoint()


def test_settings_are_the_papers_unless_given():
    chosen = OSGR.settings(dataset="mnist")
    assert chosen.training_sets == 10 and chosen.learning_rate == 0.001
    assert len(OSGR.configurations(chosen)) == 7 * 5 * 8 and chosen.epochs[-1] == 2500
    assert OSGR.settings(dataset="toy").training_sets == 100
    for bad in (dict(n=[1]), dict(p_random=[2.0]), dict(learning_rate=-1.0), dict(width=[0])):
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}="):
            OSGR.settings(dataset="toy", **bad)


def command(*flags, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "tf_gsnr.main", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        **kwargs,
    )


TINY = ["--dataset=toy", "--p_random=0", "--width=3", "--training_sets=2", "--test_size=50"]


def test_the_command_resumes_grows_and_refuses(tmp_path):
    flags = ["--flagfile", "flags/quickstart.flags", *TINY, f"--runs_dir={tmp_path}", "--name=a"]
    done = command(*flags, "--n=10", "--n=12,14", "--epochs=0,1")
    assert done.returncode == 0, done.stderr
    assert "Pearson" in done.stdout and "osgr.png" in done.stdout
    run = tmp_path / "a"
    records = read_records(run)
    assert [(r["n"], r["epoch"]) for r in records] == [(n, e) for n in (10, 12, 14) for e in (0, 1)]
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["training_sets"] == 2 and config["versions"]["keras"]
    assert set(json.loads((run / "summary.json").read_text())["pearson"]) == {"0", "1"}
    assert (run / "figures" / "osgr.png").stat().st_size > 10_000

    grown = command(*flags, "--n=10,12,14,16", "--epochs=0,1")
    assert grown.returncode == 0, grown.stderr
    assert read_records(run)[:6] == records and len(read_records(run)) == 8

    refused = command(*flags, "--n=10", "--epochs=0,1", "--learning_rate=0.5")
    assert refused.returncode == 1 and "learning_rate was 0.01 and is now 0.5" in refused.stderr
    assert "Traceback" not in refused.stderr and len(read_records(run)) == 8


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--experiment=ogsr"], "'ogsr' (did you mean 'osgr'?); available: osgr"),
        (["--n=many"], "'many' is not a comma separated list of int numbers"),
        (["--dataset=toy", "--shard=4/4"], "--shard=4/4: expected i/k"),
        (["--jit_compile=maybe"], "auto|true|false"),
        (["--steps=5"], "--steps: the experiment 'osgr' has no such setting; it has dataset, "),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, flags, message):
    wrong = command(f"--runs_dir={tmp_path}", *flags)
    assert wrong.returncode != 0 and message in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_killed_run_is_valid_and_goes_on(tmp_path):
    flags = [*TINY, "--n=20,30,40", "--epochs=0,2", f"--runs_dir={tmp_path}", "--name=k"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tf_gsnr.main", *flags], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    file = tmp_path / "k" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = read_records(tmp_path / "k")
    assert 1 <= len(before) <= 6
    assert command(*flags).returncode == 0
    after = read_records(tmp_path / "k")
    assert after[: len(before)] == before and len(after) == 6


def test_the_flagfiles_are_complete():
    from absl import flags
    from absl.testing import flagsaver

    import tf_gsnr.main

    for path in sorted((REPOSITORY / "flags").glob("*.flags")):
        text = path.read_text()
        assert f"python -m tf_gsnr.main --flagfile=flags/{path.name}" in text, path
        lines = [line for line in text.splitlines() if line.startswith("--")]
        names = [line[2:].split("=")[0] for line in lines]
        with flagsaver.flagsaver():
            tf_gsnr.main.parse_flags(["main.py", *lines])
            assert set(names) <= set(flags.FLAGS), path  # no earlier name
        assert f"--name={path.stem}" in lines, path


def test_the_figure_holds_up_with_missing_errors_and_one_point():
    record = dict(
        experiment="osgr",
        dataset="toy",
        n=10,
        p_random=0.0,
        width=3,
        epoch=0,
        training_sets=1,
        learning_rate=0.1,
        osgr_measured=0.5,
        osgr_measured_se=float("nan"),
        osgr_predicted=0.6,
        osgr_predicted_se=float("nan"),
        small_step=False,
    )
    assert len(OSGR.figure([record]).axes) == 1
    assert "0" in OSGR.summary([record])["pearson"]
    sides = ("measured", "measured_se", "predicted", "predicted_se")
    record |= {f"osgr_unseen_{side}": record[f"osgr_{side}"] for side in sides}
    assert len(OSGR.figure([record]).axes) == 2
    assert "have not seen" in OSGR.table([record])


def test_progress_tells_the_time_left():
    import io

    stream = io.StringIO()
    bar = progress.Progress(10, stream)
    bar.skip(5)
    bar.advance(2.5, "half")
    assert "75% done" in stream.getvalue() and "left" in stream.getvalue()


def test_what_points_on_a_line_would_show_given_their_errors():
    rng = np.random.default_rng(0)
    inside, medians, shown = 0, [], []
    for seed in range(100):
        true = rng.uniform(0.3, 0.9, 24)
        se_x, se_y = rng.uniform(0.02, 0.08, [2, 24])
        x, y = true + se_x * rng.normal(size=24), true + se_y * rng.normal(size=24)
        median, low, high = noise.on_a_line(x, se_x, se_y, seed)
        found = np.corrcoef(x, y)[0, 1]
        inside += low <= found <= high
        medians.append(median)
        shown.append(found)
    assert inside >= 88  # of 100, where 95% is meant
    assert abs(np.mean(medians) - np.mean(shown)) < 0.01
    unrelated = noise.on_a_line(rng.normal(size=24), np.zeros(24), np.zeros(24))
    assert unrelated == pytest.approx((1, 1, 1))
    assert np.isnan(noise.on_a_line([0.5, 0.6], [0.1, 0.1], [0.1, 0.1])[0])
    assert np.isnan(noise.interval(0.9, 3)[0]) and np.isnan(noise.interval(1.0, 24)[0])
