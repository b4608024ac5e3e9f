"""How a run is ended from outside: by signals, and by faults of disk and network."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading


def fault(error: OSError, flags: dict) -> str:
    """A fault of the system in a line: the path, the flag, what to do.

    Args:
      error: what was raised.
      flags: name -> directory, of the flags that name one; the first is the one that is written to.

    >>> fault(OSError(28, "No space left on device", "/data/x"), {"runs_dir": "/data"})[:60]
    '/data/x: No space left on device (--runs_dir=/data). What wa'
    """
    path = str(error.filename or "")
    named = [name for name, value in flags.items() if value and path.startswith(str(value))]
    flag = (named or list(flags))[0]
    where = f"{path}: " if path else ""
    return (
        f"{where}{error.strerror or error} (--{flag}={flags[flag]}). What was written is "
        "valid: when that is mended, the same command goes on from there"
    )


_HEARD: list[int] = []  # signals that have asked the program to end


def heed():
    """Raises the KeyboardInterrupt of a signal that was asked for and got lost.

    Python drops what is raised while it collects garbage or calls a finaliser.
    """
    if _HEARD:
        raise KeyboardInterrupt


@contextlib.contextmanager
def signals(wanted: bool = True):
    """SIGTERM and SIGHUP end the program as Ctrl-C does; a second one ends it at once.

    Args:
      wanted: False leaves signals as they are.
    """
    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before: dict = {}

    def stop(number, frame):
        if _HEARD:
            os.write(2, b"\nstopped at once\n")
            os._exit(1)
        _HEARD.append(number)
        raise KeyboardInterrupt

    def dropped(unraisable):  # said by Python, with a traceback; `heed` sees to it
        if not (_HEARD and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            hook(unraisable)

    hook = sys.unraisablehook
    if wanted and threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(getattr(signal, n), stop) for n in names}
        sys.unraisablehook = dropped
    try:
        yield
    finally:
        _HEARD.clear()
        sys.unraisablehook = hook
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
