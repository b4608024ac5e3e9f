"""Tasks of keras_hub, which preprocess in fit, evaluate and predict. Run where it is installed."""

import keras
import numpy as np
import pytest
import side_by_side
from situations import Situation

import tf_gsnr

keras_hub = pytest.importorskip("keras_hub")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, [12, 16, 16, 3]).astype("float32")
CLASSES = RNG.integers(0, 2, 12)
SENTENCES = np.array(["the film was good", "the film was bad", "good film"] * 4)
MARKS = np.array([1, 0, 1] * 4)
WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "film", "was", "good", "bad"]
IDS = RNG.integers(1, 11, [12, 6])


def classifier():
    backbone = keras_hub.models.VGGBackbone([1], [4], image_shape=(16, 16, 3))
    rescaling = keras.layers.Rescaling(1 / 255)
    return keras_hub.models.ImageClassifier(backbone, num_classes=2, preprocessor=rescaling)


def text():
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=WORDS, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
        dropout=0.1,
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor)


def language_model():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=11,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=6,
    )
    return keras_hub.models.GPT2CausalLM(backbone)


def how(**options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return dict(optimizer=keras.optimizers.SGD(0.01), loss=loss, **options)


def given_tokens():
    mask = np.ones_like(IDS)
    mask[::2, 4:] = 0
    x = {"token_ids": IDS, "padding_mask": mask.astype(bool)}
    weight = mask.astype("float32")
    return dict(x=x, y=np.roll(IDS, -1, 1), sample_weight=weight, batch_size=4)


def as_is(kind, make, data, **more):
    return Situation(kind, make, how, data, **more)


SITUATIONS = {
    "image classifier": as_is(
        "a task with a preprocessor", classifier, lambda: dict(x=PIXELS, y=CLASSES, batch_size=4)
    ),
    "text classifier on strings": as_is(
        "a task on strings", text, lambda: dict(x=SENTENCES, y=MARKS, batch_size=4)
    ),
    "language model with a tied embedding": as_is(
        "preprocessed data", language_model, given_tokens, tolerance=1e-4
    ),
}


@pytest.fixture(scope="module")
def plain():
    return {name: side_by_side.trained(s, False) for name, s in SITUATIONS.items()}


@pytest.mark.parametrize("name", SITUATIONS)
def test_fit(name, plain):
    situation = SITUATIONS[name]
    ours = side_by_side.trained(situation, True)
    side_by_side.check_same_training(ours, plain[name], situation.tolerance)
    side_by_side.check_shown(ours.history, plain[name].history)


@pytest.mark.parametrize("name", ["image classifier", "language model with a tied embedding"])
def test_moments(name):
    """On what the task's preprocessor gives, against the loop over batches of one."""
    keras.utils.set_random_seed(1)
    model = SITUATIONS[name].make()
    x, y, weight = side_by_side.few(SITUATIONS[name])
    preprocessor, model.preprocessor = model.preprocessor, None
    if preprocessor is not None:
        x = keras.ops.convert_to_numpy(preprocessor(x))
    model.compile(**how())
    truth = side_by_side.loop_moments(model, x, y, weight)
    try:
        side_by_side.check_moments(model, x, y, weight, truth)
    except ValueError as error:  # weights per token
        if weight is None or not side_by_side.is_refusal(error):
            raise


@pytest.mark.parametrize("name", ["image classifier", "text classifier on strings"])
def test_loss_of_raw_data(name):
    """`gradient_moments` of the arrays that the task itself takes: evaluate's loss, or refused."""
    keras.utils.set_random_seed(1)
    model = SITUATIONS[name].make()
    model.compile(**how())
    data = SITUATIONS[name].data()
    theirs = model.evaluate(data["x"], data["y"], verbose=0, return_dict=True)["loss"]
    try:
        moments = tf_gsnr.gradient_moments(model, data["x"], data["y"])
    except ValueError as error:
        if not side_by_side.is_refusal(error):
            raise
        return
    np.testing.assert_allclose(float(moments.loss), theirs, rtol=1e-3)


def test_task_stays_a_task():
    model = classifier()
    watched = tf_gsnr.GSNRModel(model)
    assert watched is model
    assert isinstance(watched, keras_hub.models.ImageClassifier)
    assert watched.preprocessor is not None
