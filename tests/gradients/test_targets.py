"""Which targets fit a loss, however the loss is spelled."""

import dataclasses

import keras
import numpy as np
import pytest

import tf_gsnr

X = np.random.default_rng(0).normal(size=[6, 4]).astype("float32")
Y = np.random.default_rng(1).uniform(0.1, 0.9, [6, 3]).astype("float32")


def network():
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(3, "sigmoid")])


@pytest.mark.parametrize("kind", ["Huber", "LogCosh", "Poisson", "KLDivergence", "Tversky"])
@pytest.mark.parametrize("spelled", ["name", "function", "class", "instance"])
def test_a_loss_is_known_however_it_is_spelled(kind, spelled):
    """Targets [n, 1, 3] against outputs [n, 3] would broadcast to [n, n, 3]: nonsense."""
    loss = getattr(keras.losses, kind)
    function = loss().fn
    loss = {"name": function.__name__, "function": function, "class": loss, "instance": loss()}
    with pytest.raises(ValueError, match="^y: "):
        tf_gsnr.gradient_moments(network(), X, Y[:, None], loss[spelled])


@dataclasses.dataclass
class Scaled:
    """A loss with a setting: compared by value, so that Python gives it no hash."""

    scale: float

    def __call__(self, y_true, y_pred):
        return self.scale * keras.losses.mean_squared_error(y_true, y_pred)


def test_a_loss_without_a_hash():
    model = network()
    scaled = tf_gsnr.gradient_moments(model, X, Y, Scaled(2.0))
    plain = tf_gsnr.gradient_moments(model, X, Y, "mse")
    np.testing.assert_allclose(scaled.mean[0], 2 * plain.mean[0], rtol=1e-5)
    tf_gsnr.GSNRModel(model).compile("sgd", Scaled(2.0))
    model.fit(X, Y, verbose=0)


def test_weights_that_do_not_fit_the_values_of_the_loss():
    """Keras cannot weight [n, t] values by [n]."""
    model = keras.Sequential([keras.Input([4, 3]), keras.layers.Dense(2)])
    x, y = np.ones([6, 4, 3], "float32"), np.ones([6, 4, 2], "float32")
    with pytest.raises(ValueError, match=r"sample_weight \[6\]"):
        tf_gsnr.gradient_moments(model, x, y, "mse", sample_weight=np.ones(6, "float32"))
