"""The status page: what it says of a run directory; drawn in a browser, where there is one."""

import html
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

import tf_gsnr
from tf_gsnr import records, status
from tf_gsnr.status import training, words

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
EDGES = np.round(np.arange(-8, 4.01, 0.25), 2).tolist()


def write_training(path, layers=("net/conv", "net/dense"), rows=12, state="done", **changes):
    """A run directory as a `GSNRCallback` with test data leaves it, of numbers made up."""
    settings = {
        "experiment": "training",
        "model": "net",
        "parameters": 1000 * len(layers),
        "optimizer": "Adam",
        "learning_rate": 0.001,
        "loss": "mse",
        "measured_by": "GSNRCallback",
        "probe_examples": 500,
        "test_examples": 400,
        "examples": 4000,
        "cadence": "every 10 steps",
        **changes.get("settings", {}),
    }
    directory = records.RunDirectory(path, settings)
    about = [
        {"layer": name, "class": "Dense", "parameters": 1000, "route": "dense"} for name in layers
    ]
    config = {"kind": "training", "layers": about, "steps_per_epoch": 63, "devices": ["CPU"]}
    config |= {"cpus": 2, "processor": "one", "started": "2026-01-01", "optimizer_is_known": True}
    directory.write_config(config | changes.get("config", {}))
    rng = np.random.default_rng(0)
    for k in range(rows):
        row = {"step": 10 * k, "epoch": k // 4, "seconds": 2.0 * k, "learning_rate": 0.001}
        row |= {"loss": 2 / (k + 1), "test_loss": 2 / (k + 1) + 0.01 * k, "count": 500}
        row |= {"gsnr/mean": 0.1 / (k + 1), "gsnr/median": 0.01 / (k + 1), "gsnr/p95": 0.3}
        row |= {"gsnr/least": 0.001, "same_sign/mean": 0.55, "noise_scale": 50.0 + 10 * k}
        row |= {"osgr_predicted": 0.99 - 0.01 * k, "osgr_predicted_se": 0.01}
        row |= {"osgr_measured": 0.95 - 0.02 * k, "osgr_measured_se": 0.05}
        row |= {"gap": 0.01 * k, "gap_se": 0.004, "gap_predicted": 0.05 * k, "dead": 10}
        row |= {"step_probe_decrease": 0.01, "parameters": 1000 * len(layers)}
        for name in layers:
            row |= {f"gsnr/{name}": float(rng.uniform(0.001, 0.1)), f"dead/{name}": 10}
            row |= {f"same_sign/{name}": 0.5, f"gap_share/{name}": 1 / len(layers)}
        directory.append(row | changes.get("row", {}))
    counts = {name: rng.integers(0, 50, len(EDGES) - 1).tolist() for name in layers}
    both = {"edges": EDGES, "first": {"step": 0, "counts": counts}}
    both["last"] = {"step": 10 * (rows - 1), "counts": counts}
    directory.write_json("histograms.json", both)
    known = {"state": state, "written": time.time(), "pid": os.getpid()}
    directory.write_json("state.json", known | changes.get("told", {}))
    return directory.path


def said(path):
    """Warnings, and the sentences of the tiles by their labels."""
    run = training.read(path)
    return words.warnings(run), {tile.label: tile for tile in words.tiles(run)}


def test_tiles_say_what_the_numbers_mean(tmp_path):
    warnings, tiles = said(write_training(tmp_path / "run"))
    assert not warnings
    assert tiles["noise scale"].sentence == "batch 64: larger batches still pay"
    assert tiles["OSGR, predicted"].value == "0.880" and "88 %" in tiles["OSGR, predicted"].sentence
    assert tiles["OSGR, measured"].error == "± 0.1 (2 s.e.)"
    assert "below the prediction" in tiles["OSGR, measured"].sentence
    assert tiles["gap"].value == "+0.11" and "5 times that" in tiles["gap"].sentence
    assert tiles["GSNR"].sentence.endswith("a step carries over")


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(row={"gsnr/mean": None}), "could not be told from zero"),
        (dict(row={"step_probe_decrease": -0.1}), "12 of 12 measured steps raised the loss"),
        (dict(row={"dead/net/conv": 900}), "Most parameters are dead.*net/conv \\(90 %\\)"),
        (dict(row={"step": 3}), "of more than one training"),
        (
            dict(told={"unmeasured": {"net/conv": "it is used twice"}}),
            "net/conv: it is used twice",
        ),
        (dict(told={"contributions": "layer 'bn'"}), "act on each other"),
        (dict(told={"continued": 40}), "continued from a saved model at step 40"),
        (dict(config={"optimizer_is_known": False}), "no predicted gap"),
        (dict(told={"state": "stopped"}), "stopped before its end.*step 110"),
    ],
)
def test_warnings_in_plain_words(tmp_path, changes, expected):
    warnings, _ = said(write_training(tmp_path / "run", **changes))
    assert len(warnings) == 1
    assert re.search(expected, warnings[0])


def test_nothing_is_measured_yet(tmp_path):
    path = write_training(tmp_path / "run", rows=0, state="running")
    warnings, tiles = said(path)
    assert not tiles and "Nothing is measured yet" in warnings[0]
    assert status.page(path).stat().st_size < 100_000


def test_a_killed_process_is_told_to_have_stopped(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    killed = dict(told={"pid": dead.pid, "host": host})
    path = write_training(tmp_path / "killed", state="running", **killed)
    assert training.read(path).state["state"] == "stopped"
    alive = write_training(tmp_path / "alive", state="running", **dict(told={"host": host}))
    assert training.read(alive).state["state"] == "running"
    elsewhere = write_training(tmp_path / "far", state="running", **dict(told={"pid": dead.pid}))
    assert training.read(elsewhere).state["state"] == "running"  # of another host: not known


def test_the_page_looks_again_only_while_the_run_goes_on(tmp_path):
    assert data_of(status.page(write_training(tmp_path / "a", state="running")))["refresh"] == 4
    assert data_of(status.page(write_training(tmp_path / "b")))["refresh"] is None


def data_of(file):
    text = file.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_names_are_text_and_never_markup(tmp_path):
    name = "<script>alert(1)</script>"
    file = status.page(write_training(tmp_path / "<img src=x onerror=alert(2)>", [name, "b"]))
    text = file.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text
    assert data_of(file)["runs"][0]["layers"][0]["layer"] == name
    assert data_of(file)["title"].startswith("<img")


def test_many_measurements_of_many_layers_stay_small(tmp_path):
    path = write_training(tmp_path / "run", [f"net/layer_{i}/conv" for i in range(160)], rows=200)
    begun = time.monotonic()
    file = status.page(path)
    assert file.stat().st_size < 3e6 and time.monotonic() - begun < 5
    more = write_training(tmp_path / "more", rows=3000)
    series = data_of(status.page(more))["runs"][0]["series"]
    assert len(series["step"]) == training.MOST_ROWS and series["step"][-1] == 29990


def test_several_trainings_side_by_side(tmp_path):
    a = write_training(tmp_path / "a")
    b = write_training(tmp_path / "b", settings={"learning_rate": 0.01})
    file = tf_gsnr.page(a, b)
    assert file == tmp_path / "compare.html"
    assert data_of(file)["differing"] == [{"setting": "learning_rate", "values": ["0.001", "0.01"]}]
    assert tf_gsnr.page(a, b, output=tmp_path / "new" / "x.html").exists()


def test_what_is_no_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        tf_gsnr.page(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no training was recorded there"):
        tf_gsnr.page(tmp_path)
    damaged = write_training(tmp_path / "damaged")
    (damaged / "state.json").write_text("{")
    (damaged / "histograms.json").write_text("[]")
    run = data_of(tf_gsnr.page(damaged))["runs"][0]
    assert run["state"] == "stopped" and run["histograms"] is None


def test_plot_of_a_run_of_a_history_and_of_nothing(tmp_path):
    figure = tf_gsnr.plot(write_training(tmp_path / "run"))
    titles = [axis.get_title() for axis in figure.axes]
    assert {"loss", "generalisation gap", "OSGR", "GSNR by layer"} <= set(titles)
    many = write_training(tmp_path / "many", [f"net/{i}" for i in range(30)])
    tf_gsnr.plot(many).savefig(tmp_path / "many.png")
    history = {"loss": [2.0, 1.0], "gsnr": [0.1, math.nan], "osgr": [1.0, 0.9]}
    axes = tf_gsnr.plot(history).axes
    assert axes[0].get_xlabel() == "epoch" and len(axes[2].lines) == 1
    for nothing in ({"loss": []}, {"accuracy": [0.1]}, 3):
        with pytest.raises(ValueError, match="source="):
            tf_gsnr.plot(nothing)


# In a browser

PROBE = """
<script>window.problems = []; addEventListener("error", (e) => problems.push(e.message));</script>
"""
LOOK = """
<script>
addEventListener("load", () => {
  const first = () => document.querySelector("tbody tr td").textContent;
  const heading = [...document.querySelectorAll("th button")].find((b) => b.textContent === "GSNR");
  const seen = { problems, order: [first()] };
  if (heading) for (let k = 0; k < 2; k++) { heading.click(); seen.order.push(first()); }
  const saved = [];
  URL.createObjectURL = (blob) => { saved.push(blob.type + ":" + blob.size); return "data:,"; };
  document.querySelectorAll(".tools button").forEach((b) => b.click());
  for (const s of document.querySelectorAll("select")) {
    s.value = "0";
    s.dispatchEvent(new Event("change"));
  }
  const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
  const place = { clientX: box.x + box.width / 2, clientY: box.y + 20 };
  svg.dispatchEvent(new PointerEvent("pointermove", place));
  seen.tip = document.querySelector(".tip:not([hidden])")?.textContent || "";
  seen.titles = [...document.querySelectorAll("figcaption b")].map((b) => b.textContent);
  seen.drawn = document.querySelectorAll(".plot svg path").length;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  seen.nan = document.querySelector("main").innerHTML.includes("NaN");
  seen.colour = getComputedStyle(document.body).backgroundColor;
  setTimeout(() => {
    seen.saved = saved;
    parent.postMessage(JSON.stringify(seen), "*");
  }, 400);
});
</script>
"""


def looked_at(file, tmp_path, width, dark=False):
    """What the page is in a headless browser, in a window so wide."""
    text = file.read_text(encoding="utf-8").replace("<main>", PROBE + "<main>", 1)
    inner = tmp_path / "inner.html"
    inner.write_text(text.replace("</body>", LOOK + "</body>"), encoding="utf-8")
    outer = tmp_path / "outer.html"  # a window of the browser's own is never narrower than 500
    outer.write_text(
        f'<iframe src="inner.html" width="{width}" height="900"></iframe><pre id="told"></pre>'
        '<script>addEventListener("message", (e) => told.textContent = e.data)</script>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [BROWSER, *options, "--window-size=1600,1000", "--dump-dom", f"file://{outer}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = done.stdout.partition('<pre id="told">')[2].partition("</pre>")[0]
    assert told, done.stderr[-2000:]
    return json.loads(html.unescape(told))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("width, dark", [(1400, False), (390, True)])
def test_in_a_browser(tmp_path, width, dark):
    layers = [
        "net/conv",
        "net/a_layer_with_a_very_long_name_indeed_so_that_it_must_be_cut",
        "net/z",
    ]
    seen = looked_at(status.page(write_training(tmp_path / "run", layers)), tmp_path, width, dark)
    assert seen["problems"] == [] and not seen["nan"]
    assert seen["wide"] <= 0
    expected = {"Loss", "Generalisation gap", "OSGR: how much of a step carries over", "Layers"}
    expected |= {"GSNR of the parameters", "GSNR by layer", "Noise scale", "Agreement of signs"}
    assert expected | {"The parameters' GSNR", "Where the gap comes from"} == set(seen["titles"])
    assert seen["drawn"] > 12
    values = training.layers(training.read(tmp_path / "run"))
    ordered = sorted(values, key=lambda one: one["last"]["gsnr"])
    assert seen["order"] == [layers[0], ordered[-1]["layer"], ordered[0]["layer"]]
    assert seen["tip"].startswith("step ") and "test" in seen["tip"]
    assert sum(kind.startswith("text/csv") for kind in seen["saved"]) == len(seen["titles"])
    assert sum(kind.startswith("image/png") for kind in seen["saved"]) == len(seen["titles"]) - 1
    assert ("rgb(246" in seen["colour"]) is not dark


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_deep_models_several_runs_and_empty_ones_in_a_browser(tmp_path):
    deep = [f"resnet/block_{i}/<b>conv</b>" for i in range(160)]
    a = write_training(tmp_path / "a", deep, rows=200)
    seen = looked_at(status.page(a), tmp_path, 1400)
    assert seen["problems"] == [] and "GSNR by layer" in seen["titles"] and seen["wide"] <= 0
    b = write_training(tmp_path / "b", rows=1, row={"gsnr/mean": None, "gap": None})
    seen = looked_at(tf_gsnr.page(a, b), tmp_path, 390)
    assert seen["problems"] == [] and "What differs in their settings" in seen["titles"]
    assert seen["wide"] <= 0
