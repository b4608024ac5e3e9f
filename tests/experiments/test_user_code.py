"""A user's own network, data and experiment: the page about them runs, and mistakes are named."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from absl.testing import flagsaver

import tf_gsnr.main
from tf_gsnr import data, experiments, models, records

PAGE = Path(__file__).parents[2] / "docs" / "your_own_experiment.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files of the page, importable as `python -m` makes it."""
    path = tmp_path_factory.mktemp("user")
    for name, code in re.findall(
        r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
    ):
        (path / name).write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        yield path


def test_the_page_runs_from_top_to_bottom(place, monkeypatch):
    assert {"my_nets.py", "my_data.py", "sample_size.py"} <= {p.name for p in place.glob("*.py")}
    assert len((place / "sample_size.py").read_text().splitlines()) < 100
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [shlex.split(line)[2:] for line in lines if "fashion_mnist" not in line]
    assert [c[0] for c in commands] == ["tf_gsnr.main", "tf_gsnr.main", "tf_gsnr.report"]
    for _, *arguments in commands[:2]:
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        with flagsaver.flagsaver():
            tf_gsnr.main.parse_flags(sys.argv)
            tf_gsnr.main.run(["main.py"])
    bars = records.read_records(place / "runs" / "bars")
    assert {r["n"] for r in bars} == {20, 50, 100, 200} and len(bars) == 16
    for epoch in (0, 5):
        pairs = [(r["osgr_predicted"], r["osgr_measured"]) for r in bars if r["epoch"] == epoch]
        assert np.corrcoef(*zip(*pairs))[0, 1] > 0.7
    assert {"gsnr/small_cnn/conv/kernel", "osgr_predicted"} <= bars[0].keys()
    assert bars[-1]["dataset"] == "my_data:load" and bars[0]["gsnr_plain/mean"] > 0
    sizes = records.read_records(place / "runs" / "sample_size")
    assert [(r["n"], r["repeat"]) for r in sizes] == [(n, r) for n in (25, 100) for r in (0, 1)]
    for r in sizes:  # E g^2 is too large by about s2 / n
        assert r["plain"] - r["corrected"] == pytest.approx(1 / r["n"], rel=0.2)

    # The current directory is where `python -m` looks for the experiment's module.
    done = subprocess.run(
        [sys.executable, "-m", "tf_gsnr.report", "--experiments=sample_size"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(PAGE.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = (place / "runs" / "report.html").read_text()
    assert "How far the GSNR of n examples is too large" in text
    assert "--model=my_nets:small_cnn" in text
    assert not (place / "RESULTS.md").exists()


def write(place, name, code):
    (place / f"{name}.py").write_text(code)
    return name


@pytest.mark.parametrize(
    "code, message",
    [
        (
            "def net(shape, outputs): pass",
            r"cannot be called as net\(input_shape, outputs, width\)",
        ),
        ("def other(a, b, c): pass", "has no function 'net'; it has: other"),
        ("def net(*a): return 'a network'", "it returned str; expected a keras.Model"),
        ("def net(*a): return keras.Sequential([Dense(4)])", r"shape \[2, 4\]; expected \[2, 3\]"),
        ("def net(*a): return keras.Sequential([Dense(3, 'softmax')])", "expected logits"),
        (
            "def net(*a): return keras.Sequential([keras.Input([7]), Dense(3)])",
            r"does not take examples of shape \(5,\)",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_named(place, request, code, message):
    name = write(
        place,
        f"nets_{abs(hash(code))}",
        f"import keras\nfrom keras.layers import Dense\n\n{code}\n",
    )
    with pytest.raises(ValueError, match=f"--model={name}:net: .*{message}"):
        models.build(f"{name}:net", (5,), 3, width=4, seed=0)


def test_a_network_that_fits_is_built_alike_twice(place):
    name = write(
        place,
        "good_nets",
        "import keras\n\ndef net(shape, outputs, width):\n"
        "    return keras.Sequential([keras.layers.Dense(width), keras.layers.Dense(outputs)])\n",
    )
    a, b = (models.build(f"{name}:net", (5,), 3, width=4, seed=1).get_weights() for _ in range(2))
    assert [w.shape for w in a] == [(5, 4), (4,), (4, 3), (3,)]
    assert all((v == w).all() for v, w in zip(a, b))


def test_unknown_names_say_what_there_is(place):
    with pytest.raises(ValueError, match="unknown model 'nope'; available: mnist_cnn.*module:func"):
        models.build("nope", (5,), 3, width=4, seed=0)
    with pytest.raises(ValueError, match="--model=nope.nets:net: there is no module 'nope'"):
        models.build("nope.nets:net", (5,), 3, width=4, seed=0)
    with pytest.raises(ValueError, match="--model=mnist_cnn: cannot be built.*shape \\(5,\\)"):
        models.build("mnist_cnn", (5,), 3, width=4, seed=0)
    with pytest.raises(ValueError, match="unknown dataset 'mnits'.*or module:function"):
        data.load("mnits")
    with pytest.raises(ValueError, match="unknown experiment 'nope'; available: osgr.*a module of"):
        experiments.load("nope")
    name = write(place, "half_an_experiment", "GRID = ()\n\ndef run(*a): pass\n")
    with pytest.raises(ValueError, match=f"--experiment={name}.*lacks Settings, settings.*figure"):
        experiments.load(name)


def test_a_setting_of_ones_own_is_a_flag(place, capsys):
    code = (place / "sample_size.py").read_text()
    code = code.replace("from typing import NamedTuple", "from typing import Annotated, NamedTuple")
    code = code.replace("import complete", "import POSITIVE, Setting, complete")
    own = 'tilt: Annotated[float, Setting("Of the bars, in degrees.", POSITIVE)] = 10.0'
    name = write(
        place, "tilted", code.replace("    seed: int = 0\n", f"    seed: int = 0\n    {own}\n")
    )

    def settings(*arguments):
        with flagsaver.flagsaver():
            tf_gsnr.main.parse_flags(["main.py", f"--experiment={name}", *arguments])
            experiment = experiments.load(name)
            return experiment.settings(**tf_gsnr.main._given(experiment.Settings))

    assert settings().tilt == 10.0
    assert settings("--tilt=5", "--n=7,7,9").tilt == 5.0
    assert settings("--n=7,7,9").n == [7, 9]
    with pytest.raises(ValueError, match="--tilt=-1.0: expected a positive number"):
        settings("--tilt=-1")
    for wrong in ("--tilt=steep", "--n=", "--n=1,", "--probe=3"):
        with pytest.raises(SystemExit):
            settings(wrong)
    with flagsaver.flagsaver():
        tf_gsnr.main.parse_flags(["main.py", f"--experiment={name}"])
        text = tf_gsnr.main.FLAGS.module_help("tf_gsnr.main")
        assert "Of the bars, in degrees. Default: 10.0." in " ".join(text.split())


def test_an_error_inside_the_users_module_is_not_hidden(place):
    name = write(place, "broken", "import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        data.load(f"{name}:load")


def arrays(classes=3, n=30, shape=(4, 4, 1)):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, [n, *shape]).astype(np.uint8)
    return x, np.arange(n) % classes


def test_arrays_become_a_source():
    x, y = arrays()
    source = data.from_arrays((x, y), (x[:6], y[:6].astype(np.uint8)), name="mine")
    assert (source.outputs, source.classes, source.pool) == (3, 3, 30)
    rng = np.random.default_rng(0)
    drawn_x, drawn_y = source.draw(10, rng)
    assert drawn_x.dtype == np.float32 and drawn_x.max() <= 1 and drawn_y.dtype == np.int64
    assert len(source.test(None, rng)[1]) == 6
    assert set(source.draw_labels(100, rng)) == {0, 1, 2}
    floats = x.astype(float)
    (again,) = {data.from_arrays((floats, y), (floats, y)).draw(10, rng)[0].dtype}
    assert again == np.float32
    targets = data.from_arrays((floats, floats.sum((1, 2, 3))), (floats, floats.sum((1, 2, 3))))
    assert targets.classes is None and targets.outputs == 1
    assert targets.draw(4, rng)[1].shape == targets.draw_labels(4, rng).shape == (4, 1)


def test_arrays_that_do_not_fit_are_named():
    x, y = arrays()
    one_hot = np.eye(3)[y]
    holed = x.astype(float)
    holed[0, 0] = np.nan
    cases = [
        ((x, y[:-1]), "train x has the shape .30, 4, 4, 1. and y .29,."),
        ((x, y - 1), "label of train example 0 is -1; expected 0 to 2"),
        ((x, one_hot), "train y is one-hot; expected class numbers"),
        ((x, one_hot.astype(int)), "expected class numbers"),
        ((holed, y), "train x holds NaN"),
        ((x.astype(str), y), "expected numbers"),
        ((x[:, :2], y), r"example's x has the shape \(2, 4, 1\) in train and \(4, 4, 1\) in test"),
        ((x, y.astype(float)), "y has the shape|y is a number of kind"),
    ]
    for train, message in cases:
        with pytest.raises(ValueError, match=f"mine: .*{message}"):
            data.from_arrays(train, (x, y), name="mine")


def test_a_function_that_returns_no_data_is_named(place):
    name = write(place, "bad_data", "def load(data_dir): return {'x': data_dir}\n")
    with pytest.raises(
        ValueError, match=f"--dataset={name}:load: it returned dict; expected .*Sou"
    ):
        data.load(f"{name}:load", "somewhere")


def test_images_of_several_sizes_are_refused_before_the_download():
    with pytest.raises(ValueError, match="'stanford_dogs' has the features.*of one size"):
        data.load("stanford_dogs")


def test_keras_networks_serve_as_well(place):
    name = write(
        place,
        "subclassed",
        "import keras\n\nclass Net(keras.Model):\n    def __init__(self, outputs):\n"
        "        super().__init__()\n        self.out = keras.layers.Dense(outputs, name='out')\n"
        "    def call(self, x): return self.out(x)\n\n"
        "def net(input_shape, outputs, width): return Net(outputs)\n",
    )
    model = models.build(f"{name}:net", (5,), 3, width=4, seed=0)
    assert isinstance(model, keras.Model) and model.count_params() == 18
