"""The peak memory of this process."""

import resource
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
