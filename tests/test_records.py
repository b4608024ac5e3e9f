"""A run directory survives being killed, and is never overwritten without being asked."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tf_gsnr.records import RunDirectory, read_records


def test_records_come_back(tmp_path):
    run = RunDirectory(tmp_path / "run", {"n": [1, 2]})
    run.append({"a": np.float32(1.5), "b": np.int64(2), "c": float("nan"), "d": True, "e": "x"})
    run.append({"a": math.inf})
    first, second = read_records(run.path)
    assert first["a"] == 1.5 and first["b"] == 2 and first["d"] is True and first["e"] == "x"
    assert math.isnan(first["c"]) and math.isnan(second["a"])
    for line in (run.path / "records.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # valid JSON: no bare NaN


def test_a_half_written_record_is_cut_off(tmp_path):
    run = RunDirectory(tmp_path, {})
    run.write_config({})
    run.append({"a": 1})
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"a": 2, "b"')
    assert read_records(tmp_path) == [{"a": 1}]
    again = RunDirectory(tmp_path, {})
    again.append({"a": 3})
    assert again.records() == [{"a": 1}, {"a": 3}]


def test_other_settings_are_refused(tmp_path):
    run = RunDirectory(tmp_path / "run", {"rate": 0.3, "n": [1]})
    run.write_config({})  # and stopped before it measured anything: no reason to refuse
    run = RunDirectory(tmp_path / "run", {"rate": 0.1, "n": [1]})
    run.write_config({})
    run.append({"a": 1})
    with pytest.raises(ValueError, match="rate was 0.1 and is now 0.2.*--name.*--overwrite"):
        RunDirectory(tmp_path / "run", {"rate": 0.2, "n": [1]})
    with pytest.raises(ValueError, match=r"n was \[1\]"):
        RunDirectory(tmp_path / "run", {"rate": 0.1, "n": [1, 2]})
    RunDirectory(tmp_path / "run", {"rate": 0.1, "n": [1, 2]}, grown=["n"])


def test_only_a_run_is_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("...")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds no run of this program"):
            RunDirectory(tmp_path / "precious", {}, overwrite=overwrite)
    run = RunDirectory(tmp_path / "run", {"a": 1})
    run.write_config({})
    run.append({"a": 1})
    assert RunDirectory(tmp_path / "run", {"a": 2}, overwrite=True).records() == []


def test_checkpoint(tmp_path):
    run = RunDirectory(tmp_path, {})
    assert run.load_checkpoint() == {}
    run.save_checkpoint({"w": np.arange(3.0), "key": np.array("text")})
    loaded = run.load_checkpoint()
    assert loaded["w"].tolist() == [0, 1, 2] and str(loaded["key"]) == "text"
    run.clear_checkpoint()
    run.clear_checkpoint()
    assert run.load_checkpoint() == {}


def test_records_and_plots_open_without_tensorflow():
    code = "import sys, tf_gsnr.plots, tf_gsnr.records; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_is_what_was_saved(tmp_path):
    directory = RunDirectory(tmp_path / "run", {})
    state = {
        "of": {"n": 5, "p": 0.5},
        "rows": [[{"a": 1.5, "b": math.nan}], []],
        "weights": [np.eye(2, dtype="float32"), np.zeros(3)],
        "rises": np.arange(3),
        "epoch": np.int64(7),
    }
    directory.save_checkpoint(state)
    found = directory.load_checkpoint()
    assert found.keys() == state.keys() and found["of"] == state["of"] and found["epoch"] == 7
    assert math.isnan(found["rows"][0][0]["b"]) and found["rows"][1] == []
    np.testing.assert_array_equal(found["rises"], state["rises"])
    for a, b in zip(found["weights"], state["weights"], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "text", "flipped", "pickled", "lacks one", "other shape", "of before"],
)
def test_a_damaged_checkpoint_costs_time_only(tmp_path, capsys, damage):
    directory = RunDirectory(tmp_path / "run", {})
    directory.save_checkpoint({"epoch": 3, "weights": [np.ones(1000)]})
    file = directory.path / "checkpoint.npz"
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "cut":
        file.write_bytes(content[:middle])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_bytes(b"not a checkpoint")
    elif damage == "flipped":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif damage == "pickled":
        np.savez(file, values=np.array([{"a": 1}], object))
    elif damage in ("lacks one", "other shape"):
        arrays = dict(np.load(file))
        name = next(name for name in arrays if name.startswith("weights"))
        arrays.pop(name) if damage == "lacks one" else arrays.update({name: np.ones(3)})
        np.savez(file, **arrays)
    else:
        np.savez(file, epoch=3, weight000=np.ones(3))
    assert directory.load_checkpoint() == {}
    assert "checkpoint.damaged.npz" in capsys.readouterr().err
    assert not file.exists() and directory.load_checkpoint() == {}


def earlier_run(path):
    run = RunDirectory(path, {"a": 1})
    run.write_config({})
    run.append({"b": 7})
    run.write_json("summary.json", {"c": 1})
    (path / "figures").mkdir()
    (path / "figures" / "x.png").write_text("png")
    run.release()


def listed(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.name != "lock")


def test_a_run_that_is_refused_takes_nothing_away(tmp_path):
    earlier_run(tmp_path / "run")
    before = listed(tmp_path / "run")
    run = RunDirectory(tmp_path / "run", {"a": 2}, overwrite=True)
    run.write_config({"more": 1})
    run.take_back()
    assert listed(tmp_path / "run") == before and read_records(run.path) == [{"b": 7}]
    fresh = RunDirectory(tmp_path / "fresh", {})
    fresh.write_config({})
    fresh.take_back()
    assert not (tmp_path / "fresh").exists()
    run = RunDirectory(tmp_path / "run", {"a": 2}, overwrite=True)
    run.write_config({})
    run.append({"b": 8})
    run.take_back()  # too late: there is a record
    assert read_records(run.path) == [{"b": 8}] and not (run.path / "summary.json").exists()


def test_killed_at_any_moment_of_overwriting_one_of_the_two_runs_is_whole(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def overwrite(path, steps):
        """Until it has moved, removed or renamed so many things."""
        left = [steps]

        def counted(act):
            def once_more(*args, **kwargs):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return act(*args, **kwargs)

            return once_more

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            run = RunDirectory(path, {"a": 2}, overwrite=True)
            run.write_config({})
            run.append({"b": 8})
            run.release()

    whole, steps = {"config.json", "figures", "figures/x.png", "records.jsonl", "summary.json"}, 0
    for steps in range(30):
        path = tmp_path / str(steps)
        earlier_run(path)
        try:
            overwrite(path, steps)
            break
        except Killed:
            pass
        rows = read_records(path)
        settings = {"a": 2} if rows == [{"b": 8}] else {"a": 1}
        again = RunDirectory(path, settings)  # by the command of either run
        if again.records() == [{"b": 7}]:
            assert whole <= set(listed(path))
        else:
            assert again.records() == [{"b": 8}]
        assert not [p for p in listed(path) if ".earlier" in p]
        again.release()
    assert steps > 6
