"""Bad arguments by the hundred: each is refused by an error of ours, in a line that helps."""

import bad_arguments
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_gsnr
from tf_gsnr import checks, metrics


def report(table):
    """`{verdict: [what was tried and said]}` of a whole table."""
    found = {"clear": [], "foreign": [], "silent": [], "accepted": [], "refused": []}
    for attempt in table.all_attempts():
        verdict, message = table.outcome(attempt)
        verdict = "refused" if attempt.fine and verdict != "accepted" else verdict
        found[verdict].append(f"{attempt}: {message}")
    return found


@pytest.mark.filterwarnings("ignore")  # numpy's and TensorFlow's, of nonsense
def test_every_argument():
    found = report(bad_arguments)
    assert not found["silent"] and not found["foreign"]
    assert not found["refused"]  # what the table holds to be fine
    assert len(found["clear"]) > 4500 and len(found["accepted"]) < 40


def test_verdicts():
    verdict = bad_arguments.verdict_of
    assert verdict("n=0: expected a positive integer", "n") == "clear"
    assert verdict("got an unexpected value 0", "n") == "foreign"
    assert verdict("n=0: expected\na positive integer", "n") == "foreign"
    assert verdict("mean=0: expected a positive integer", "n") == "foreign"


YES = np.bool_(True)


@pytest.mark.parametrize("three", [3, np.int32(3), np.array(3), tf.constant(3), np.uint8(3)])
def test_integers_of_all_kinds_are_integers(three):
    assert checks.positive_integer("n", three) == 3
    moments = bad_arguments.moments()
    assert tf_gsnr.osgr(moments, three) == tf_gsnr.osgr(moments, 3)
    tf_gsnr.GSNRCallback(*bad_arguments.arrays()[:2], every_epochs=three, examples=three)


@pytest.mark.parametrize(
    "rate",
    [0.5, np.float32(0.5), np.array(0.5), tf.constant(0.5), keras.Variable(0.5), tf.Variable(0.5)],
)
def test_numbers_of_all_kinds_are_numbers(rate):
    moments = bad_arguments.moments()
    assert tf_gsnr.gap_growth(moments, rate) == tf_gsnr.gap_growth(moments, 0.5)


def test_a_rate_in_a_graph():
    moments = bad_arguments.moments()
    tensors = tf.nest.map_structure(tf.constant, moments)
    growth = tf.function(lambda rate: metrics.gap_growth(tensors, tf.cast(rate, tf.float32)))
    np.testing.assert_allclose(growth(tf.constant(0.5)), metrics.gap_growth(moments, 0.5), 1e-5)


def test_paths_switches_and_weights_of_all_kinds(tmp_path):
    x, y, labels = bad_arguments.arrays()
    model, n = bad_arguments.network(), len(x)
    tf_gsnr.GSNRCallback(x, y, run_dir=str(tmp_path / "a"), overwrite=YES)
    tf_gsnr.GSNRCallback(x, y, run_dir=tmp_path / "b", log_dir=tmp_path / "c")
    plain = tf_gsnr.gradient_moments(model, x, y, "mse")
    for weight in (np.ones(n), np.ones([n, 1]), tf.ones([n]), np.ones(n, bool), np.ones(n, int)):
        weighted = tf_gsnr.gradient_moments(model, x, y, "mse", sample_weight=weight)
        np.testing.assert_allclose(weighted.mean[0], plain.mean[0], 1e-5)
    assert tf_gsnr.osgr_predicted([plain, plain]) == tf_gsnr.osgr_predicted(plain)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    ignored = np.where(np.arange(n) < 2, -1.0, labels).astype(np.float32)
    tf_gsnr.gradient_moments(model, x, ignored, loss)
