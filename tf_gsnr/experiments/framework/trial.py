"""A few seconds of the largest configuration, to tell what a run will take; nothing is kept."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from typing import NamedTuple

from tf_gsnr import progress, records
from tf_gsnr.experiments.framework.experiment import Workbench

SECONDS = 8.0  # of work, after what is traced first


class Estimate(NamedTuple):
    """What a run will take, as the trial tells.

    Attributes:
      configuration: the one that was tried.
      seconds: of all that is left, without what tracing takes.
      start: seconds until the first work was done: building and tracing.
      peak: bytes that the process held at most; None where it is not known.
    """

    configuration: dict
    seconds: float
    start: float
    peak: int | None


class _Enough(Exception):
    """Ends the trial."""


class _Stopwatch(progress.Progress):
    """Notes when how much was done, and ends the trial when it tells enough."""

    def __init__(self):
        super().__init__(1.0, io.StringIO())
        self.marks = []  # (time, work done so far)

    def advance(self, work, text):
        self.done += work
        if not work:
            return
        self.marks.append((time.monotonic(), self.done))
        if self.marks[-1][0] - self.marks[0][0] > SECONDS:
            raise _Enough

    @property
    def rate(self) -> float:
        """Seconds for a unit of work, after the first; at most that of all, what is traced too."""
        (begin, before), (end, after) = self.marks[0], self.marks[-1]
        rates = [(end - self.start) / after]
        if after > before:
            rates.append((end - begin) / (after - before))
        return min(rates)


def estimate(experiment, settings, configurations, source, **how) -> Estimate:
    """Tries the largest of the configurations that are left.

    Args:
      configurations: those that are left, at least one.
      **how: of the `Workbench`.
    """
    works = [experiment.work(c, settings) for c in configurations]
    largest = configurations[works.index(max(works))]
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory() as directory:
        bench = Workbench(source, records.RunDirectory(directory, {}), watch, traced={}, **how)
        begun = time.monotonic()
        with contextlib.suppress(_Enough):
            for _ in experiment.run(largest, settings, bench):
                if time.monotonic() - begun > SECONDS and watch.marks:
                    break
    if not watch.marks:  # an experiment that tells of no work
        watch.marks.append((time.monotonic(), max(works)))
    start = watch.marks[0][0] - begun
    return Estimate(largest, sum(works) * watch.rate, start, _peak())


def _peak() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
