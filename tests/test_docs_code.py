"""The code of the pages and notebooks in docs/ runs, from top to bottom, in an empty directory."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tf_gsnr import records

DOCS = Path(__file__).parent.parent / "docs"


def run_blocks(blocks, name):
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


def python_of(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_measuring_your_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_of("measuring_your_model.md")
    assert len(blocks) >= 7
    names = run_blocks(blocks, "measuring_your_model.md")
    found = records.read_records(tmp_path / "runs" / "shapes")
    assert len(found) == 5 and all(np.isfinite(r["gsnr_plain/mean"]) for r in found)
    assert list((tmp_path / "logs" / "keras" / "train").iterdir())
    assert {"gsnr", "gap_growth"} <= set(names["history"])


def test_questions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = python_of("questions.md")
    assert len(blocks) >= 3
    run_blocks(blocks, "questions.md")
    assert "Moments of 1,000 examples" in capsys.readouterr().out
    for run in ("first", "probe"):
        assert (tmp_path / "runs" / run / "page.html").stat().st_size > 20_000
    assert np.isfinite(records.read_records(tmp_path / "runs" / "first")[0]["gsnr/mean"])


@pytest.mark.parametrize("notebook", sorted(path.name for path in DOCS.glob("*.ipynb")))
def test_notebooks(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / notebook).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    run_blocks(["".join(cell["source"]) for cell in code], notebook)
    kinds = [kind for cell in code for out in cell["outputs"] for kind in out.get("data", {})]
    assert kinds.count("image/png") >= 2  # as they are shown where nothing is run
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
