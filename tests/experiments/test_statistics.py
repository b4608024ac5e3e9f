"""Rank correlations, partial and within strata, and the bootstrap: against scipy and by hand."""

import numpy as np
import pytest

from tf_gsnr.experiments.framework.statistics import interval, pearson, resampled, spearman


def ranks(values):
    """Mean ranks, one by one."""
    return np.array([np.mean([float(v > w) + float(v >= w) for w in values]) for v in values])


def draw(seed=0, n=40):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return np.exp(z + rng.normal(size=n)), (z + rng.normal(size=n)).round(1), z, rng


def test_it_is_scipys_with_ties():
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        x, y, _, _ = draw(seed)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_it_is_pearsons_of_ranks_and_partial_of_residuals():
    x, y, z, _ = draw()
    assert spearman(x, y) == pytest.approx(pearson(ranks(x), ranks(y)))
    design = np.stack([np.ones(len(z)), ranks(z)], 1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (ranks(x), ranks(y))]
    assert spearman(x, y, given=[z]) == pytest.approx(pearson(*left))
    # By the textbook's formula.
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(x, y, given=[z]) == pytest.approx(expected)


def test_what_only_the_third_makes_is_gone_given_it():
    z = np.arange(200.0)
    rng = np.random.default_rng(1)
    x, y = z + 20 * rng.normal(size=200), z + 20 * rng.normal(size=200)
    assert spearman(x, y) > 0.7 and abs(spearman(x, y, given=[z])) < 0.15
    assert np.isnan(spearman(2 * z, y, given=[z]))  # nothing is left of x


def test_strata():
    """Within, it is the opposite of what it is overall; the mean is weighted by their sizes."""
    x = np.array([1, 2, 3, 4, 11, 12, 13.0])
    y = np.array([4, 3, 2, 1, 11, 12, 13.0])
    strata = ["a"] * 4 + ["b"] * 3
    assert spearman(x, y) > 0.5
    assert spearman(x, y, strata=strata) == pytest.approx((4 * -1 + 3 * 1) / 7)
    y[5] = np.nan  # the stratum has two left: none
    assert spearman(x, y, strata=strata) == pytest.approx(-1)
    assert np.isnan(spearman(x, 0 * x)) and np.isnan(spearman(x[:2], y[:2]))


def test_counts_are_repetitions():
    x, y, z, rng = draw()
    strata = rng.integers(0, 2, len(x))
    counts = rng.integers(0, 3, [6, len(x)])
    for given in ([], [z]):
        found = spearman(x, y, given, strata, counts)
        assert found.shape == (6,)
        for one, count in zip(found, counts):
            rows = np.repeat(np.arange(len(x)), count)
            again = spearman(x[rows], y[rows], [g[rows] for g in given], strata[rows])
            assert one == pytest.approx(again)


def test_groups_are_drawn_whole_and_again_alike():
    groups = [3, 1, 1, 3, 2]
    counts = resampled(groups, draws=500, seed=1)
    assert (counts[:, 0] == counts[:, 3]).all() and (counts[:, 1] == counts[:, 2]).all()
    assert (counts[:, [0, 1, 4]].sum(1) == 3).all()  # as many groups as there are
    assert counts.mean(0) == pytest.approx(1, abs=0.1)
    assert (counts == resampled(groups, draws=500, seed=1)).all()


def test_the_interval_covers_the_truth():
    """Of 100 draws of pairs in groups of two, with a rank correlation known from many pairs."""
    rng = np.random.default_rng(0)

    def pairs(groups):
        shared = rng.normal(size=[2, groups, 1]) + [[[0]], [[0]]]
        x = shared[0] + 0.3 * rng.normal(size=[groups, 2])
        y = 0.7 * shared[0] + 0.7 * shared[1] + 0.3 * rng.normal(size=[groups, 2])
        return x.ravel(), y.ravel(), np.repeat(np.arange(groups), 2)

    x, y, _ = pairs(1000)
    truth, covered = spearman(x, y), 0
    for _ in range(100):
        x, y, groups = pairs(30)
        low, high = interval(spearman(x, y, counts=resampled(groups, draws=200)))
        covered += low < truth < high
    assert 85 <= covered <= 100


def test_an_interval_of_nothing():
    assert np.isnan(interval([np.nan, np.nan])).all()
    assert interval([np.nan, 1.0, 1.0]) == (1.0, 1.0)
