"""Faults, damage, and two at once: what a run survives, and what it says."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest

from tf_gsnr import ending, progress, records
from tf_gsnr.records import RunDirectory
from tf_gsnr.report import __main__ as report
from tf_gsnr.report import runs

TOY = ["--experiment=osgr", "--dataset=toy", "--width=4", "--training_sets=2", "--p_random=0"]
TOY += ["--at_epochs=0,2", "--test_size=50", "--name=x"]


def command(tmp_path, *flags, **options):
    line = [sys.executable, "-m", "tf_gsnr.main", f"--runs_dir={tmp_path}", *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


HOLD = """
import sys, time
from tf_gsnr.records import RunDirectory
directory = RunDirectory(sys.argv[1], {"a": 1})
directory.write_config({})
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-c", HOLD, str(run), "60"]
    first = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"process {first.pid} on .* is writing there"):
            RunDirectory(run, {"a": 1}, overwrite=overwrite)
    assert (run / "config.json").exists()
    first.kill()
    first.wait()
    again = RunDirectory(run, {"a": 1})  # a dead process holds nothing
    RunDirectory(run, {"a": 1})  # and this one knows of itself
    again.release()


def test_a_directory_stopped_in_its_making_can_be_used(tmp_path):
    for k, names in enumerate([["lock"], ["config.json.77.partial"], ["figures/"], []]):
        run = tmp_path / str(k)
        run.mkdir()
        for name in names:
            (run / name).mkdir() if name.endswith("/") else (run / name).write_text("{")
        RunDirectory(run, {"a": 1}).write_config({})
        assert records.read_config(run)["settings"] == {"a": 1}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="holds no run of this program"):
        RunDirectory(other, {"a": 1}, overwrite=True)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]  # not even a lock


@pytest.mark.parametrize(
    "line",
    [b'{"a": 1', b"[1, 2]", b'{"a": [1]}', b'{"a": {"b": 1}}', b"\xff\xfe", b"\0\0\0", b"", b"3"],
)
def test_a_damaged_record_is_named(tmp_path, line):
    run = RunDirectory(tmp_path / "run", {})
    run.append({"a": 1})
    with open(run.path / "records.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2 is damaged"):
        records.read_records(run.path)


def test_a_bad_run_is_left_out_of_the_report_and_the_rest_is_shown(tmp_path, capsys):
    for name in ("good", "bad"):
        done = command(tmp_path / "runs", *TOY[:-1], f"--name={name}", "--n=20")
        assert done.returncode == 0, done.stderr
    with open(tmp_path / "runs" / "bad" / "records.jsonl", "a") as file:
        file.write("{}}\n")
    report.write([tmp_path / "runs"])
    assert "bad/records.jsonl, line 3 is damaged" in capsys.readouterr().err
    assert [run.name for run in runs.find([tmp_path / "runs"])] == ["good"]
    twice = tmp_path / "runs" / "good" / "records.jsonl"
    twice.write_text(twice.read_text() + twice.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="line 3 is of the same configuration and epoch as line 1"):
        runs.read(tmp_path / "runs" / "good")


def test_what_a_run_directory_names_is_not_imported(tmp_path, capsys):
    done = command(tmp_path / "runs", *TOY, "--n=20")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs" / "x" / "config.json"
    config = json.loads(file.read_text())
    config["settings"]["experiment"] = "runs.x.evil"
    file.write_text(json.dumps(config))
    (tmp_path / "runs" / "x" / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    line = [sys.executable, "-m", "tf_gsnr.report", "runs"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "is not imported unless it is named" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_divergence_ends_a_configuration_and_not_the_grid(tmp_path):
    diverging = [*TOY, "--n=20,30", "--learning_rate=1e6", "--at_epochs=50"]
    for _ in range(2):  # the same command again does not try them again
        begun = time.monotonic()
        done = command(tmp_path, *diverging)
        assert done.returncode == 3, done.stderr
        assert "2 of 2 configurations diverged" in done.stderr
    assert "elapsed" not in done.stderr or time.monotonic() - begun < 60
    noted = records.read_diverged(tmp_path / "x")
    assert [d["configuration"]["n"] for d in noted] == [20, 30]
    assert all("of training set" in d["why"] for d in noted)
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert len(summary["diverged"]) == 2
    stopped = command(tmp_path, *diverging, "--on_divergence=stop", "--overwrite")
    assert stopped.returncode == 1 and "diverged" in stopped.stderr
    assert not records.read_diverged(tmp_path / "x")


@pytest.mark.parametrize("name", ["../x", "/abs", ".", "..", "a/b"])
def test_names_stay_inside_the_runs(tmp_path, name):
    done = command(tmp_path / "runs", *TOY[:-1], f"--name={name}", "--n=20")
    assert (
        done.returncode == 2 and f"--name={name!r}: expected the name of a directory" in done.stderr
    )
    assert not (tmp_path / "runs").exists()


def test_errors_of_the_system_are_a_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    done = command(file, *TOY, "--n=20")
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert "--runs_dir" in done.stderr and str(file) in done.stderr


@pytest.mark.parametrize("by", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_end_as_ctrl_c_does(tmp_path, by):
    flags = [*TOY, "--n=200,300,400", "--at_epochs=0,40000", "--width=40", "--training_sets=9"]
    line = [sys.executable, "-m", "tf_gsnr.main", f"--runs_dir={tmp_path}", *flags]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while "starting" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(getattr(signal, by))
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "the same command goes on from here" in told
    assert "Traceback" not in told
    assert records.read_config(tmp_path / "x")["seconds"] > 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_is_heeded():
    """And no traceback is shown of it."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    bar = progress.Progress(1.0, io.StringIO())
    with pytest.raises(KeyboardInterrupt), ending.signals():
        one = Finalised()
        del one  # what its finaliser raises is dropped
        bar.advance(0.1, "it goes on")
    bar.advance(0.1, "and after that as ever")


def test_a_checkpoint_that_is_further_than_the_records(tmp_path, capsys):
    """The last record is lost: the configuration begins anew, and measures it once more."""
    directory = RunDirectory(tmp_path / "run", {})
    directory.write_config({})
    directory.append({"epoch": 0})
    directory.append({"epoch": 1})
    directory.save_checkpoint({"epoch": 1})
    assert directory.load_checkpoint() == {"epoch": 1}
    file = tmp_path / "run" / "records.jsonl"
    file.write_bytes(file.read_bytes()[: len('{"epoch": 0}') + 1])
    assert directory.load_checkpoint() == {}
    assert "further than the records" in capsys.readouterr().err
