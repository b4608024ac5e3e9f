"""One line where TensorFlow's convolutions are slow for want of an environment variable."""

import platform

import keras
import numpy as np
import pytest
from absl import logging

import tf_gsnr
from tf_gsnr import keras_internals

L = keras.layers
X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.mark.skipif(not X86, reason="oneDNN is on by itself elsewhere")
def test_this_tensorflow_tells():
    assert isinstance(keras_internals.onednn_is_on(), bool)


@pytest.mark.skipif(not X86, reason="oneDNN is on by itself elsewhere")
@pytest.mark.parametrize("way", ["moments", "fit"])
def test_said_once_where_it_is_off(way, caplog, monkeypatch):
    def said(layers, on):
        logging._log_counter_per_token = type(logging._log_counter_per_token)()
        caplog.clear()
        monkeypatch.setattr(keras_internals, "onednn_is_on", lambda: on)
        model = keras.Sequential([keras.Input([6, 6, 1]), *layers, L.Flatten(), L.Dense(2)])
        x, y = np.ones([8, 6, 6, 1]), np.zeros([8, 2])
        with caplog.at_level("WARNING"):
            for _ in range(2):
                if way == "moments":
                    tf_gsnr.gradient_moments(model, x, y, "mse")
                else:
                    measured = tf_gsnr.GSNRModel(keras.models.clone_model(model))
                    measured.compile("sgd", "mse")
                    measured.fit(x, y, verbose=0)
        return sum("TF_ENABLE_ONEDNN_OPTS=1" in r.getMessage() for r in caplog.records)

    assert said([L.Conv2D(2, 3)], False) == 1
    assert said([L.Conv2D(2, 3)], True) == said([L.Conv2D(2, 3)], None) == said([], False) == 0
