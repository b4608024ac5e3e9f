"""Bad arguments by the hundred: how many of them are refused by a line that helps.

  python benchmarks/bad_arguments.py              # counts, and what is not clear
  python benchmarks/bad_arguments.py --all        # every message

The tables are `tests/bad_arguments.py`, of the Python functions, and `tests/bad_flags.py`, of the
flags. Verdicts: clear, an error of ours in one line that names the argument and says what is
expected; foreign, any other error; silent, nonsense that is accepted; accepted, a value that the
table holds to be fine, with its reason.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
LIMIT = 10  # seconds, after which an attempt is taken to hang


def too_long(number, frame):
    raise TimeoutError(f"not refused within {LIMIT} s")


def main():
    signal.signal(signal.SIGALRM, too_long)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="print every message")
    parser.add_argument("--only", default="", help="attempts whose text begins so")
    parser.add_argument("--table", choices=["python", "flags", "both"], default="both")
    given = parser.parse_args()
    import bad_arguments
    import bad_flags

    tables = {"python": bad_arguments, "flags": bad_flags}
    for name, table in tables.items():
        if given.table in (name, "both"):
            report(name, table, given)


def report(name, table, given):
    """Tries all of a table and prints what came of it."""
    counts, start = Counter(), time.monotonic()
    for attempt in table.all_attempts():
        if not str(attempt).startswith(given.only):
            continue
        signal.alarm(LIMIT)
        verdict, message = table.outcome(attempt)
        signal.alarm(0)
        counts[verdict] += 1
        wrong = verdict in ("foreign", "silent") or attempt.fine and verdict != "accepted"
        if given.all or wrong:
            print(f"{verdict:8} {attempt}: {message[:400]!r}", flush=True)
    tried = sum(counts.values()) - counts["accepted"]
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("clear", "foreign", "silent"))
    seconds = time.monotonic() - start
    print(f"{name}: {tried} tried, {told}; {counts['accepted']} are fine ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
