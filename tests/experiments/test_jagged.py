"""Why the GSNR is jagged: the weights around an epoch's end, the size of jumps, the verdicts."""

import numpy as np
import pytest
from test_dynamics import bench, spots

from tf_gsnr import data, experiments
from tf_gsnr.experiments.dynamics import run as dynamics
from tf_gsnr.experiments.jagged import jumps
from tf_gsnr.experiments.jagged import run as jagged
from tf_gsnr.experiments.jagged.settings import AS_IT_IS, VARIANTS
from tf_gsnr.moments import Moments
from tf_gsnr.plots.claims import FAILS, HOLDS

JAGGED = experiments.load("jagged")
SMALL = dict(dataset="spots", model="mlp", n=90, probe=30, width=3, epochs=2, batch_size=2)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """One seed of all variants of a small network."""
    settings = JAGGED.settings(**SMALL, repeats=1)
    workbench = bench(tmp_path_factory.mktemp("jagged"), {})
    return [
        record
        for configuration in JAGGED.configurations(settings)
        for record in jagged.run(configuration, settings, workbench)
    ]


def test_as_it_is_it_is_the_training_of_dynamics(records, tmp_path):
    settings = experiments.load("dynamics").settings(**SMALL | dict(test_size=20, repeats=1))
    configuration = dict(model="mlp", seed=0, p_random=0.0)
    own = [r for r in records if r["variant"] == AS_IT_IS]
    for record, other in zip(own, dynamics.run(configuration, settings, bench(tmp_path, {}))):
        assert record["epoch"] == other["epoch"]
        assert record["loss/end"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert record["gsnr_plain/end"] == pytest.approx(other["gsnr_plain/mean"], rel=1e-3)
    assert len(own) == 3 and "loss/before_1" not in own[0]


def test_every_variant_trains_in_another_way(records):
    last = {r["variant"]: r for r in records if r["epoch"] == 2}
    assert list(last) == list(VARIANTS)
    losses = {round(r["loss/end"], 6) for r in last.values()}
    assert len(losses) == len(VARIANTS)
    assert last["large_batch"]["batch_size"] == 8
    assert "loss/line_minimum" in last[AS_IT_IS] and "loss/line_minimum" not in last["momentum"]


def test_momentum_goes_as_far_as_the_rate_without():
    """A constant gradient moves the weights by lambda a step in the long run, with and without."""
    settings = JAGGED.settings(**SMALL)
    plain, momentum = (jagged.optimizer(v, settings) for v in (AS_IT_IS, "momentum"))
    rate = float(plain.learning_rate.numpy())
    assert float(momentum.learning_rate.numpy()) / (1 - momentum.momentum) == pytest.approx(rate)
    decayed = jagged.optimizer("decayed", settings).learning_rate
    assert np.allclose(np.asarray(decayed), rate)  # at the first step


def quadratic(curvatures):
    """`measure` of a bowl whose two probes have floors at 0 and at a place nearby."""
    h, floors = np.array(curvatures), (np.zeros(2), np.array([0.0, 0.5]))
    asked = []

    def measure(weights, probe):
        asked.append((probe, weights[0]))
        gradient = h * (weights[0] - floors[probe])
        return Moments.of([gradient + np.array([[1.0], [-1.0]])], np.zeros(2)).numpy()

    return measure, asked


def test_places_around_the_end_of_an_epoch():
    weights = [[np.array([float(k), -2.0 * k])] for k in range(33)]
    measure, asked = quadratic([1.0, 1.0])
    found = jagged.around(weights, AS_IT_IS, measure)
    expected = [31, 30, 28, 24, np.mean(range(25, 33)), np.mean(range(1, 33))]
    assert list(found) == [f"before_{k}" for k in (1, 2, 4, 8)] + ["averaged_8", "averaged_32"]
    np.testing.assert_allclose([w[0] for _, w in asked], expected)


def test_the_minimum_along_the_gradient():
    """w = (1, 0.5) is off the floor of probe 1 along the first axis alone, whose curvature is 40:
    one step leads to the floor there and leaves the other axis as it is."""
    measure, asked = quadratic([40.0, 1.0])
    weights = [[np.array([-0.9, 0.5])], [np.array([1.0, 0.5])]]
    found = {"end": measure(weights[-1], 0), "before_1": measure(weights[0], 0)}
    places, numbers = jagged.along_the_gradient(weights, found, measure, 0.02)
    assert numbers["curvature"] == pytest.approx(40)
    g, before = np.array([40, 0.5]), np.array([-36, 0.5])
    cosine = g @ before / np.linalg.norm(g) / np.linalg.norm(before)
    assert numbers["cosine"] == pytest.approx(cosine)
    assert asked[-1][0] == 0
    np.testing.assert_allclose(asked[-1][1], [0, 0.5], atol=1e-9)
    assert places["larger_probe"].count == 4
    jagged.along_the_gradient(weights, found, measure, 0.002)  # not sharp for such a rate
    np.testing.assert_allclose(asked[-1][1], [1, 0.5])


def test_the_variance_of_jumps():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, [400, 50]) + 0.7 * np.arange(50)
    assert jumps.variance(x).mean() == pytest.approx(9, rel=0.05)
    steps = rng.normal(0, 3, [5, 2, 4000])
    np.testing.assert_allclose(jumps.within(steps), 9, rtol=0.1)
    found = jumps.ratio([1.0, 4.0], [2.0, 2.0])
    assert found.value == pytest.approx(1) and found.low == pytest.approx(1 / found.high)
    assert found.high == pytest.approx(2**12.7)  # a standard error of log 2, of two seeds
    assert np.isnan(jumps.ratio([1.0], [2.0]).low)


def made_up(places, variants=VARIANTS, seeds=(0, 1)):
    """Records whose GSNR is 0.01 and jumps by `places[place]`, that of other places by 0.001;
    before the last steps it jumps on its own."""
    rng = np.random.default_rng(0)
    records = []
    for seed in seeds:
        jump, earlier = rng.normal(size=9), rng.normal(size=[9, 10])
        for variant in variants:
            for epoch in range(9):
                r = dict(dataset="spots", model="net", variant=variant, seed=seed, epoch=epoch)
                r |= dict(n=90, count=30, learning_rate=0.1, curvature=8.0, cosine=-0.1)
                for place in JAGGED_PLACES:
                    size = places.get(place, 0.001)
                    k = earlier[epoch, int(place[-1])] if "before" in place else jump[epoch]
                    value = 0.01 + size * k * (epoch > 0)
                    r |= {f"gsnr_plain/{place}": value, f"gsnr/{place}": value - 0.005}
                    r[f"same_sign_plain/{place}"] = 0.52 + value
                records.append(r)
    return records


JAGGED_PLACES = (
    "end other_probe larger_probe before_1 before_2 before_4 before_8 line_minimum averaged_8 "
    "averaged_32"
).split()


def test_figure_table_and_claims():
    swinging = made_up({"line_minimum": 0.0003, "averaged_32": 0.0001})
    assert [c.verdict for c in JAGGED.claims(swinging)][0] == HOLDS
    assert "0.010 (0.010 to 0.010)" in JAGGED.claims(swinging)[0].ours
    assert JAGGED.summary(swinging)["as_it_is/line_minimum"]["ratio"] == pytest.approx(0.09)
    assert len(JAGGED.figure(swinging).axes) == 3
    assert "one step to the line's minimum" in JAGGED.table(swinging)
    assert [c.verdict for c in JAGGED.claims(made_up({}))][0] == FAILS


def test_an_unfinished_run_claims_what_it_can():
    begun = made_up({}, variants=[AS_IT_IS], seeds=[0])
    for records in (begun, begun[:2], [r | {"variant": "momentum"} for r in begun]):
        JAGGED.figure(records), JAGGED.table(records)
        assert len(JAGGED.claims(records)) == (3 if records is begun else 0)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="--probe=50: expected at most half of n = 90"):
        JAGGED.settings(**SMALL | dict(probe=50))
    with pytest.raises(ValueError, match="--batch_size=4: an epoch has 5 steps of the large"):
        JAGGED.settings(**SMALL | dict(batch_size=4))
    with pytest.raises(ValueError, match="--variant='adam': expected one of as_it_is"):
        JAGGED.settings(**SMALL, variant="adam")
    with pytest.raises(ValueError, match="needs classes"):
        JAGGED.check(JAGGED.settings(dataset="toy"), data.load("toy"))
    with pytest.raises(ValueError, match="--model=resnet18: its batch norm's statistics"):
        JAGGED.check(JAGGED.settings(**SMALL | dict(model="resnet18")), spots())
