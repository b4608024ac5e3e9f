"""No bad argument goes through, and what is said of it names it."""

import bad_arguments
import bad_flags


def test_python():
    outcomes = {}
    for case in bad_arguments.cases():
        outcomes.setdefault(bad_arguments.outcome(case), []).append(bad_arguments.described(case))
    clear = outcomes.pop("clear")
    assert outcomes == {} and len(clear) > 800


def test_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = {}
    for case in bad_flags.cases():
        outcomes.setdefault(bad_flags.outcome(case), []).append(case)
    clear = outcomes.pop("clear")
    assert outcomes == {} and len(clear) > 500
    assert list(tmp_path.iterdir()) == []  # and nothing was written
