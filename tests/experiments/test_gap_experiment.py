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
N, EPOCHS, RATE, ETA, SETS = 24, 8, 0.05, 0.01, 3


def linear(input_shape, outputs, width):
    return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(1, name="only")])


def regression_of(examples):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[2 * examples, 3])
    y = x @ [[1.0], [-2.0], [0.5]] + rng.normal(size=[2 * examples, 1])
    return data.from_arrays((x[:examples], y[:examples]), (x[examples:], y[examples:]))


def regression():
    return regression_of(200)


def settings(**more):
    small = dict(n=[N], optimizer=["sgd"], batch_size=[0], learning_rate=RATE, epochs=EPOCHS)
    small |= dict(folds=4, twins=3, eta=ETA, repeats=1, model="test_gap_experiment:linear")
    small |= dict(training_sets=SETS)
    return GAP.settings(**small | more)


def trained(chosen, source, directory):
    """The records, the examples and the initial weights of the only configuration."""
    (configuration,) = GAP.configurations(chosen)
    bench = Workbench(
        source,
        RunDirectory(directory, {}),
        progress.Progress(1.0, open("/dev/null", "w")),  # noqa: SIM115
        traced={},
        engine="auto",
        jit_compile=False,
    )
    rows = list(gap.run(configuration, chosen, bench))
    x, y = gap._examples(configuration, chosen, source)
    trainer = next(iter(bench.traced.values()))
    kernel, bias = trainer.build(configuration["seed"]).get_weights()
    start = np.concatenate([kernel, bias[np.newaxis]]).astype(np.float64)
    return rows, with_ones(x), y, start, configuration


@pytest.fixture(scope="module")
def descent(tmp_path_factory):
    chosen, source = settings(curvature=True), regression()
    directory = tmp_path_factory.mktemp("gap") / "run"
    rows, x, y, start, configuration = trained(chosen, source, directory)
    return rows, x, y[:, 0].astype(np.float64), start[:, 0], configuration, chosen


def with_ones(x):
    return np.concatenate([x, np.ones([len(x), 1])], 1).astype(np.float64)


def first(descent):
    """Of the first training set."""
    rows, x, y, start, *_ = descent
    return rows, x[:N], y[:N], start


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
    rows, x, y, start, *_ = descent
    own = [slice(m * N, (m + 1) * N) for m in range(SETS)]
    paths = [weights_of(x[s], y[s], start, np.ones(N)) for s in own]
    found = np.array([losses(x, y, path) for path in paths])  # [set of the model, epoch, example]
    train = np.mean([found[m][:, s].mean(1) for m, s in enumerate(own)], 0)
    np.testing.assert_allclose(column(rows, "train_loss"), train, rtol=1e-4)
    gaps = []
    for m, s in enumerate(own):
        others = [found[k][:, s] for k in range(SETS) if k != m]
        gaps.append((np.mean(others, 0) - found[m][:, s]).mean(1))
    np.testing.assert_allclose(column(rows, "gap"), np.mean(gaps, 0), atol=1e-4)
    se = np.std(gaps, 0, ddof=1) / SETS**0.5
    np.testing.assert_allclose(column(rows, "gap_se"), se, rtol=1e-2, atol=1e-4)
    tests = found[:, :, SETS * N :].mean((0, 2))
    np.testing.assert_allclose(column(rows, "test_loss"), tests, rtol=1e-4)
    starts = found[:, :1]
    wanted = (tests - tests[0]) - np.mean(
        [(found[m] - starts[m])[:, s].mean(1) for m, s in enumerate(own)], 0
    )
    np.testing.assert_allclose(column(rows, "test_gap"), wanted, atol=1e-4)


def test_both_gaps_are_the_same_in_expectation(tmp_path):
    chosen, source = settings(epochs=4, training_sets=60, every=4), regression_of(10_000)
    row = trained(chosen, source, tmp_path / "run")[0][-1]
    assert row["gap"] > 5 * row["gap_se"]
    error = np.hypot(row["gap_se"], row["test_gap_se"])
    assert abs(row["gap"] - row["test_gap"]) < 3 * error
    assert row["gap_se"] < 0.7 * row["test_gap_se"]


def test_folds_are_left_out(descent):
    rows, design, y, start = first(descent)
    configuration, chosen = descent[-2:]
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
    rows, design, y, start = first(descent)
    _, signs = drawn(*descent[-2:])
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
    rows, design, y, start = first(descent)
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


def classification():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[400, 4])
    y = (x @ rng.normal(size=[4, 3]) + rng.gumbel(size=[400, 3])).argmax(1)
    return data.from_arrays((x[:200], y[:200]), (x[200:], y[200:]))


def three_classes(input_shape, outputs, width):
    return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(outputs)])


def test_influence_in_closed_form(tmp_path):
    """On logistic regression, against central differences of whole trainings by numpy."""
    chosen = settings(curvature=True, model="test_gap_experiment:three_classes", learning_rate=0.5)
    rows, x, y, start, _ = trained(chosen, classification(), tmp_path / "run")
    x, y = x[:N], y[:N]
    true = np.eye(3)[y]

    def softmax(w):
        z = np.exp(x @ w)
        return z / z.sum(1, keepdims=True)

    def losses_of(factors):
        w, found = start, []
        for _ in range(EPOCHS + 1):
            p = softmax(w)
            found.append(-np.log(p[np.arange(N), y]))
            w = w - 0.5 * x.T @ (factors[:, None] * (p - true)) / N
        return np.array(found)

    wanted = np.zeros(EPOCHS + 1)
    for n in range(N):
        up, down = (losses_of(1 + s * 1e-4 * np.eye(N)[n])[:, n] for s in (1, -1))
        wanted += (down - up) / 2e-4 / N
    assert wanted[-1] > 0.01
    np.testing.assert_allclose(column(rows, "influence"), wanted, rtol=1e-3, atol=1e-6)


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
            row |= dict(first_order=10 * gap_there, curvature=np.nan, influence=np.nan)
            row |= dict(test_gap=gap_there, test_gap_se=0.01)
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
