"""Every situation trains as plain Keras does, or is refused by name before anything is trained."""

import pytest
import side_by_side
from situations import SITUATIONS


@pytest.mark.parametrize("name", SITUATIONS)
def test_fit(name):
    situation = SITUATIONS[name]
    if situation.fit == "raises":
        with pytest.raises(Exception) as theirs:
            side_by_side.trained(situation, False)
        with pytest.raises(type(theirs.value)):
            side_by_side.trained(situation, True)
        return
    theirs = side_by_side.trained(situation, False)
    try:
        ours = side_by_side.trained(situation, True)
    except Exception as error:
        if situation.fit == "same" or not side_by_side.is_refusal(error):
            raise
        assert error.untouched, "weights moved before it was refused"
        return
    assert situation.fit != "refused", "was trained, and should have been refused"
    side_by_side.check_same_training(ours, theirs, situation.tolerance)
    side_by_side.check_shown(ours.history, theirs.history)
