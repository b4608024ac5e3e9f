"""The weights experiment, small: (28) against finite differences, its records against numpy."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr import data, experiments, progress, records
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.experiments.weights import feature_term
from tf_gsnr.experiments.weights import run as weights
from tf_gsnr.experiments.weights.gradient_change import mean_gradient
from tf_gsnr.gradients import examples
from tf_gsnr.models import per_example

WEIGHTS = experiments.load("weights")

SMALL = dict(dataset="toy", model="mlp", n=30, width=6, epochs=4, every=1, term_every=2, repeats=2)
LOSS = per_example(keras.losses.SparseCategoricalCrossentropy(from_logits=True))


@pytest.fixture(scope="module")
def network():
    """A smooth 3-4-3-2 network in float64, seven examples in three micro-batches, one padded."""
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input([3], dtype="float64")])
    for units, activation in ((4, "tanh"), (3, "tanh"), (2, None)):
        model.add(keras.layers.Dense(units, activation, dtype="float64"))
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    microbatches = examples.stack_microbatches(rng.normal(size=[7, 3]), rng.integers(0, 2, 7), 3)
    return model, tuple(map(tf.constant, microbatches))


def gradient_at(model, microbatches, values):
    values = [tf.constant(v) for v in values]
    return [g.numpy() for g in mean_gradient(model, LOSS, values, microbatches)[1]]


@pytest.mark.parametrize("place", [1, 2])
def test_first_order_parts_add_up_to_the_measured_change(network, place):
    model, microbatches = network
    terms = feature_term.feature_terms(model, model.layers[place], LOSS, 0.3, microbatches)
    start, kernel = model.get_weights(), 2 * place
    gradient = gradient_at(model, microbatches, start)
    after = []
    for step in (1e-5, -1e-5):
        moved = [w - step * g if k < kernel else w for k, (w, g) in enumerate(zip(start, gradient))]
        after.append(gradient_at(model, microbatches, moved)[kernel])
    change = 0.3 * (after[0] - after[1]) / 2e-5
    np.testing.assert_allclose(sum(t.numpy() for t in terms), change, atol=1e-8)


def test_term_28_is_its_formula(network):
    """A_sc,p by central differences of the features in plain numpy, with the errors held fixed."""
    model, microbatches = network
    x, y = (c.numpy().reshape(-1, *c.shape[2:])[:7] for c in microbatches[:2])
    w1, b1, w2, b2, w3, b3 = model.get_weights()

    def features(parameters):
        v1, c1 = parameters[:12].reshape(3, 4), parameters[12:16]
        v2, c2 = parameters[16:28].reshape(4, 3), parameters[28:]
        return np.tanh(np.tanh(x @ v1 + c1) @ v2 + c2)

    parameters = np.concatenate([v.ravel() for v in (w1, b1, w2, b2)])
    scores = np.exp(features(parameters) @ w3 + b3)
    delta = scores / scores.sum(1, keepdims=True) - np.eye(2)[y]
    slopes = [features(parameters + e) - features(parameters - e) for e in 1e-5 * np.eye(31)]
    a_scp = np.einsum("is,pic->csp", delta, np.array(slopes) / 2e-5) / 7
    gradient = gradient_at(model, microbatches, model.get_weights())[:4]
    by_chain = np.einsum("cs,csp->p", w3, a_scp)
    np.testing.assert_allclose(by_chain, np.concatenate([g.ravel() for g in gradient]), atol=1e-9)
    terms = feature_term.feature_terms(model, model.layers[2], LOSS, 0.3, microbatches)
    np.testing.assert_allclose(terms.own_weight, -0.3 * w3 * (a_scp**2).sum(2), atol=1e-9)


def test_layers_without_a_term_are_named(network):
    model, microbatches = network
    with pytest.raises(ValueError, match="no trainable layers below"):
        feature_term.feature_terms(model, model.layers[0], LOSS, 0.3, microbatches)
    with pytest.raises(ValueError, match="(?s)Dropout.*fully connected"):
        with_dropout = keras.Sequential([keras.Input([3]), keras.layers.Dropout(0.1)])
        feature_term.feature_terms(with_dropout, with_dropout.layers[0], LOSS, 0.3, microbatches)


class Killed(Exception):
    """What ends a run halfway."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = records.RunDirectory(tmp_path_factory.mktemp("weights") / "run", {})
    return Workbench(data.load("toy"), directory, progress.Progress(1, io.StringIO()), traced={})


@pytest.fixture(scope="module")
def found(bench):
    settings = WEIGHTS.settings(**SMALL, batch_size=10)
    return [r for c in WEIGHTS.configurations(settings) for r in weights.run(c, settings, bench)]


def test_records_are_what_numpy_finds(bench, found):
    """Epoch 0, the second layer: g, Delta g by both steps, from a network in plain numpy."""
    (x, y) = data.load("toy").draw(30, np.random.default_rng([0, 30]))
    x, y = x.astype(float), y.astype(float)
    settings = WEIGHTS.settings(**SMALL)
    start = [w.astype(float) for w in weights.initial(settings, bench.source, 0).get_weights()]

    def gradient(v1, c1, v2, c2, v3, c3):
        h1 = np.maximum(x @ v1 + c1, 0)
        h2 = np.maximum(h1 @ v2 + c2, 0)
        d3 = 2 * (h2 @ v3 + c3 - y) / len(y)
        d2 = (d3 @ v3.T) * (h2 > 0)
        d1 = (d2 @ v2.T) * (h1 > 0)
        return [x.T @ d1, d1.sum(0), h1.T @ d2, d2.sum(0), h2.T @ d3, d3.sum(0)]

    before = gradient(*start)
    moved = [w - settings.learning_rate * g for w, g in zip(start, before)]
    below = gradient(*moved[:2], *start[2:])[2] - before[2]
    alive = before[2] != 0
    w, record = start[2], found[0]
    assert record["opposite/all/dense2"] == pytest.approx(np.mean((w * before[2] < 0)[alive]))
    expected = np.corrcoef(w[alive], below[alive])[0, 1]
    assert record["correlation_below/all/dense2"] == pytest.approx(expected, abs=1e-4)
    expected = np.corrcoef(w[alive], (gradient(*moved)[2] - before[2])[alive])[0, 1]
    assert record["correlation_whole/all/dense2"] == pytest.approx(expected, abs=1e-4)
    change = (gradient(*moved)[2] - before[2]).ravel()
    growth = change @ before[2].ravel() / np.sum(before[2] ** 2)
    assert record["growth/all/dense2"] == pytest.approx(growth, rel=1e-3)
    parts = ("own_weight", "other_weights", "errors", "remainder")
    for name in ("all", "all/dense2"):
        assert sum(record[f"explained/{p}/{name}"] for p in parts) == pytest.approx(1)
        total = sum(record[f"contribution/{p}/{name}"] for p in parts)
        assert total == pytest.approx(record[f"correlation_below/{name}"])
    assert ["term_correlation/all" in r for r in found] == [True, False, True, False, True] * 2
    assert found[4]["train_loss"] < found[0]["train_loss"]
    assert found[5]["seed"] == 1 and found[5]["train_loss"] != found[0]["train_loss"]


def test_a_killed_run_goes_on_where_it_was(bench, found, monkeypatch):
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", -1)
    settings = WEIGHTS.settings(**SMALL, batch_size=10)
    started = weights.run({"seed": 1}, settings, bench)
    first = [next(started) for _ in range(3)]
    del started
    trained = []
    monkeypatch.setattr(
        weights, "_batches", lambda *a, f=weights._batches: trained.append(a) or f(*a)
    )
    rest = list(weights.run({"seed": 1}, settings, bench))
    assert [r["epoch"] for r in rest] == [2, 3, 4] and len(trained) == 2
    for again, once in zip(first[:2] + rest, found[5:]):
        again, once = (dict(r, seconds=0) for r in (again, once))
        assert again == pytest.approx(once, nan_ok=True)
    assert bench.directory.load_checkpoint() == {}


def test_figure_table_and_claims(found):
    assert len(WEIGHTS.figure(found).axes) == 4
    assert "W g < 0" in WEIGHTS.table(found)
    assert WEIGHTS.summary(found)["seeds"] == 2
    claims = WEIGHTS.claims(found)
    assert {c.verdict for c in claims} <= {"holds", "holds partly", "does not hold"}
    assert all(c.where == "figure 7a" or c.where == "figure 7b" or "3.3" in c.where for c in claims)


def test_term_28_can_be_left_out():
    with_terms, without = (WEIGHTS.settings(dataset="toy", term_every=k) for k in (20, 0))
    assert WEIGHTS.work({}, without) < WEIGHTS.work({}, with_terms)


def test_bad_settings_are_named():
    for bad in (dict(epochs=0), dict(n=[100, 200]), dict(batch_size=0), dict(term_every=3)):
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}="):
            WEIGHTS.settings(**bad)


def test_a_network_that_is_no_chain_is_named(bench):
    settings = WEIGHTS.settings(**SMALL)
    with pytest.raises(ValueError, match="--model=mlp"):
        weights.check_chain(keras.Model(), settings)
    for single in ([], [keras.layers.Dense(2, name="only")]):
        with pytest.raises(ValueError, match="expected two at least"):
            weights.check_chain(keras.Sequential([keras.Input([3]), *single]), settings)
    normalized = keras.Sequential(
        [
            keras.Input([3]),
            keras.layers.Dense(2),
            keras.layers.BatchNormalization(name="bn1"),
            keras.layers.Dense(2),
        ]
    )
    with pytest.raises(ValueError, match=r"batch normalisation \(bn1\)"):
        weights.check_chain(normalized, settings)
