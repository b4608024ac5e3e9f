"""A run directory survives being killed, and is never overwritten without being asked."""

import json
import math
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
