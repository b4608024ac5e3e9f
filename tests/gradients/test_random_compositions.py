"""Random compositions of layers, losses, masks, weights and outputs: the same, or refused by name.

`RANDOM_COMPOSITIONS=200 python -m pytest tests/gradients/test_random_compositions.py` tries more
seeds; `RANDOM_COMPOSITIONS_FROM` is the first.
"""

import os

import keras
import pytest
import random_compositions
import side_by_side

FIRST = int(os.environ.get("RANDOM_COMPOSITIONS_FROM", 0))
SEEDS = range(FIRST, FIRST + int(os.environ.get("RANDOM_COMPOSITIONS", 12)))


@pytest.mark.parametrize("seed", SEEDS)
def test_fit(seed):
    composition = random_compositions.draw(seed)
    theirs = side_by_side.trained(composition, False)
    try:
        ours = side_by_side.trained(composition, True)
    except ValueError as error:
        if not (composition.unusual and side_by_side.is_refusal(error)):
            raise
        return
    side_by_side.check_same_training(ours, theirs, composition.tolerance)
    side_by_side.check_shown(ours.history, theirs.history)


@pytest.mark.parametrize("seed", SEEDS)
def test_moments(seed):
    composition = random_compositions.draw(seed)
    keras.utils.set_random_seed(1)
    model = composition.make()
    model.compile(**composition.how())
    x, y, weight = side_by_side.few(composition)
    truth = side_by_side.loop_moments(model, x, y, weight)
    try:
        side_by_side.check_moments(model, x, y, weight, truth)
    except ValueError as error:
        if not (composition.unusual_moments and side_by_side.is_refusal(error)):
            raise
