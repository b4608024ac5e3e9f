"""`gradient_moments` of every situation: those of a loop over batches of one, or refused."""

import keras
import pytest
import side_by_side
from situations import SITUATIONS

CASES = [
    (name, engine)
    for name, situation in SITUATIONS.items()
    if situation.moments
    for engine in ("auto", *situation.engines)
]


@pytest.mark.parametrize("name, engine", CASES)
def test_moments(name, engine):
    situation = SITUATIONS[name]
    expected = situation.moments if engine == "auto" else "either"
    with side_by_side.dtype_policy(situation.policy):
        keras.utils.set_random_seed(1)
        model = situation.make()
        model.compile(**situation.how())
        x, y, weight = side_by_side.few(situation)
        truth = side_by_side.loop_moments(model, x, y, weight)
        try:
            side_by_side.check_moments(model, x, y, weight, truth, engine=engine)
        except ValueError as error:
            if expected == "same" or not side_by_side.is_refusal(error):
                raise
            return
    assert expected != "refused", "was measured, and should have been refused"
