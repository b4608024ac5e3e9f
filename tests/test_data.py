"""Data sets by name: seeded draws, label noise, and errors that say what to do."""

import numpy as np
import pytest

from tf_gsnr import data


def test_toy_is_a_product_plus_noise():
    x, y = data.load("toy", noise_scale=0.01).draw(1000, np.random.default_rng(0))
    assert x.shape == (1000, 2) and y.shape == (1000, 1) and x.dtype == y.dtype == np.float32
    assert np.abs(x).max() <= 1
    assert 0.009 < np.abs(y[:, 0] - x[:, 0] * x[:, 1]).max() <= 0.01 + 1e-6


def test_the_seed_decides():
    source = data.load("toy")
    a, b, c = (source.draw(5, np.random.default_rng(s))[0] for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_examples_beside_a_training_set_are_others():
    x = np.arange(20, dtype="float32")[:, None]
    y = np.arange(20) % 2
    source = data.from_arrays((x, y), (x, y))
    alone, _ = source.draw(10, np.random.default_rng(0))
    both, labels = source.draw(10, np.random.default_rng(0), beside=10)
    assert (both[:10] == alone).all() and sorted(both[:, 0]) == list(range(20))
    assert (labels == both[:, 0] % 2).all()
    with pytest.raises(ValueError, match="n=10 and 11 others: arrays has 20"):
        source.draw(10, np.random.default_rng(0), beside=11)


def test_training_and_test_examples_can_be_split_anew():
    """As many of each, no example lost, and each still with its own label."""
    x = np.arange(30, dtype="float32")[:, None]
    pairs = [(v, v[:, 0].astype(int) % 3) for v in (x[:20], x[20:])]

    def split(resplit):
        source = data.from_arrays(*pairs)
        source = source if resplit is None else source.split_anew(resplit)
        sets = source.draw(20, np.random.default_rng(0)), source.test(None, None)
        assert [len(images) for images, _ in sets] == [20, 10]
        for images, labels in sets:
            assert (labels == images[:, 0] % 3).all()
        return sorted(sets[0][0][:, 0]), sorted(sets[1][0][:, 0])

    train, test = split(0)
    assert sorted(train + test) == list(range(30)) and test != list(range(20, 30))
    assert split(0) == (train, test) != split(1) and split(None)[1] == list(range(20, 30))
    with pytest.raises(ValueError, match="resplit=-1: expected a seed"):
        data.from_arrays(*pairs).split_anew(-1)
    with pytest.raises(ValueError, match="--resplit: --dataset=toy draws"):
        data.load("toy", resplit=0)


def test_label_noise_replaces_that_share():
    source = data.load("toy")
    rng = np.random.default_rng(0)
    _, y = source.draw(10_000, rng)
    assert (data.randomise(y, 0.0, source, rng) == y).all()
    assert np.mean(data.randomise(y, 0.3, source, rng) != y) == pytest.approx(0.3, abs=0.02)
    noise = data.randomise(y, 1.0, source, rng)
    assert abs(np.corrcoef(noise[:, 0], y[:, 0])[0, 1]) < 0.05
    assert noise.std() == pytest.approx(y.std(), rel=0.05)
    with pytest.raises(ValueError, match="p_random=1.5: expected a probability"):
        data.randomise(y, 1.5, source, rng)


@pytest.mark.parametrize("name, shape", [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_real_images(tfds_dir, name, shape):
    source = data.load(name, tfds_dir)
    assert source.input_shape == shape and source.classes == 10
    rng = np.random.default_rng(0)
    x, y = source.draw(200, rng)
    assert x.shape == (200, *shape) and 0 <= x.min() < 0.1 and 0.9 < x.max() <= 1
    assert len(np.unique(y)) == 10
    assert len(source.test(None, rng)[1]) == 10_000
    assert len(source.test(50, rng)[1]) == 50
    kept = np.mean(data.randomise(y, 1.0, source, rng) == y)
    assert kept == pytest.approx(0.1, abs=0.07)  # the random class may be the same
    with pytest.raises(ValueError, match=rf"n=70000: {name} has \d+ training examples"):
        source.draw(70_000, rng)


def test_unknown_dataset():
    with pytest.raises(
        ValueError, match="unknown dataset 'mnits' .did you mean 'mnist'.*toy, mnist, cifar10"
    ):
        data.load("mnits")


def test_missing_data_says_what_to_put_where(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def no_network(self, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(data, "_has_network", lambda: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    with pytest.raises(ValueError) as error:
        data.load("mnist", str(tmp_path))
    message = str(error.value)
    assert "no route to host" in message
    assert str(tmp_path) in message and "--data_dir=DIR" in message and "tfds.load" in message
