"""Predictions of the gap against plain numpy, on linear regression by full-batch descent."""

import keras
import numpy as np
import pytest

from tf_gsnr import data, experiments, progress
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.experiments.gap import figure
from tf_gsnr.experiments.gap import run as gap
from tf_gsnr.records import RunDirectory

GAP = experiments.load("gap")
N, EPOCHS, RATE, ETA = 24, 8, 0.05, 0.01


def linear(input_shape, outputs, width):
    return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(1, name="only")])


def regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[400, 3])
    y = x @ [[1.0], [-2.0], [0.5]] + rng.normal(size=[400, 1])
    return data.from_arrays((x[:200], y[:200]), (x[200:], y[200:]))


def settings(**more):
    small = dict(n=[N], optimizer=["sgd"], batch_size=[0], learning_rate=RATE, epochs=EPOCHS)
    small |= dict(folds=4, twins=3, eta=ETA, repeats=1, model="test_gap_experiment:linear")
    return GAP.settings(**small | more)


@pytest.fixture(scope="module")
def descent(tmp_path_factory):
    chosen, source = settings(curvature=True), regression()
    (configuration,) = GAP.configurations(chosen)
    bench = Workbench(
        source,
        RunDirectory(tmp_path_factory.mktemp("gap") / "run", {}),
        progress.Progress(1.0, open("/dev/null", "w")),  # noqa: SIM115
        traced={},
        engine="auto",
        jit_compile=False,
    )
    rows = list(gap.run(configuration, chosen, bench))
    x, y, test = gap._examples(configuration, chosen, source)
    design = np.concatenate([x, np.ones([N, 1])], 1).astype(np.float64)
    trainer = next(iter(bench.traced.values()))
    kernel, bias = trainer.build(configuration["seed"]).get_weights()
    start = np.append(kernel[:, 0], bias).astype(np.float64)
    return rows, design, y[:, 0].astype(np.float64), start, test, configuration, chosen


def weights_of(design, y, start, factors):
    """The weights after each step of descent on the weighted loss, by numpy."""
    w, path = start, []
    for _ in range(EPOCHS + 1):
        path.append(w)
        w = w - RATE * 2 * design.T @ (factors * (design @ w - y)) / N
    return np.array(path)


def losses(design, y, path):
    return (path @ design.T - y) ** 2


def drawn(configuration, chosen):
    rng = gap._rng(configuration, 2)
    part = rng.permutation(np.arange(N) % chosen.folds)
    return part, rng.choice([-1.0, 1.0], [chosen.twins, N])


def column(rows, name):
    return np.array([r[name] for r in rows])


def test_the_gap_is_that_of_the_losses(descent):
    rows, design, y, start, (test_x, test_y), *_ = descent
    path = weights_of(design, y, start, np.ones(N))
    train = losses(design, y, path).mean(1)
    tests = losses(np.concatenate([test_x, np.ones([200, 1])], 1), test_y[:, 0], path).mean(1)
    np.testing.assert_allclose(column(rows, "train_loss"), train, rtol=1e-4)
    wanted = (tests - tests[0]) - (train - train[0])
    np.testing.assert_allclose(column(rows, "gap"), wanted, atol=1e-4)


def test_folds_are_left_out(descent):
    rows, design, y, start, _, configuration, chosen = descent
    part, _ = drawn(configuration, chosen)
    gaps = []
    for k in range(chosen.folds):
        kept = part != k
        change = losses(design, y, weights_of(design, y, start, kept * N / kept.sum()))
        change = change - change[0]
        gaps.append(change[:, ~kept].mean(1) - change[:, kept].mean(1))
    wanted = np.mean(gaps, 0) * (chosen.folds - 1) / chosen.folds
    np.testing.assert_allclose(column(rows, "folds"), wanted, atol=1e-4)


def test_twins_are_the_derivative_along_random_signs(descent):
    """dw <- (I - lambda H) dw - lambda (1/N) sum_n e[n] g[n];  - (1/N) sum_n e[n] g[n].dw"""
    rows, design, y, start, _, configuration, chosen = descent
    _, signs = drawn(configuration, chosen)
    path = weights_of(design, y, start, np.ones(N))
    hessian, wanted = 2 * design.T @ design / N, []
    for e in signs:
        tangent, along = np.zeros(4), []
        for w in path:
            g = (2 * (design @ w - y)[:, None] * design * e[:, None]).mean(0)
            along.append(-g @ tangent)
            tangent = tangent - RATE * hessian @ tangent - RATE * g
        wanted.append(along)
    np.testing.assert_allclose(column(rows, "twins"), np.mean(wanted, 0), rtol=0.02, atol=2e-4)


def test_sums_over_the_steps(descent):
    rows, design, y, start, *_ = descent
    summed, covariance, wanted = 0.0, np.zeros([4, 4]), []
    hessian, before = 2 * design.T @ design / N, None
    for w in weights_of(design, y, start, np.ones(N)):
        g = 2 * (design @ w - y)[:, None] * design
        growth = RATE * g.var(0, ddof=1).sum() / N
        summed += 0 if before is None else (before + growth) / 2
        before = growth
        wanted.append([summed, np.trace(covariance)])
        sigma = np.cov(g.T, ddof=0)
        covariance = covariance + RATE * (sigma / N - hessian @ covariance)
    found = np.stack([column(rows, "first_order"), column(rows, "curvature")], 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_configuration_has_streams_of_its_own():
    first, more = (GAP.configurations(settings(n=n)) for n in ([N], [N, 40]))
    assert first[0] in more
    streams = [gap._rng(c, s).random() for c in more for s in range(4)]
    assert len(set(streams)) == len(streams)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(eta=0.0), "--eta"),
        (dict(batch_size=[100]), "--batch_size=100"),
        (dict(folds=20), "--folds=20"),
        (dict(curvature=True, optimizer=["adam"]), "--curvature"),
        (dict(optimizer=["sgdd"]), "--optimizer='sgdd'"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        settings(**given)


def records(seeds=3, ratio=1.0):
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        for epoch, left in enumerate([1.0, 0.8, 0.6, 0.4]):
            gap_there = 0.1 * epoch * (1 + 0.01 * rng.normal())
            row = dict(n=N, p_random=0.0, optimizer="sgd", batch_size=0, seed=seed, epoch=epoch)
            row |= dict(dataset="toy", model="x", train_loss=left, gap=gap_there, gap_se=0.001)
            row |= dict(twins=ratio * gap_there, twins_se=0.001, folds=gap_there, folds_se=0.001)
            row |= dict(first_order=10 * gap_there, curvature=np.nan)
            rows.append(row)
    return rows


def test_how_long_a_prediction_is_right():
    found = figure.summary(records(ratio=1.2))
    (one,) = found.values()
    assert set(one) == {"first_order", "twins", "folds"}
    assert one["twins"]["ratio"]["0.5"] == pytest.approx(1.2)
    assert one["twins"]["right_until"] == pytest.approx(0.4)
    assert one["first_order"]["right_until"] == pytest.approx(1.0)
    verdicts = [claim.verdict for claim in figure.claims(records())]
    assert verdicts == ["does not hold", "holds", "holds"]
    assert "10.00" in figure.table(records())
    for rows in (records(), records(1), records()[:1]):
        figure.plt.close(figure.figure(rows))
        figure.claims(rows)
