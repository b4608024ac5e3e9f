"""What comes of bad arguments: clear errors, foreign ones, silence.

    python benchmarks/bad_arguments.py

The table is that of `tests/bad_arguments.py`. Prints the counts, and each case that is not clear.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import collections
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import bad_arguments as table  # noqa: E402


def main():
    counts: collections.Counter = collections.Counter()
    for case in table.cases():
        found = table.outcome(case)
        kind = found.partition(":")[0]
        counts[kind] += 1
        if kind != "clear":
            print(f"{table.described(case)}: {found}", flush=True)
    tried = sum(counts.values())
    print(f"{tried} tried: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return int(counts["silent"] > 0 or counts["foreign"] > 0.02 * tried)


if __name__ == "__main__":
    sys.exit(main())
