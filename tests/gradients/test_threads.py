"""Several threads on one model: each finds what it would find alone, and nobody sees the others."""

import threading

import keras
import numpy as np

import tf_gsnr
from tf_gsnr import keras_internals

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=[24, 8]).astype("float32"), RNG.normal(size=[24, 2]).astype("float32")


def network():
    layers = [L.Dense(6, "tanh"), L.BatchNormalization(), L.Reshape([3, 2])]
    return keras.Sequential([keras.Input([8]), *layers, L.LSTM(4), L.Dense(2, "sigmoid")])


def in_threads(functions):
    """What each of the functions returns or raises, all run at once."""
    results = [None] * len(functions)

    def run(k):
        try:
            results[k] = functions[k]()
        except Exception as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=[k]) for k in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_calls_of_several_threads():
    model = network()
    options = [
        dict(),
        dict(sign_counts=True),
        dict(engine="vectorized"),
        dict(batch_size=7),
        dict(training=True, seed=1),
    ]

    def of(o):
        return lambda: tf_gsnr.gradient_moments(model, X, Y, "mse", **o)

    alone = [of(o)() for o in options]
    tf_gsnr.forget(model)
    before = model(X).numpy()
    ended, wrong, looked = threading.Event(), [], []

    def look():
        while not ended.is_set():
            looked.append(1)
            if not np.array_equal(model(X).numpy(), before):
                wrong.append(1)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        together = in_threads([of(o) for o in options])
    finally:
        ended.set()
        watcher.join()
    for a, b in zip(alone, together):
        for u, v in zip(a.mean + a.m2, b.mean + b.m2):
            np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-7)
    assert len(looked) > 10 and not wrong
    assert not any("call" in vars(layer) for layer in model.layers)


def test_replaced_for_one_thread_only():
    layer = L.Dense(1)
    usual = layer.call
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with keras_internals.replaced([(layer, "call", lambda _: "theirs")]):
            inside.set()
            leave.wait()
            seen.append(keras_internals.function_of(layer, "call"))

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    assert keras_internals.function_of(layer, "call") == usual
    with keras_internals.replaced([(layer, "call", lambda _: "ours")]):
        assert keras_internals.function_of(layer, "call") == "ours"
        with keras_internals.replaced([(layer, "call", lambda before: before + " too")]):
            assert keras_internals.function_of(layer, "call") == "ours too"
        leave.set()
        thread.join()
        assert keras_internals.function_of(layer, "call") == "ours"
    assert seen == ["theirs"]
    assert "call" not in vars(layer)
