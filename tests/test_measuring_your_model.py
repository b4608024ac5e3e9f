"""The code of docs/measuring_your_model.md runs, from top to bottom, in an empty directory."""

import re
from pathlib import Path

import numpy as np

from tf_gsnr import records

PAGE = Path(__file__).parent.parent / "docs" / "measuring_your_model.md"


def test_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 7
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    found = records.read_records(tmp_path / "runs" / "shapes")
    assert len(found) == 5 and all(np.isfinite(r["gsnr_plain/mean"]) for r in found)
    assert list((tmp_path / "logs" / "keras" / "train").iterdir())
    assert {"gsnr", "gap_growth"} <= set(names["history"])
