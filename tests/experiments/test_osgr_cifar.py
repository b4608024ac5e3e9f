"""OSGR with batch normalisation: the training set's statistics, and both sides of (19).

Index letters: n example, t training set, k direction.
"""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr import data, experiments, models, progress
from tf_gsnr.descent import directional_variance
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.experiments.osgr import run as osgr
from tf_gsnr.gradients import examples, recalibration
from tf_gsnr.plots.claims import FAILS, HOLDS
from tf_gsnr.records import RunDirectory

OSGR = experiments.load("osgr")

L = keras.layers
LEARNING_RATE = 0.01
SIZE, TRAIN, TEST = 4, 14, 9


def tiny(input_shape, outputs, width):
    """Two blocks of the network of table 3, where the second's statistics depend on the first's."""
    blocks = [
        [
            L.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}"),
            L.BatchNormalization(name=f"bn{i}"),
            L.ReLU(),
        ]
        for i in range(2)
    ]
    head = [L.MaxPooling2D(2), L.Flatten(), L.Dense(outputs, name="output")]
    return keras.Sequential([keras.Input(input_shape), *sum(blocks, []), *head], name="tiny")


@pytest.fixture(scope="module")
def source():
    """Images of noise, with labels that depend on them."""

    def draw(n, rng):
        x = rng.normal(size=[n, SIZE, SIZE, 2]).astype("float32")
        return x, (x.mean((1, 2, 3)) > 0).astype(int) + rng.integers(0, 2, n)

    return data.Source(
        "noise", (SIZE, SIZE, 2), 3, 3, None, draw, draw, lambda n, rng: rng.integers(0, 3, n)
    )


def bench(source, path):
    directory = RunDirectory(path, {})
    return Workbench(source, directory, progress.Progress(1, io.StringIO()), traced={})


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", tiny)
        yield from _run(source, tmp_path_factory)


def _run(source, tmp_path_factory):
    settings = OSGR.settings(
        dataset="cifar10",
        model="tiny",
        n=[TRAIN],
        p_random=[0.3],
        width=[2],
        epochs=[0, 2],
        training_sets=2,
        learning_rate=LEARNING_RATE,
        test_size=TEST,
        batch_size=5,  # the last micro-batch is padded
    )
    (configuration,) = OSGR.configurations(settings)
    work = bench(source, tmp_path_factory.mktemp("run"))
    yield settings, work, list(osgr.run(configuration, settings, work))


class Loop:
    """The network in float64, eager; the statistics of D are recomputed in every forward pass."""

    def __init__(self, weights):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("float64")
        try:
            self.model = tiny((SIZE, SIZE, 2), 3, 2)
        finally:
            keras.config.set_dtype_policy(before)
        self.model.set_weights([w.astype("float64") for w in weights])
        self.variables = self.model.trainable_variables

    def losses(self, x, y, train_x, frozen=False):
        """`[n]`, by hand, layer by layer: the set's own activations beside those of D."""
        h, d = tf.cast(x, tf.float64), tf.cast(train_x, tf.float64)
        for layer in self.model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                mean = tf.reduce_mean(d, [0, 1, 2])
                scale = tf.sqrt(tf.reduce_mean(d**2, [0, 1, 2]) - mean**2 + layer.epsilon)
                if frozen:
                    mean, scale = tf.stop_gradient(mean), tf.stop_gradient(scale)
                h, d = ((v - mean) / scale * layer.gamma.value + layer.beta.value for v in (h, d))
            else:
                h, d = layer(h), layer(d)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, h)

    @tf.function(autograph=False)
    def gradients_of(self, x, y, frozen):
        with tf.GradientTape(persistent=True) as tape:
            losses = tf.unstack(self.losses(x, y, x, frozen))
        return [tape.gradient(loss, self.variables) for loss in losses]

    def gradients(self, x, y, frozen):
        """`[n, parameters]`: each example's own gradient."""
        rows = self.gradients_of(x, y, frozen)
        return np.array([np.concatenate([np.ravel(g) for g in row]) for row in rows])

    def step(self, gradient):
        parts = np.split(gradient, np.cumsum([np.size(v) for v in self.variables])[:-1])
        for variable, part in zip(self.variables, parts):
            variable.assign_sub(LEARNING_RATE * part.reshape(variable.shape))


def test_both_sides_against_a_float64_loop(run, source):
    settings, work, records = run
    ((model, _, initial, _),) = work.traced.values()

    def stream(i):
        return np.random.default_rng([0, TRAIN, 300_000, 2, i])

    rng = stream(1)
    test_x, test_y = source.test(TEST, rng)
    test_y = data.randomise(test_y, 0.3, source, rng)
    sums = {epoch: [] for epoch in (0, 2)}
    for t in range(2):
        rng = stream(2 + t)
        x, y = source.draw(TRAIN, rng)
        y = data.randomise(y, 0.3, source, rng)
        loop = Loop(initial)
        for epoch in range(3):
            own = loop.gradients(x, y, frozen=False)
            if epoch in sums:
                constant = loop.gradients(x, y, frozen=True)
                slopes = [own @ signs for signs in _signs(model, t, epoch)]
                before = [np.mean(loop.losses(*d, x)) for d in ((x, y), (test_x, test_y))]
            loop.step(own.mean(0))
            if epoch in sums:
                after = [np.mean(loop.losses(*d, x)) for d in ((x, y), (test_x, test_y))]
                sums[epoch].append(
                    [
                        *np.subtract(before, after),
                        np.mean([s.var() for s in slopes]) / TRAIN,
                        np.sum(own.mean(0) ** 2),
                        np.sum(constant.var(0)) / TRAIN,
                        np.sum(constant.mean(0) ** 2),
                        before[0],
                    ]
                )
    many = np.random.default_rng(0).choice([-1, 1], [own.shape[1], 4000])
    assert (own @ many).var(0).mean() == pytest.approx(own.var(0).sum(), rel=0.1)  # Hutchinson
    for record in records:
        train, test, noise, signal, noise_c, signal_c, loss = np.mean(sums[record["epoch"]], 0)
        assert record["train_loss"] == pytest.approx(loss, rel=1e-5)
        assert record["osgr_measured"] == pytest.approx(test / train, rel=5e-3, abs=5e-3)
        assert record["osgr_predicted"] == pytest.approx(1 - noise / signal, rel=1e-3)
        assert record["osgr_predicted_frozen"] == pytest.approx(1 - noise_c / signal_c, rel=1e-3)
        assert record["first_order_ratio"] == pytest.approx(
            LEARNING_RATE * signal / train, rel=5e-3
        )


def _signs(model, t, epoch):
    """The directions of training set t, `[parameters]` each."""
    for k in range(directional_variance.DIRECTIONS):
        signs = directional_variance.directions(
            model.trainable_variables, tf.constant([t, epoch]), k
        )
        flat = np.concatenate([np.ravel(s) for s in signs])
        assert set(np.unique(flat)) == {-1.0, 1.0}
        yield flat


def test_statistics_are_exact_whatever_the_microbatches(run, source):
    _, work, _ = run
    ((model, functions, initial, _),) = work.traced.values()
    x, y = source.draw(TRAIN, np.random.default_rng(3))
    microbatches, labels, valid = map(tf.constant, examples.stack_microbatches(x, y, 5))
    weights = [w[tf.newaxis] for w in map(tf.constant, initial)]
    found = functions.recalibrate(weights, (microbatches[tf.newaxis], labels[tf.newaxis], valid))
    model.set_weights([w[0] for w in found])
    moving = [np.array(v) for v in model.non_trainable_variables]

    def batches():
        yield tf.constant(x), y, None, tf.ones([TRAIN], tf.bool)

    with recalibration.whole_data_statistics(model, batches):
        for found, v in zip(moving, model.non_trainable_variables):
            np.testing.assert_allclose(found, v, rtol=1e-4, atol=1e-5)
    h = tf.constant(x)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            np.testing.assert_allclose(layer.moving_mean, np.mean(h, (0, 1, 2)), atol=1e-5)
            np.testing.assert_allclose(layer.moving_variance, np.var(h, (0, 1, 2)), rtol=1e-4)
        h = layer(h, training=False)


def test_the_figure_has_both_predictions_and_the_table_too(run):
    records = run[2]
    assert len(OSGR.figure(records).axes) == 4
    table = OSGR.table(records)
    assert "as constants" in table and "frozen" in OSGR.summary(records)


def points(dataset, offset, **fields):
    """Records whose measured OSGR is the predicted one plus an offset."""
    return [
        dict(
            dataset=dataset,
            epoch=epoch,
            n=n,
            osgr_measured=0.1 * n + offset,
            osgr_measured_se=0.02,
            osgr_predicted=0.1 * n,
            osgr_predicted_se=0.0,
            small_step=True,
            first_order_ratio=1.01,
            **fields,
        )
        for epoch in (0, 5)
        for n in range(5)
    ]


def test_claims_follow_from_the_numbers():
    on, off = OSGR.claims(points("mnist", 0)), OSGR.claims(points("toy", 0.3))
    assert [c.verdict for c in on] == [HOLDS, HOLDS] and on[0].where == "figure 4"
    assert "+0.300 at epoch 5" in off[0].why and "1.010 of what" in off[0].why
    assert "0.907" in on[1].paper and "Pearson 1.000" in on[1].ours
    assert [c.verdict for c in off] == [FAILS, HOLDS] and off[0].where == "figure 11"
    constant = dict(osgr_predicted_frozen_se=0.01)
    records = [
        r | dict(osgr_predicted_frozen=r["osgr_predicted"] - 0.5)
        for r in points("cifar10", 0, **constant)
    ]
    diagonal, correlated = OSGR.claims(records)
    assert diagonal.where == "figure 9" and diagonal.verdict == correlated.verdict == HOLDS
    assert "+0.500" in diagonal.ours and "+0.000" in diagonal.why
    assert OSGR.claims([r | dict(small_step=False) for r in records]) == []


def test_real_cifar(tfds_dir, tmp_path):
    settings = OSGR.settings(
        dataset="cifar10",
        n=[20],
        width=[1],
        p_random=[0.0],
        epochs=[0],
        training_sets=2,
        test_size=30,
    )
    real = data.load("cifar10", tfds_dir)
    (record,) = osgr.run(dict(n=20, p_random=0.0, width=1), settings, bench(real, tmp_path))
    assert record["first_order_ratio"] == pytest.approx(1, abs=0.1)
    assert np.isfinite([record["osgr_measured"], record["osgr_predicted"]]).all()
