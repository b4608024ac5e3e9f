"""The ranking experiment, small: its records against numpy, its correlations, figure and claims."""

import io

import numpy as np
import pytest

import tf_gsnr
from tf_gsnr import data, experiments, metrics, models, progress
from tf_gsnr.experiments.framework.experiment import Diverged, Workbench
from tf_gsnr.experiments.ranking import correlations, figure
from tf_gsnr.experiments.ranking import run as ranking
from tf_gsnr.experiments.ranking.correlations import COMPARISONS, KINDS, correlation
from tf_gsnr.plots.claims import FAILS, HOLDS, PARTLY

RANKING = experiments.load("ranking")

TOY = dict(dataset="toy", model="toy_mlp", n=24, test_size=50, width=[4], learning_rate=[0.3])
TOY |= dict(batch_size=[6, 12], p_random=[0.0, 0.5], epochs=6, early_epochs=2, most_steps=60)
TOY |= dict(early_loss=0.12, final_loss=0.02, repeats=1)


def bench(traced):
    bar = progress.Progress(1e9, io.StringIO())
    return Workbench(data.load("toy"), None, bar, traced=traced)


@pytest.fixture(scope="module")
def traced():
    return {}


@pytest.fixture(scope="module")
def records(traced):
    settings = RANKING.settings(**TOY)
    workbench = bench(traced)
    rows = [
        r for c in RANKING.configurations(settings) for r in ranking.run(c, settings, workbench)
    ]
    total = sum(RANKING.work(c, settings) for c in RANKING.configurations(settings))
    assert workbench.progress.done == pytest.approx(total)
    return rows


def test_records_are_complete_and_alike(records):
    assert len(records) == 4 and len({tuple(r) for r in records}) == 1
    for record in records:
        assert all(isinstance(v, (int, float, str)) for v in record.values())
        assert record["epoch"] == 6 and record["early_epoch/epoch"] == 2
        assert record["final_epoch/epoch"] == 6
        for place in ("early_epoch", "final_epoch"):
            assert np.isfinite(record[f"{place}/gap_loss"])
            assert np.isnan(record[f"{place}/gap_error"])  # of a regression
        for name in ("gsnr_mean", "gsnr_of_sums", "same_sign", "gradient_norm"):
            assert np.isfinite(record[f"early_epoch/{name}"])
        for place, most in (("early_loss", 0.12), ("final_loss", 0.02)):
            assert not record[f"{place}/train_loss"] > most  # NaN: not reached
    reached = [np.isfinite(r["early_loss/epoch"]) for r in records]
    assert any(reached)
    assert np.isnan([r["early_loss/gsnr_mean"] for r in records]).tolist() == [
        not one for one in reached
    ]


def test_a_configuration_is_itself_alone(records, traced):
    """Others added, and another order, change nothing; nor does a network that trained before."""
    settings = RANKING.settings(**TOY | dict(learning_rate=[0.3, 0.05], p_random=[0.5]))
    configuration = RANKING.configurations(settings)[0]
    (again,) = ranking.run(configuration, settings, bench(traced))
    (before,) = [r for r in records if configuration.items() <= r.items()]
    assert again.keys() == before.keys()
    for name in again.keys() - {"seconds", "experiment", "dataset", "model"}:
        assert again[name] == pytest.approx(before[name], rel=1e-6, nan_ok=True), name


def test_against_plain_sgd(records):
    """Two epochs of SGD in numpy's order, then the moments by `gradient_moments`."""
    record = next(r for r in records if r["batch_size"] == 12)
    source, rng = data.load("toy"), np.random.default_rng([0, 24, 0])
    (x, y), (test_x, test_y) = source.draw(24, rng), source.test(50, rng)
    noise = np.random.default_rng([0, 24, 1])
    y = data.randomise(y, record["p_random"], source, noise)
    test_y = data.randomise(test_y, record["p_random"], source, noise)
    model = models.build("toy_mlp", (2,), 1, 4, seed=0)
    w1, b1, w2, b2 = (w.astype(float) for w in model.get_weights())
    order = np.random.default_rng([0, 24, 2])
    for _ in range(2):
        rows = order.permutation(24)
        for batch in (rows[:12], rows[12:]):
            hidden = np.maximum(x[batch] @ w1 + b1, 0)
            dz = 2 * (hidden @ w2 + b2 - y[batch]) / 12
            dh = dz @ w2.T * (hidden > 0)
            steps = [x[batch].T @ dh, dh.sum(0), hidden.T @ dz, dz.sum(0)]
            w1, b1, w2, b2 = (w - 0.3 * g for w, g in zip((w1, b1, w2, b2), steps))
    model.set_weights([w1, b1, w2, b2])
    moments = tf_gsnr.gradient_moments(model, x, y, "mse", sign_counts=True)
    trace = sum(v.sum() for v in moments.variance(1))
    squares = sum((m.astype(float) ** 2).sum() for m in moments.mean)
    assert record["early_epoch/train_loss"] == pytest.approx(moments.loss, rel=1e-4)
    assert record["early_epoch/gradient_norm"] == pytest.approx(np.sqrt(squares), rel=1e-3)
    assert record["early_epoch/gradient_variance"] == pytest.approx(trace, rel=1e-3)
    assert record["early_epoch/gsnr_of_sums"] == pytest.approx(squares / trace - 1 / 24, rel=1e-2)
    mean = np.nanmean(np.concatenate([r.ravel() for r in metrics.gsnr(moments)]))
    assert record["early_epoch/gsnr_mean"] == pytest.approx(mean, rel=1e-2)
    test_loss = np.mean((model(test_x).numpy() - test_y) ** 2)
    gap = test_loss - record["early_epoch/train_loss"]
    assert record["early_epoch/gap_loss"] == pytest.approx(gap, rel=1e-3, abs=1e-6)


def test_a_descent_that_diverges_ends_there(traced):
    settings = RANKING.settings(**TOY | dict(learning_rate=[1e6]))
    with pytest.raises(Diverged, match="learning_rate=1000000"):
        list(ranking.run(RANKING.configurations(settings)[0], settings, bench(traced)))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(correlations, "DRAWS", 200)


def made_up(seeds=3):
    """Records of which it is known what ranks what."""
    rng, rows = np.random.default_rng(0), []
    settings = RANKING.settings(repeats=seeds)
    for c in RANKING.configurations(settings):
        own = rng.normal()  # of which the loss curve knows nothing
        curve = c["learning_rate"] * 10 + c["p_random"] + 0.2 * rng.normal()
        gap = 5 * c["p_random"] + own + curve
        early = {
            "gsnr_mean": -own,
            "gsnr_of_sums": -c["p_random"] + 0.1 * rng.normal(),
            "same_sign": rng.normal(),
            "gradient_norm": np.exp(curve),
            "gradient_variance": np.exp(own),
            "train_loss": -curve,
            "epoch": np.exp(-curve),
            "gap_loss": gap,
            "osgr_predicted": 0.5,
        }
        late = {"gap_loss": gap, "gap_error": gap / 9}
        row = c | dict(dataset="spots", model="mlp", n=500, early_epochs=2, early_loss=1.8)
        row |= dict(final_loss=0.2, epoch=30)
        for c in COMPARISONS.values():
            row |= {f"{c.early}/{k}": v for k, v in early.items()}
            row |= {f"{c.final}/{k}": v for k, v in late.items()}
        rows.append(row)
    return rows


def test_correlations_of_what_is_known():
    rows, comparison = made_up(), COMPARISONS["same_epoch"]

    def found(name, kind):
        return correlation(rows, name, comparison, KINDS[kind])

    assert found("gsnr_of_sums", "overall").sign == -1  # by the label noise alone
    assert found("gsnr_of_sums", "noise").sign == 0
    assert found("gsnr_mean", "noise_beyond").value < -0.9
    assert found("same_sign", "noise_beyond").sign == 0
    assert found("gradient_norm", "noise").sign == 1
    assert found("gsnr_of_sums", "setup").value < -0.5
    assert np.isnan(found("gradient_norm", "noise_beyond").value)  # the curve, by another name
    assert np.isnan(found("curve", "beyond").value) and str(found("curve", "beyond")) == "not known"
    again, other = found("gsnr_mean", "noise"), found("gradient_variance", "noise")
    assert again == found("gsnr_mean", "noise") and again.value == pytest.approx(-other.value)
    better = correlations.advantage(rows, "gap_loss", "same_sign", comparison, KINDS["overall"])
    assert better.sign == 1 and better.value > 0.8


def test_claims_follow_the_numbers():
    names = list(correlations.QUANTITIES)
    verdicts = dict(zip(names, (c.verdict for c in figure.claims(made_up()))))
    assert verdicts["gsnr_mean"] == HOLDS and verdicts["gradient_variance"] == HOLDS
    assert verdicts["gsnr_of_sums"] == PARTLY  # the label noise, and no set-up
    assert verdicts["same_sign"] == FAILS and verdicts["curve"] == HOLDS
    mean = figure.claims(made_up())[0].ours
    assert mean.count("as expected in 3 of 3") == 2 and "other way" not in mean
    assert figure.claims(made_up()[:3]) == []


@pytest.mark.parametrize("rows", ["made up", "toy", "one"])
def test_figure_table_and_summary(rows, records):
    rows = {"made up": made_up(), "toy": records, "one": records[:1]}[rows]
    drawn = RANKING.figure(rows)
    assert len(drawn.axes) == 3 * (len(correlations.QUANTITIES) + 1)
    summary = RANKING.summary(rows)
    assert summary["trainings"] == len(rows)
    assert len(summary["same_loss"]["gap_error"]["gsnr_mean"]["noise"]) == 3
    assert "at the same training losses" in RANKING.table(rows)


def test_bad_settings_are_named():
    for bad in (
        dict(early_epochs=30),
        dict(early_loss=0.1),
        dict(probe=600),
        dict(batch_size=[8, 501]),
        dict(final_loss=0),
        dict(p_random=[2]),
    ):
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}="):
            RANKING.settings(**bad)
