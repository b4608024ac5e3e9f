"""Says how far a long run is and how long it still takes, on one line."""

from __future__ import annotations

import sys
import time

from tf_gsnr import ending


class Progress:
    """Counts work done of work planned.

    Args:
      total: planned work, in any unit proportional to time.
      stream: where to write; a terminal gets one line that is rewritten, a file a line now and
        then.
    """

    def __init__(self, total: float, stream=None):
        self.total = total
        self.done = 0.0
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()
        self.skipped = 0.0
        self._terminal = self.stream.isatty()
        self._last = -float("inf")
        self._estimated = False
        self._from: tuple | None = (
            None  # time and work where the first was done, after what is traced then
        )

    def skip(self, work: float):
        """Counts work that an earlier run has done already."""
        self.done += work
        self.skipped += work

    def advance(self, work: float, text: str):
        """Counts work as done and shows `text` with the share done and the time left.

        Now and then, and as soon as the time left can be estimated: from the second piece of work
        on, since the first comes with all that is traced and compiled.

        Raises:
          KeyboardInterrupt: a signal has asked the program to end.
        """
        ending.heed()
        self.done += work
        now = time.monotonic()
        worked = self.done - self.skipped
        wanted = work > 0 and self._from is not None and not self._estimated
        if work > 0 and self._from is None:
            self._from = now, worked
        if not wanted and now - self._last < (0.2 if self._terminal else 10):
            return
        self._last = now
        self._estimated |= wanted
        elapsed = now - self.start
        share = self.done / self.total
        left = "the time left is not known yet"
        if self._from is not None and worked > self._from[1]:
            begun, before = self._from
            pace = min((now - begun) / (worked - before), elapsed / worked)
            left = f"about {clock(pace * (self.total - self.done))} left"
        line = f"{text} | {share:4.0%} done, {clock(elapsed)} elapsed, {left}"
        self.stream.write(f"\r\033[K{line}" if self._terminal else f"{line}\n")
        self.stream.flush()

    def say(self, text: str):
        """Writes a line that stays, above the one that is rewritten."""
        say(text, self.stream)


def stop(text: str, code: int = 1):
    """Ends the program with a line on stderr: 2 where it was called wrongly, else 1.

    What is too long to be read is cut in the middle.
    """
    say("\n".join(map(_cut, text.splitlines())))
    raise SystemExit(code)


def _cut(line: str) -> str:
    return line if len(line) < 1000 else f"{line[:300]} ... {line[-300:]}"


def say(text: str, stream=None):
    """Writes a line that stays."""
    stream = sys.stderr if stream is None else stream
    stream.write(f"\r\033[K{text}\n" if stream.isatty() else f"{text}\n")
    stream.flush()


def clock(seconds: float) -> str:
    """
    >>> clock(61), clock(7261), clock(3e5), clock(float("nan"))
    ('1:01', '2:01:01', '3.5 days', '?')
    """
    if seconds != seconds:
        return "?"
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def duration(seconds: float) -> str:
    """
    >>> duration(452.3), duration(9_000), duration(0.4)
    ('7 min 32 s', '2 h 30 min', '0 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
