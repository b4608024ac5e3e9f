"""A run once more from its config.json, what is said to differ, and what is not run unasked."""

import json
import subprocess
import sys

import pytest
from absl.testing import flagsaver

import tf_gsnr.main as program
from tf_gsnr import records, replay

TOY = ["--experiment=osgr", "--dataset=toy", "--width=4", "--training_sets=2", "--p_random=0,0.3"]
TOY += ["--at_epochs=0,2", "--test_size=50", "--learning_rate=0.03", "--unseen", "--seed=3"]


def go(tmp_path, *flags):
    argv = ["main.py", f"--runs_dir={tmp_path}", *flags]
    with flagsaver.flagsaver():
        try:
            program.main(program.parse_flags(argv))
        except SystemExit as error:
            return error.code
    return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay")
    assert go(path, *TOY, "--name=x", "--n=20,30", "--engine=vectorized") == 0
    return path / "x"


def test_a_replay_has_the_same_records(run, capsys):
    assert go(run.parent, f"--replay={run}") == 0
    assert "4 records: every number is the same" in capsys.readouterr().out.replace("8 ", "4 ")
    again = run.parent / "x-replay"
    assert records.read_config(again)["settings"] == records.read_config(run)["settings"]
    assert records.read_config(again)["engine"] == "vectorized"
    found = json.loads((again / "replay.json").read_text())
    assert found["numbers"] == {} and found["only_there"] == found["only_here"] == 0


def test_it_says_what_differs(run, capsys):
    beside = ["--name=other", "--engine=layerwise", "--n=20"]
    assert go(run.parent, f"--replay={run}", *beside) == 0
    out = capsys.readouterr().out
    assert "n: [20, 30] there, [20] here" in out and "engine: vectorized there" in out
    assert "4 records are only there" in out
    found = replay.differences(run, run.parent / "other")
    assert all(apart < 1e-3 for apart in found["numbers"].values())  # engines: up to rounding


def test_a_configuration_more_changes_no_other(run):
    assert go(run.parent, f"--replay={run}", "--name=more", "--n=20,25,30", "--width=3,4") == 0
    found = replay.differences(run, run.parent / "more")
    assert found["records"] == 8 and not found["numbers"] and found["only_here"] == 16


def test_a_changed_number_is_found(run, tmp_path):
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    lines = (copy / "records.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["osgr_measured"] *= 1.5
    del row["train_loss_before" if "train_loss_before" in row else "osgr_predicted"]
    (copy / "records.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    found = replay.differences(run, copy)
    assert found["numbers"]["osgr_measured"] == pytest.approx(1 / 3)
    assert len(found["numbers"]) == 2 and max(found["numbers"].values()) == float("inf")
    assert "2 numbers differ" in replay.text(found)


@pytest.mark.parametrize(
    "setting, value", [("experiment", "evil"), ("model", "evil:net"), ("dataset", "evil:data")]
)
def test_code_that_a_run_names_is_not_imported_unasked(
    run, tmp_path, monkeypatch, capsys, setting, value
):
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["settings"][setting] = value
    (copy / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert go(tmp_path, f"--replay={copy}") == program.USAGE
    assert f"unless it is named: add --{setting}={value}" in capsys.readouterr().err
    with pytest.raises(SystemError, match="it was imported"):
        go(tmp_path, f"--replay={copy}", f"--{setting}={value}")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": {}}'])
def test_what_is_no_run_is_refused(tmp_path, capsys, content):
    (tmp_path / "x").mkdir()
    if content is not None:
        (tmp_path / "x" / "config.json").write_text(content)
    assert go(tmp_path, f"--replay={tmp_path / 'x'}") == program.USAGE
    assert "no run of an experiment can be read there" in capsys.readouterr().err


@pytest.mark.slow
def test_deterministic_operations_do(tmp_path):
    line = [sys.executable, "-m", "tf_gsnr.main", f"--runs_dir={tmp_path}", "--deterministic"]
    for more in ([*TOY, "--n=20", "--name=d"], [f"--replay={tmp_path / 'd'}"]):
        done = subprocess.run([*line, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "every number is the same" in done.stdout
    assert records.read_config(tmp_path / "d")["flags"]["deterministic"] is True
