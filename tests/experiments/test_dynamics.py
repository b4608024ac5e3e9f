"""GSNR during training, small: its numbers against numpy, its resumption, its figure and claims."""

import io

import keras
import numpy as np
import pytest
from keras import layers

import tf_gsnr
from tf_gsnr import data, experiments, models, progress
from tf_gsnr.experiments.dynamics import run as dynamics
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.gradients import recalibration
from tf_gsnr.plots.claims import FAILS, HOLDS
from tf_gsnr.records import RunDirectory

DYNAMICS = experiments.load("dynamics")

SMALL = dict(n=50, probe=30, test_size=40, width=2, epochs=2, batch_size=16, repeats=1)


def spots():
    """A bright spot, whose row is the class, in 6x6 images of noise."""

    def draw(n, rng):
        y = rng.integers(0, 3, n)
        x = 0.3 * rng.random([n, 6, 6, 1])
        x[np.arange(n), 2 * y, rng.integers(0, 6, n)] += 0.7
        return x.astype(np.float32), y

    return data.Source(
        name="spots",
        input_shape=(6, 6, 1),
        outputs=3,
        classes=3,
        pool=None,
        draw=draw,
        test=draw,
        draw_labels=lambda n, rng: rng.integers(0, 3, n),
    )


def normed_net(input_shape, outputs, width):
    """A network with batch norm that is traced fast."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(width, 3, name="conv"),
            layers.BatchNormalization(momentum=0.9, name="norm"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(outputs, name="output"),
        ],
        name="normed_net",
    )


@pytest.fixture(scope="module", autouse=True)
def registered():
    models.MODELS["normed_net"] = normed_net
    yield
    del models.MODELS["normed_net"]


def bench(path, traced):
    directory = RunDirectory(path, {})
    directory.write_config({})
    return Workbench(spots(), directory, progress.Progress(1e9, io.StringIO()), traced=traced)


@pytest.fixture(scope="module")
def traced():
    return {}


def gradients(weights, x, y, name):
    """Losses and per-example gradients `[n, 37, 3]` of the linear models, bias as the last row."""
    x = np.concatenate([4 * x.reshape(len(y), -1).astype(float) - 2, np.ones([len(y), 1])], 1)
    scores = x @ weights
    own = np.eye(3)[y]
    if name == "linear_svm":
        margins = 1 + scores - (own * scores).sum(1, keepdims=True)
        active = (margins > 0) & (own == 0)
        loss = (margins * active).sum(1) / 2
        dz = (active - own * active.sum(1, keepdims=True)) / 2
    else:
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        loss, dz = -np.log((own * p).sum(1)), p - own
    return loss, x[:, :, None] * dz[:, None, :], (scores.argmax(1) == y).mean()


@pytest.mark.parametrize("name", ["logistic_regression", "linear_svm"])
@pytest.mark.parametrize("p_random", [0.0, 1.0])
def test_against_plain_numpy_sgd(tmp_path, traced, name, p_random):
    settings = DYNAMICS.settings(**SMALL, model=name, dataset="spots")
    configuration = dict(model=name, seed=3, p_random=p_random)
    records = list(dynamics.run(configuration, settings, bench(tmp_path, traced)))
    assert [r["epoch"] for r in records] == [0, 1, 2]

    source = spots()
    rng = np.random.default_rng([3, 50, 0])
    (x, y), (test_x, test_y) = source.draw(50, rng), source.test(40, rng)
    y = data.randomise(y, p_random, source, np.random.default_rng([3, 50, 1]))
    weights = np.zeros([37, 3])
    for record in records:
        if record["epoch"]:
            order = np.random.default_rng([3, 50, 2, record["epoch"]]).permutation(50)
            for rows in (order[i : i + 16] for i in range(0, 50, 16)):
                _, g, _ = gradients(weights, x[rows], y[rows], name)
                weights -= settings.learning_rate * g.mean(0)
        loss, g, accuracy = gradients(weights, x[:30], y[:30], name)
        test_loss, _, test_accuracy = gradients(weights, test_x, test_y, name)
        positive, negative = (g > 0).sum(0), (g < 0).sum(0)
        both = positive + negative
        assert record["count"] == 30 and record["layers"] == 1
        assert record["train_loss"] == pytest.approx(loss.mean(), rel=1e-5)
        assert record["test_loss"] == pytest.approx(test_loss.mean(), rel=1e-5)
        assert record["train_accuracy"] == pytest.approx(accuracy)
        assert record["test_accuracy"] == pytest.approx(test_accuracy)
        assert record["gsnr_plain/mean"] == pytest.approx(
            (g.mean(0) ** 2 / g.var(0)).mean(), rel=1e-3
        )
        if record["epoch"]:  # at zero weights the mean gradient may be zero up to rounding
            share = np.maximum(positive, negative) / both
            assert record["same_sign_plain/mean"] == pytest.approx(share.mean(), rel=1e-5)
            share = np.where(g.mean(0) > 0, positive, negative) / both
            assert record["step_sign/mean"] == pytest.approx(share.mean(), rel=1e-5)


def test_interrupted_it_ends_with_the_same_records(tmp_path, traced):
    settings = DYNAMICS.settings(**SMALL, model="normed_net", dataset="spots")
    configuration = dict(model="normed_net", seed=0, p_random=0.0)
    whole = list(dynamics.run(configuration, settings, bench(tmp_path / "whole", traced)))
    assert whole[0]["layers"] == 3
    broken = bench(tmp_path / "broken", traced)
    for record in dynamics.run(configuration, settings, broken):
        if record["epoch"] == 1:
            break  # killed with the record of epoch 1 written and its checkpoint not
    assert broken.directory.load_checkpoint()["epoch"] == 0
    resumed = bench(tmp_path / "broken", traced)
    again = list(dynamics.run(configuration, settings, resumed))
    assert [r["epoch"] for r in again] == [1, 2] and resumed.progress.skipped > 0
    for a, b in zip(whole[1:], again):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "experiment", "dataset", "model"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, nan_ok=True), name
    assert not resumed.directory.load_checkpoint()


def test_real_and_random_labels_start_alike(tmp_path, traced):
    """The same weights and images: only the labels of the training set differ."""
    settings = DYNAMICS.settings(**SMALL | dict(epochs=1), model="normed_net", dataset="spots")
    real, random = (
        next(dynamics.run(c, settings, bench(tmp_path / str(c["p_random"]), traced)))
        for c in DYNAMICS.configurations(settings)
    )
    assert (real["p_random"], random["p_random"]) == (0.0, 1.0)
    assert real["test_loss"] == pytest.approx(random["test_loss"])
    assert real["train_loss"] != pytest.approx(random["train_loss"])


def test_the_statistics_of_one_batch_are_the_exact_ones():
    model = models.build("normed_net", (6, 6, 1), 3, 2, seed=0)
    x, y = spots().draw(64, np.random.default_rng(0))
    norm = model.get_layer("norm")
    with recalibration.whole_data_statistics(model, lambda: [(x, y, None, np.ones(64, bool))]):
        exact = [np.array(norm.moving_mean), np.array(norm.moving_variance)]
    refresh = recalibration.averaged_statistics(model)
    for batches, tolerance in ([x], 1e-5), ([x[:32], x[32:]], 0.05):
        refresh(batches)
        for found, expected in zip((norm.moving_mean, norm.moving_variance), exact):
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance / 10)


def test_the_networks_of_figure_5():
    resnet = models.build("resnet18", (32, 32, 3), 10, 64, seed=0)
    assert sum(int(np.prod(v.shape)) for v in resnet.trainable_variables) == 11_173_962
    assert sum(isinstance(v, layers.BatchNormalization) for v in resnet.layers) == 20
    for name in ("resnet18", "simple_cnn", "logistic_regression", "linear_svm"):
        model = models.build(name, (28, 28, 1), 10, 4, seed=0)
        assert model.output_shape == (None, 10) and model.layers[-1].name == "output"


def test_the_svm_is_measured_by_its_hinge_loss():
    model = models.build("linear_svm", (6, 6, 1), 3, 1, seed=0)
    rng = np.random.default_rng(0)
    x, y = spots().draw(20, rng)
    weights = rng.normal(0, 0.3, [37, 3])
    model.set_weights([weights[:36], weights[36]])
    moments = tf_gsnr.gradient_moments(model, x, y, models.hinge)
    loss, g, _ = gradients(weights, x, y, "linear_svm")
    assert moments.loss == pytest.approx(loss.mean(), rel=1e-5)
    np.testing.assert_allclose(moments.mean[0], g.mean(0)[:36], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance()[0], g.var(0)[:36], rtol=1e-4, atol=1e-5)


def made_up(model, depth, p_random, ratios, signs):
    return [
        dict(
            dataset="spots",
            model=model,
            seed=seed,
            p_random=p_random,
            epoch=epoch,
            n=50,
            count=50,
            layers=depth,
            learning_rate=0.1,
            batch_size=16,
            train_accuracy=0.5,
            test_accuracy=0.4,
            **{"gsnr_plain/mean": ratio + 0.001 * seed, "gsnr/mean": ratio - 0.02},
            **{"same_sign_plain/mean": sign, "step_sign/mean": sign - 0.01},
        )
        for seed in (0, 1)
        for epoch, (ratio, sign) in enumerate(zip(ratios, signs))
    ]


RISING, FALLING = [0.03, 0.06, 0.1, 0.12, 0.11], [0.1, 0.08, 0.07, 0.06, 0.05]
FLAT, SIGNS = [0.03, 0.021, 0.02, 0.02, 0.02], [0.5, 0.53, 0.54, 0.55, 0.56]


def test_figure_table_and_claims():
    deep = made_up("net", 3, 0.0, RISING, SIGNS) + made_up("net", 3, 1.0, FLAT, SIGNS)
    shallow = made_up("line", 1, 0.0, FALLING, SIGNS)
    assert len(DYNAMICS.figure(deep + shallow).axes) == 8
    assert "net" in DYNAMICS.table(deep + shallow)
    assert DYNAMICS.summary(deep)["net"]["1.0"]["seeds"] == 2
    assert [c.verdict for c in DYNAMICS.claims(deep + shallow)] == [HOLDS] * 5

    deep = made_up("net", 3, 0.0, FALLING, SIGNS[::-1]) + made_up("net", 3, 1.0, RISING, SIGNS)
    shallow = made_up("line", 1, 0.0, RISING, SIGNS)
    assert [c.verdict for c in DYNAMICS.claims(deep + shallow)] == [FAILS] * 5


def test_an_unfinished_run_claims_what_it_can():
    real, random = made_up("net", 3, 0.0, RISING, SIGNS), made_up("net", 3, 1.0, FLAT, SIGNS)
    for epochs, claims in ((5, 4), (2, 4), (1, 3), (0, 3)):
        begun = [r for r in random if r["epoch"] < epochs]
        assert len(DYNAMICS.claims(real + begun)) == claims
    assert DYNAMICS.claims(random) == []  # a shard's


def test_bad_settings_are_named():
    for bad in (dict(epochs=0), dict(probe=1), dict(n=[5, 6])):
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}="):
            DYNAMICS.settings(**bad)
    with pytest.raises(ValueError, match="--probe=60: expected at most --n=50"):
        DYNAMICS.settings(n=50, probe=60)
    assert DYNAMICS.settings(model="simple_cnn,linear_svm").model == ["simple_cnn", "linear_svm"]
    with pytest.raises(ValueError, match="--dataset=toy: .*needs classes"):
        DYNAMICS.check(DYNAMICS.settings(dataset="toy"), data.load("toy"))


def test_at_first_the_examples_of_a_class_agree(tfds_dir):
    """Why the same-sign proportion starts above one half: `sign_readings.WHY`."""
    source = data.load("cifar10", tfds_dir)
    model = models.build("simple_cnn", source.input_shape, source.outputs, width=4, seed=0)
    x, y = source.draw(200, np.random.default_rng(0))

    def share(chosen):
        arguments = dict(batch_size=20, sign_counts=True)
        found = tf_gsnr.gradient_moments(
            model, x[chosen], y[chosen], models.cross_entropy, **arguments
        )
        return tf_gsnr.summarize(found, model)["same_sign_plain/mean"]

    assert share(y >= 0) < 0.7
    assert np.mean([share(y == label) for label in range(10)]) > 0.85
