"""When to measure: small objects that say of a step whether it is due. They measure nothing.

A schedule is called with the number of steps done so far, 0 before the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tf_gsnr import checks

MOST = 10**6  # steps that can be listed


@dataclass(frozen=True)
class Schedule:
    """A named rule `step -> bool`. Anything else that is callable like that will do as well."""

    name: str
    rule: Callable[[int], bool]

    def __call__(self, step: int) -> bool:
        if type(step) is not int:
            step = checks.integer("step", step)
        return bool(self.rule(step))


def linear(every: int, start: int = 0) -> Schedule:
    """Every so many-th step from `start` on.

    >>> [step for step in range(10) if linear(3, start=1)(step)]
    [1, 4, 7]
    """
    every = checks.positive_integer("every", every)
    start = checks.integer("start", start, 0, expected="an integer from 0 on")
    return Schedule(
        f"linear({every}, start={start})",
        lambda step: step >= start and (step - start) % every == 0,
    )


def logarithmic(per_decade: int = 10) -> Schedule:
    """Step 0, then steps evenly spaced in the logarithm: so many for each factor of ten.

    >>> [step for step in range(120) if logarithmic(3)(step)]
    [0, 1, 2, 5, 10, 22, 46, 100]
    """
    per_decade = checks.positive_integer("per_decade", per_decade)

    def due(step):
        if step < 1:
            return step == 0
        k = round(math.log10(step) * per_decade)
        return any(round(10 ** (i / per_decade)) == step for i in (k - 1, k, k + 1))

    return Schedule(f"logarithmic({per_decade})", due)


def listed(steps: Iterable[int]) -> Schedule:
    """These steps.

    >>> [step for step in range(10) if listed([0, 7])(step)]
    [0, 7]
    """
    expected = "integers from 0 on, at least one"
    if isinstance(steps, (str, bytes, dict)) or not isinstance(steps, Iterable):
        checks.refuse("steps", steps, expected)
    try:
        found = list(itertools.islice(steps, MOST + 1))
    except TypeError:  # 0-d arrays
        checks.refuse("steps", steps, expected)
    if len(found) > MOST:
        raise ValueError(f"steps: more than {MOST:,}; expected {expected}")
    known = frozenset(checks.integer("steps", step, 0, expected=expected) for step in found)
    if not known:
        checks.refuse("steps", found, expected)
    return Schedule(f"listed({sorted(known)})", lambda step: step in known)
