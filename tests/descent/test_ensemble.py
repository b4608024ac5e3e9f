"""Many models as one program against the loop over them: the same numbers, to 1e-6."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr import data, experiments, models, progress
from tf_gsnr.descent import ensemble
from tf_gsnr.descent import single as descent
from tf_gsnr.experiments.framework.experiment import Workbench
from tf_gsnr.experiments.osgr import run as osgr
from tf_gsnr.gradients import examples
from tf_gsnr.records import RunDirectory

OSGR = experiments.load("osgr")


def close(a, b, tolerance=1e-6):
    """Relative to the largest number of an array."""
    for one, other in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-30)


def toy_sets(m, n, batch):
    source, rng = data.load("toy"), np.random.default_rng(0)
    return source, [examples.stack_microbatches(*source.draw(n, rng), batch) for _ in range(m)]


def image_sets(m, n, batch):
    rng = np.random.default_rng(0)
    draws = [
        (rng.uniform(size=[n, 16, 16, 1]).astype("float32"), rng.integers(0, 3, n))
        for _ in range(m)
    ]
    return None, [examples.stack_microbatches(*draw, batch) for draw in draws]


CASES = {
    "toy": (toy_sets, lambda: models.build("toy_mlp", (2,), 1, 6, seed=0), "mse"),
    "images": (
        image_sets,
        lambda: models.build("mnist_cnn", (16, 16, 1), 3, 2, seed=0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
}


@pytest.mark.parametrize("case, jit_compile", [("toy", False), ("images", False), ("toy", True)])
def test_replicas_are_the_loop(case, jit_compile, monkeypatch):
    """Five models in three groups, the last filled up; two micro-batches, the last with padding."""
    draw, build, loss = CASES[case]
    monkeypatch.setattr(ensemble, "group_size", lambda model, x: 2)
    _, sets = draw(5, 11, 6)
    _, ((test_x, test_y, test_valid),) = draw(1, 9, 4)
    test = tuple(map(tf.constant, (test_x, test_y, test_valid)))
    model = build()
    rng = np.random.default_rng(1)
    start = [
        np.stack([w + 0.1 * rng.normal(size=w.shape).astype(w.dtype) for _ in sets])
        for w in model.get_weights()
    ]
    own = *(np.stack([s[k] for s in sets]) for k in (0, 1)), sets[0][2]
    own = tuple(map(tf.constant, own))
    last = tf.fill([5], tf.constant(np.inf, tf.float64))
    options = dict(jit_compile=jit_compile)
    together = descent.build_ensemble(model, loss, 0.05, 5 if jit_compile else 1, **options)
    weights, losses, rises = together.descend(start, own, tf.constant(7), last)
    moments = together.moments(weights, own)
    stepped = together.step(weights, moments.mean)
    after = together.loss(stepped, own)
    on_test = together.losses(stepped, test)

    single = descent.build(model, loss, 0.05)
    for m, one_set in enumerate(sets):
        model.set_weights([w[m] for w in start])
        microbatches = tuple(map(tf.constant, one_set))
        loss_m, rises_m = single.descend(
            microbatches, tf.constant(7), tf.constant(np.inf, tf.float64)
        )
        close(losses[m], loss_m)
        assert rises[m] == rises_m
        close([w[m] for w in weights], model.get_weights(), 2e-6)
        model.set_weights([w[m] for w in weights])
        moments_m = single.moments(microbatches)
        close(tf.nest.map_structure(lambda v, m=m: v[m], moments), moments_m)
        single.step(moments_m.mean)
        trained = single.losses(microbatches).numpy()[one_set[2]]
        close(after[m], trained.astype(float).mean())
        close(on_test[m].numpy()[test_valid], single.losses(test).numpy()[test_valid], 2e-6)


def test_the_records_do_not_depend_on_how_many_train_together(tmp_path):
    """In float64, where the difference of two losses keeps its digits."""
    keras.config.set_dtype_policy("float64")
    try:
        settings = OSGR.settings(
            dataset="toy",
            n=[20],
            p_random=[0.5],
            width=[4],
            epochs=[0, 3],
            training_sets=5,
            learning_rate=0.01,
            test_size=50,
            batch_size=16,
        )
        found = []
        for number in (1, 2, None):
            directory = RunDirectory(tmp_path / str(number), settings._asdict())
            directory.write_config({})
            bar = progress.Progress(1, io.StringIO())
            source = data.load("toy")
            bench = Workbench(source, directory, bar, replicas=number, traced={})
            (configuration,) = OSGR.configurations(settings)
            found.append(list(osgr.run(configuration, settings, bench)))
    finally:
        keras.config.set_dtype_policy("float32")
    for records in found[1:]:
        for one, other in zip(records, found[0], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - {"seconds", "experiment", "dataset"}:
                assert one[name] == pytest.approx(other[name], rel=1e-6, nan_ok=True), name


def test_groups_are_bounded_by_their_memory():
    model = models.build("toy_mlp", (2,), 1, 50, seed=0)
    small, large = (ensemble.group_size(model, tf.zeros([b, 2])) for b in (50, 500))
    assert small > 5 * large > 0
    assert ensemble.group_size(model, tf.zeros([10**6, 2])) == 1


def test_where_it_pays():
    assert ensemble.pays(models.build("toy_mlp", (2,), 1, 5, seed=0), (2,))
    assert not ensemble.pays(models.build("mnist_cnn", (16, 16, 1), 3, 2, seed=0), (16, 16, 1))
    lstm = keras.Sequential([keras.Input((4, 2)), keras.layers.LSTM(3), keras.layers.Dense(1)])
    assert not ensemble.pays(lstm, (4, 2))


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 3, 5, 3)])
def test_a_bias_of_each_replicas_own_is_added_without_a_loop(shape, data_format):
    rng = np.random.default_rng(0)
    z, bias = tf.constant(rng.normal(size=(2, *shape))), tf.constant(rng.normal(size=(2, 3)))

    @tf.function(autograph=False)
    def both(z, bias):
        return ensemble.each(lambda z, b: tf.nn.bias_add(z, b, data_format), z, bias)

    graph = both.get_concrete_function(z, bias).graph
    assert not [op for op in graph.get_operations() if "While" in op.type]
    channel = 1 if data_format == "NCHW" else -1
    for one_z, one_bias, found in zip(z.numpy(), bias.numpy(), both(z, bias).numpy()):
        close(found, np.moveaxis(np.moveaxis(one_z, channel, -1) + one_bias, -1, channel))
