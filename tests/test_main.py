"""The command line: what is listed, tried, refused and suggested, before anything is written."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

import tf_gsnr.main as program
from tf_gsnr import __main__ as door
from tf_gsnr import experiments, listing, progress
from tf_gsnr.experiments.framework import trial
from tf_gsnr.gradients import engines

ROOT = Path(__file__).parents[1]
TOY = ["--experiment=osgr", "--dataset=toy", "--width=4", "--training_sets=2"]
TOY += ["--at_epochs=0,2", "--test_size=50", "--p_random=0"]


def go(tmp_path, *flags, capsys=None):
    """Runs the program in this process; what it printed and its exit code."""
    argv = ["main.py", f"--runs_dir={tmp_path / 'runs'}", *flags]
    code = 0
    with flagsaver.flagsaver():
        try:
            program.main(program.parse_flags(argv))
        except SystemExit as error:
            code = error.code
    out = capsys.readouterr() if capsys else None
    return (out.out + out.err) if out else "", code


def test_a_dry_run_tells_and_writes_nothing(tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    both = [*TOY, "--name=x", "--n=20,30"]
    text, code = go(tmp_path, *both, "--dry_run", capsys=capsys)
    assert code == 0 and "n: 20, 30" in text and "0 configurations are complete, 2 are left" in text
    assert "for what is left" in text and "GiB" in text and "nothing was written" in text
    assert sorted(tmp_path.rglob("*")) == before
    go(tmp_path, *TOY, "--name=x", "--n=20", capsys=capsys)
    text, _ = go(tmp_path, *both, "--dry_run", capsys=capsys)
    assert "1 configurations are complete, 1 are left" in text
    go(tmp_path, *both, capsys=capsys)
    text, _ = go(tmp_path, *both, "--dry_run", capsys=capsys)
    assert "0 are left" in text and "for what is left" not in text


def test_a_dry_run_downloads_nothing_and_waits_for_nobody(tmp_path, capsys):
    flags = ["--experiment=osgr", "--dataset=mnist", f"--data_dir={tmp_path}", "--dry_run"]
    text, code = go(tmp_path, *flags, capsys=capsys)
    assert code == program.USAGE and "--dry_run downloads nothing" in text
    text, code = go(tmp_path, *TOY, "--n=20", "--dry_run", "--strategy=multi_worker", capsys=capsys)
    assert code == 0 and "on one device" in text
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("mnist/*"))


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_experiment_can_be_tried(experiment, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.2)
    from tf_gsnr import data

    small = {
        "osgr": dict(dataset="toy", n=[20], width=[4], training_sets=2, epochs=[0, 2]),
        "dynamics": dict(model=["logistic_regression"], n=40, epochs=2, batch_size=10),
        "jagged": dict(model="mlp", n=80, probe=20, width=4, epochs=2, batch_size=2, repeats=1),
        "freezing": dict(dataset="toy", n=20, repeats=1, test_size=40),
        "weights": dict(dataset="toy", n=20, width=4, epochs=6, every=2, term_every=2, repeats=1),
        "gap": dict(
            **dict(dataset="toy", model="toy_mlp", n=[20], batch_size=[0], width=4, epochs=4),
            **dict(folds=2, twins=2, repeats=1, test_size=40),
        ),
        "ranking": dict(
            **dict(model="toy_mlp", n=20, batch_size=[10], width=[4], epochs=3, most_steps=60),
            **dict(
                learning_rate=[0.1], p_random=[0.5], repeats=1, early_loss=1e-3, final_loss=1e-4
            ),
        ),
    }[experiment]
    module = experiments.load(experiment)
    settings = module.settings(**small)
    source = classes() if experiment in ("dynamics", "jagged") else data.load("toy")
    told = trial.estimate(module, settings, module.configurations(settings), source)
    assert 0 < told.seconds < 6000 and told.start >= 0 and told.peak > 1e7


def classes():
    import numpy as np

    from tf_gsnr import data

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[80, 4, 4, 1]), rng.integers(0, 3, 80)
    return data.from_arrays((x, y), (x, y), classes=3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--experiment=dynamics", "--dataset=toy"], "dynamics needs classes"),
        (["--experiment=ogsr"], "did you mean 'osgr'"),
        ([*TOY, "--engine=layerwize"], "did you mean 'layerwise'"),
        ([*TOY, "--model=toy_mpl"], "did you mean 'toy_mlp'"),
        ([*TOY, "--dataset=mnits"], "did you mean 'mnist'"),
        ([*TOY, "--shard=3/2"], "--shard=3/2"),
        ([*TOY, "--model=mnist_cnn"], "--model=mnist_cnn: cannot be built"),
        (["--experiment=weights", "--dataset=toy", "--model=logistic_regression"], "two at least"),
        ([*TOY, "--widht=3"], "Did you mean: width"),
        ([*TOY, "--runs_dri=x"], "Did you mean: runs_dir"),
        ([*TOY, "--jit_compile=ture"], "jit_compile"),
        ([*TOY, "stray"], "unexpected arguments"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(tmp_path, capsys, flags, message):
    text, code = go(tmp_path, *flags, "--name=x", capsys=capsys)
    assert code == program.USAGE and message in text and "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_the_list_knows_what_is_there(tmp_path, capsys):
    go(tmp_path, *TOY, "--name=x", "--n=20,30", capsys=capsys)
    (tmp_path / "flags").mkdir()
    (tmp_path / "flags" / "mine.flags").write_text("# What I do.\n--experiment=osgr\n")
    text = listing.text(tmp_path / "runs", tmp_path / "flags")
    assert "osgr" in text and "Does the GSNR predict" in text
    assert "What I do." in text and "osgr, 2 of 2 configurations" in text
    assert "none" in listing.text(tmp_path / "nowhere", tmp_path / "nowhere")
    printed, _ = go(tmp_path, "--list", capsys=capsys)
    assert "osgr, 2 of 2 configurations" in printed


def test_the_front_door(capsys, tmp_path):
    door.main([])
    assert "python -m tf_gsnr COMMAND" in capsys.readouterr().out
    for argv, code, message in (
        (["lits"], 2, "did you mean 'list'"),
        (["page"], 2, "expected the run_dir"),
        (["page", str(tmp_path)], 1, "no training was recorded there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            door.main(argv)
        assert stopped.value.code == code and message in capsys.readouterr().err
    door.main(["list", str(tmp_path)])
    assert "experiments" in capsys.readouterr().out
    code = "import sys; from tf_gsnr.__main__ import main; main(['list']); "
    code += "sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    command = [sys.executable, "-m", "tf_gsnr", "report", "--otput=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean: output" in done.stderr


def test_the_time_left_is_not_ten_times_too_long_at_first(monkeypatch):
    """Ten pieces of a second each, after twenty seconds of tracing with the first."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = progress.Progress(10, stream)
    bar.advance(0, "starting")
    for k in range(10):
        now[0] += 21 if k == 0 else 1
        bar.advance(1, "working")
    lines = stream.getvalue().splitlines()
    assert "not known yet" in lines[0]
    first = next(line for line in lines if "about" in line)
    assert "20% done" in first and "about 0:08 left" in first


def test_suggestions_are_of_what_there_is():
    with pytest.raises(ValueError, match="unknown engine 'vectorised' .did you mean 'vectorized'"):
        engines.check_name("vectorised")
