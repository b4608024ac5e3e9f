"""The freezing experiment, small: its numbers against numpy, its figure and table."""

import io

import numpy as np
import pytest

from tf_gsnr import data, experiments, progress
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.experiments.freezing import figure
from tf_gsnr.experiments.freezing import run as freezing

FREEZING = experiments.load("freezing")

SMALL = dict(n=40, test_size=100, width=5, steps=30, every=10, repeats=2, initial_scale=0.3)


@pytest.fixture(scope="module")
def records():
    settings = FREEZING.settings(**SMALL)
    bench = Workbench(data.load("toy"), None, progress.Progress(1, io.StringIO()), traced={})
    return {
        (c["seed"], c["frozen"]): list(freezing.run(c, settings, bench))
        for c in FREEZING.configurations(settings)
    }


def test_both_start_alike_and_one_learns(records):
    assert set(records) == {(s, f) for s in (0, 1) for f in (False, True)}
    for seed in (0, 1):
        whole, frozen = records[seed, False], records[seed, True]
        assert [r["epoch"] for r in whole] == [0, 10, 20, 30]
        assert whole[0]["gsnr_plain/second_layer"] == pytest.approx(
            frozen[0]["gsnr_plain/second_layer"]
        )
        assert len({r["correlation/feature00"] for r in frozen}) == 1
        assert len({r["correlation/feature00"] for r in whole}) == 4
        assert whole[-1]["train_loss"] < whole[0]["train_loss"]


def test_the_gsnr_is_that_of_the_regression(records):
    """Frozen, at the start: y - w.h is linear in w, so the gradients are 2 (w.h + b - y) h."""
    rng = np.random.default_rng([0, 40])
    source = data.load("toy")
    (x, y), _ = source.draw(40, rng), source.test(100, rng)
    w1, w2 = rng.normal(0, 0.3, [2, 5]), rng.normal(0, 0.3, [5, 1])
    hidden = np.maximum(x @ w1, 0)
    gradient = 2 * (hidden @ w2 - y) * np.concatenate([hidden, np.ones([40, 1])], 1)
    with np.errstate(invalid="ignore"):
        ratio = gradient.mean(0) ** 2 / gradient.var(0)
    found = records[0, True][0]
    assert found["gsnr_plain/second_layer"] == pytest.approx(np.nanmean(ratio), rel=1e-4)


def test_figure_and_table(records):
    flat = [r for group in records.values() for r in group]
    assert len(FREEZING.figure(flat).axes) == 2
    table = FREEZING.table(flat)
    assert "learns" in table and "correlation with y" in table
    summary = FREEZING.summary(flat)
    assert summary["whole"]["seeds"] == summary["frozen"]["seeds"] == 2


def test_a_shard_without_the_first_seeds_whole_network(records):
    shard = [r for key, group in records.items() if key != (0, False) for r in group]
    assert len(FREEZING.figure(shard).axes) == 2
    assert figure.features(shard) == figure.features(records[1, False])


def test_bad_settings_are_named():
    for bad in (dict(steps=0), dict(n=[100, 200]), dict(dataset="mnist"), dict(every=-1)):
        flag = "every_steps" if "every" in bad else next(iter(bad))
        with pytest.raises(ValueError, match=f"--{flag}="):
            FREEZING.settings(**bad)
