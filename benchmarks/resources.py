"""The peak memory of this process, and the time of something run again and again."""

import resource
import time
from pathlib import Path


def peak_mib() -> float:
    """Peak resident memory in MiB, since this program was started.

    `getrusage` alone would start from the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def steady(run, seconds: float = 0.3) -> float:
    """The median time of a run in seconds, when run again and again for a while.

    The first half of the runs is left out: an idle process finds cold caches and reclaimed pages.
    """
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    times = times[len(times) // 2 :]
    return sorted(times)[len(times) // 2]
