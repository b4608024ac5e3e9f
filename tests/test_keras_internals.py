"""What Keras and TensorFlow do not document is where `keras_internals` looks for it."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_gsnr import keras_internals

L = keras.layers
X, Y = np.ones([4, 3], "float32"), np.zeros([4, 1], "float32")


def compiled(optimizer="sgd"):
    inner = keras.Sequential([L.Dense(2), L.Dropout(0.5)], name="inner")
    model = keras.Sequential([keras.Input([3]), inner, L.Dense(1)])
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def test_layers():
    model = compiled()
    inner, last = model.layers
    every = keras_internals.layers_in(model)
    assert every[0] is model and {id(v) for v in every} >= {id(v) for v in [inner, last]}
    assert {id(v) for v in inner.layers} <= {id(v) for v in every}
    assert all(one is not model for one in keras_internals.layers_in(model, include_self=False))
    directly = keras_internals.layers_directly_in(model)
    assert any(one is inner for one in directly)
    assert not any(one is inner.layers[0] for one in directly)


@pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="this Keras has no such mode")
def test_rematerialised():
    with keras.RematScope(mode="full"):
        recomputed = L.Dense(2)
    assert keras_internals.is_rematerialised(recomputed)
    assert callable(recomputed.rematerialized_call)
    assert not keras_internals.is_rematerialised(L.Dense(2))


def test_seeds():
    model = compiled()
    seeds = [v for v in model.non_trainable_variables if keras_internals.is_seed(v)]
    assert len(seeds) == 1
    assert seeds[0] is model.layers[0].layers[1].seed_generator.state


def test_masks():
    mask = L.Embedding(5, 2, mask_zero=True)(tf.constant([[1, 0]]))
    assert keras_internals.mask_of(mask).numpy().tolist() == [[True, False]]
    tensor = tf.ones([1, 2])
    assert keras_internals.mask_of(tensor) is None
    keras_internals.set_mask(tensor, None)
    assert keras_internals.mask_of(tensor) is None
    keras_internals.set_mask(tensor, tf.constant([[True, False]]))
    masked = L.GlobalAveragePooling1D()
    assert masked(tensor[..., None]).shape == (1, 1)
    assert keras_internals.mask_of(tensor) is not None


def test_function_on_a_layer_is_called():
    layer = L.Dense(2, activation="relu")
    layer(X)
    with keras_internals.replaced([(layer, "call", lambda usual: lambda x: usual(x) + 7)]):
        assert (layer(X).numpy() >= 7).all()
    with keras_internals.replaced([(layer, "activation", lambda _: keras.activations.linear)]):
        np.testing.assert_allclose(layer(X), X @ layer.kernel + layer.bias, rtol=1e-5)
    assert "call" not in vars(layer)


def test_loss():
    model = compiled()
    assert keras_internals.compiled_loss(model) is not None
    assert keras_internals.compiled_loss(keras.Sequential([L.Dense(1)])) is None
    value = keras_internals.loss_of_batch(model, X, Y, tf.ones([4, 1]), None, training=True)
    assert float(value) == 1.0
    assert keras_internals.loss_tracker(model) is model.metrics[0]
    assert keras_internals.takes_training(model)
    assert float(keras_internals.scaled_penalty(model, tf.constant(2.0))) == 2.0


def test_loss_and_metrics_are_built():
    model = compiled()
    keras_internals.build_loss_and_metrics(model, (tf.constant(X), tf.constant(Y)))
    before = len(model.metrics_variables)
    model.fit(X, Y, verbose=0)
    assert len(model.metrics_variables) == before > 0


def test_steps_of_execution():
    seen = []
    model = compiled()
    model.compile("sgd", "mse", steps_per_execution=2)
    ends = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    model.fit(X, Y, batch_size=1, verbose=0, callbacks=[ends])
    firsts = [0, 2]
    steps = [keras_internals.steps_of_execution(model, a, b) for a, b in zip(firsts, seen)]
    assert steps == [2, 2]


@pytest.mark.parametrize(
    "optimizer, kind",
    [
        (keras.optimizers.Adam(), "momentums"),
        (keras.optimizers.Adam(), "velocities"),
        (keras.optimizers.Adam(amsgrad=True), "velocity_hats"),
        (keras.optimizers.RMSprop(), "velocities"),
        (keras.optimizers.Adagrad(), "accumulators"),
    ],
)
def test_slots(optimizer, kind):
    model = compiled(optimizer)
    model.fit(X, Y, verbose=0)
    found = keras_internals.slots(optimizer, kind)
    assert [v.shape for v in found] == [v.shape for v in model.trainable_variables]


def test_strategies():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        inside = keras.Variable(1.0)
    assert keras_internals.is_of_strategy(strategy, inside)
    ran = []
    keras_internals.on_each_replica(strategy, ran.append, (1,))
    assert ran == [1]


def test_converters():
    def twice(node):
        return keras_internals.vectorised(2 * node.stacked_input(0))

    x = tf.constant([1.0, 2.0])
    with keras_internals.converters({"Sin": twice}):
        assert tf.vectorized_map(tf.sin, x, fallback_to_while_loop=False).numpy().tolist() == [2, 4]
    np.testing.assert_allclose(tf.vectorized_map(tf.sin, x), np.sin(x), rtol=1e-6)


def test_operation_like():
    def same(node):
        inputs = [node.stacked_input(0), tf.constant(1)]
        (out,) = keras_internals.operation_like(node, "Cumsum", inputs)
        return keras_internals.vectorised(out)

    x = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    with keras_internals.converters({"Cumsum": same}):
        found = tf.vectorized_map(lambda v: tf.cumsum(v, 0), x, fallback_to_while_loop=False)
    assert found.numpy().tolist() == [[1.0, 3.0], [3.0, 7.0]]


def test_not_vectorised_goes_to_a_loop():
    def never(node):
        raise keras_internals.not_vectorised("for a test")

    with keras_internals.converters({"Sin": never}):
        found = tf.vectorized_map(tf.sin, tf.constant([1.0]))
    np.testing.assert_allclose(found, np.sin([1.0]), rtol=1e-6)


def test_onednn():
    assert isinstance(keras_internals.onednn_is_on(), bool)


def test_a_part_that_is_gone_is_named():
    with pytest.raises(RuntimeError, match=rf"Keras {re.escape(keras.__version__)}.*no SGD._gone"):
        keras_internals.slots(keras.optimizers.SGD(), "gone")
