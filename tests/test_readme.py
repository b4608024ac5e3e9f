"""The Python of the README runs."""

import re
from pathlib import Path

import keras
import numpy as np

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its run directories go
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=[20, 3]).astype("float32")
    names = {"model": model, "x": x, "y": x[:, :2]}
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(blocks[0], str(README), "exec"), names)
    names["model"].compile("sgd", "mse")
    assert "gsnr" in names["model"].fit(x, x[:, :2], verbose=0).history
    names["model"] = model
    exec(compile(blocks[1], str(README), "exec"), names)


def test_links_lead_somewhere():
    for page in [README, *README.parent.glob("docs/*.md"), README.parent / "ARCHITECTURE.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
