"""One writer for a directory: a lock that says who holds it, and that a dead process does not hold.

The lock is the operating system's, on the file `lock` in the directory, and goes with the process.
Within a process all may write, as its threads know of each other.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
_GUARD = threading.Lock()
_HELD: dict[Path, list] = {}  # by directory: the open file, and how many hold it in this process


class Lock:
    """Of a directory, held until `release` or the end of the process."""

    def __init__(self, directory: Path):
        self._directory = directory.resolve()
        self._held = False

    def hold(self):
        """
        Raises:
          ValueError: another process holds it; the message says which.
        """
        if self._held:
            return
        with _GUARD:
            if self._directory not in _HELD:
                _HELD[self._directory] = [_locked(self._directory), 0]
            _HELD[self._directory][1] += 1
            self._held = True

    def release(self):
        if not self._held:
            return
        with _GUARD:
            self._held = False
            entry = _HELD[self._directory]
            entry[1] -= 1
            if not entry[1]:
                del _HELD[self._directory]
                entry[0].close()

    def __del__(self):
        try:
            self.release()
        except Exception:  # when Python ends, much is gone
            pass


def hold(directory: Path) -> Lock:
    """A held lock of the directory.

    Raises:
      ValueError: another process holds it.
    """
    lock = Lock(directory)
    lock.hold()
    return lock


def _locked(directory) -> Any:
    file = open(directory / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (as long as it is held)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _said(file)
            file.close()
            raise ValueError(
                f"{directory}: {holder} is writing there. Wait for it, or give another directory"
            ) from None
    file.seek(0)
    file.truncate()
    me = {"process": os.getpid(), "host": socket.gethostname()}
    json.dump(me | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _said(file) -> str:
    try:
        file.seek(0)
        by = json.load(file)
        return f"process {by['process']} on {by['host']}, since {by['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
