"""Figure 5c by layer: the numbers against a plain loop, the readings and their verdicts."""

import keras
import numpy as np
import pytest
from keras import layers
from test_dynamics import FLAT, RISING, SIGNS, made_up

from tf_gsnr import experiments
from tf_gsnr.experiments.dynamics import sign_readings, signs
from tf_gsnr.moments import Moments
from tf_gsnr.plots.claims import FAILS, HOLDS, PARTLY

DYNAMICS = experiments.load("dynamics")


def small_net():
    return keras.Sequential(
        [
            keras.Input([6, 6, 1]),
            layers.Conv2D(2, 3, name="conv1"),
            layers.DepthwiseConv2D(2, name="conv2"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(),
            layers.Dense(3, name="output"),
        ],
        name="net",
    )


def test_by_layer_against_a_loop():
    """Gradients of random signs and zeros, of other odds in each layer; one parameter is dead."""
    model = small_net()
    rng, n = np.random.default_rng(0), 9
    gradients = [
        rng.normal(0.2 * k, 1, [n, *v.shape]) * (rng.random([n, *v.shape]) < 0.6)
        for k, v in enumerate(model.trainable_variables)
    ]
    gradients[0][:, 0, 0, 0, 0] = 0
    found = signs.by_layer(Moments.of(gradients, np.zeros(n), sign_counts=True).numpy(), model)

    plain, corrected, of_all = {}, {}, []
    for variable, gradient in zip(model.trainable_variables, gradients):
        layer = variable.path.split("/")[1]
        for of_parameter in gradient.reshape(n, -1).T:
            up, down = (of_parameter > 0).sum(), (of_parameter < 0).sum()
            if up + down:
                plain.setdefault(layer, []).append(max(up, down) / (up + down))
                of_all.append(max(up, down) / n)
            if up + down > 1:
                pairs = (up + down) * (up + down - 1)
                agree = (up * (up - 1) + down * (down - 1)) / pairs
                corrected.setdefault(layer, []).append(agree)
    kinds = dict(conv1="convolution", conv2="convolution", norm="other", output="other")
    for name, of_layer in (("same_sign_plain", plain), ("same_sign", corrected)):
        for layer, values in of_layer.items():
            assert found[f"{name}/{kinds[layer]}/net/{layer}"] == pytest.approx(np.mean(values))
        inner = [of_layer["conv1"], of_layer["conv2"]]
        means = {k: np.mean(v) for k, v in of_layer.items()}
        assert found[f"{name}/layers"] == pytest.approx(np.mean(list(means.values())))
        assert found[f"{name}/convolutions"] == pytest.approx(np.mean(sum(inner, [])))
        by_layer = np.mean([means["conv1"], means["conv2"]])
        assert found[f"{name}/convolution_layers"] == pytest.approx(by_layer)
    assert found["same_sign_of_all/mean"] == pytest.approx(np.mean(of_all))
    assert len(found) == 2 * (4 + 3) + 1


def test_without_convolutions_their_means_are_left_out():
    model = keras.Sequential([keras.Input([2]), layers.Dense(1, use_bias=False, name="line")])
    rows = np.array([[1.0, 1], [2, -1], [-1, 1]]).reshape(3, 2, 1)
    found = signs.by_layer(Moments.of([rows], np.zeros(3), sign_counts=True).numpy(), model)
    assert found["same_sign_plain/layers"] == pytest.approx(2 / 3)
    assert not [name for name in found if "convolution" in name]


def layered(records, convolution, dense):
    """The records with the numbers of a convolution and a dense layer, by epoch."""
    for r in records:
        p, q = convolution[r["epoch"]], dense[r["epoch"]]
        numbers = {"convolution/net/conv": p, "other/net/dense": q, "convolutions": p, "layers": q}
        for name, value in (numbers | {"mean": q}).items():
            r[f"same_sign_plain/{name}"] = value + 0.001 * r["seed"]
            r[f"same_sign/{name}"] = 0.5 + 0.5 * (2 * value - 1) ** 2
    return records


def test_a_corrected_agreement_on_the_scale_of_a_share():
    records = layered(made_up("net", 3, 0.0, RISING, SIGNS), SIGNS, [0.6] * 5)
    epochs, values = sign_readings.shares(records, "same_sign/convolutions")
    np.testing.assert_allclose(values, [SIGNS, SIGNS])
    assert epochs.tolist() == [0, 1, 2, 3, 4]
    assert sign_readings.shares(records, "same_sign/nothing")[1].size == 0


def test_each_reading_has_its_verdict():
    falling = [0.6, 0.6, 0.59, 0.58, 0.57]
    little = [0.5, 0.5, 0.505, 0.51, 0.515]
    for convolution, expected in ((SIGNS, HOLDS), (little, PARTLY), (falling, FAILS)):
        real = layered(made_up("net", 3, 0.0, RISING, SIGNS), convolution, falling)
        random = layered(made_up("net", 3, 1.0, FLAT, SIGNS), [0.52] * 5, falling)
        verdicts = {c.claim: c for c in sign_readings.claims("net", real, random)}
        conv, whole = (
            next(c for k, c in verdicts.items() if f"(majority's sign, {of})" in k)
            for of in ("convolutions' parameters", "all parameters")
        )
        assert (conv.verdict, whole.verdict) == (expected, FAILS)
        assert "random labels 52.0% at the end" in conv.ours
        assert "conv 50%, dense 60%" in whole.why or convolution is falling
        if expected == HOLDS:
            nearest = whole.why.partition("The reading nearest to the paper's numbers: ")[2]
            assert "convolutions" in nearest and "(50.0% to 56.0%" in nearest


def test_the_figure_by_layer():
    real = layered(made_up("net", 3, 0.0, RISING, SIGNS), SIGNS, [0.85] * 5)
    assert "majority's sign, dense  85.0%" in DYNAMICS.table(real)
    drawn = DYNAMICS.figure(real)
    axis = drawn.axes[1]
    assert {"above: dense 85%", "conv"} <= {line.get_label() for line in axis.lines}
    assert [k for *_, k in sign_readings.layers(real, "same_sign_plain")] == [True, False]
