"""The front door: python -m tf_gsnr COMMAND.

  run --flagfile=flags/quickstart.flags   an experiment of the paper, or one of your own
  report [RUN ...]                        a page of runs; runs/report.html by default
  page RUN [RUN ...]                      the page of a training of your own, or of several
  list [RUNS]                             experiments, flagfiles, and runs with their state
  help                                    this

More of run and report: python -m tf_gsnr run --help, python -m tf_gsnr report --help.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tf_gsnr import checks, lookup, progress

COMMANDS = ("run", "report", "page", "list", "help")


def main(argv=None):
    """Does what the arguments say; see the module's docstring."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["help"]
    if command in ("run", "report"):
        module = {"run": "tf_gsnr.main", "report": "tf_gsnr.report"}[command]
        sys.argv = [f"tf_gsnr {command}", *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif command == "page":
        _page(rest)
    elif command == "list":
        from tf_gsnr import listing

        directory = _arguments(command, rest, most=1)
        if directory and not Path(directory[0]).is_dir():
            progress.stop(f"list: no such directory {directory[0]!r}: expected that of runs", 2)
        print(listing.text(*directory))
    elif command in ("help", "--help", "-h", "-help"):
        _arguments("help", rest, most=0)
        print(__doc__.strip())
    else:
        progress.stop(
            f"unknown command {command!r}{lookup.suggestion(command, COMMANDS)}\n{__doc__.strip()}",
            2,
        )


def _arguments(command, given, most=None):
    """The directories given to a command, at most so many."""
    for k, value in enumerate(given):
        readable = value.strip() and value.isprintable() and not value.startswith("-")
        if not readable or most is not None and k >= most:
            expected = "directories" if most is None else f"{most} directory"
            progress.stop(f"{command}: unexpected {checks.shown(value)}; expected {expected}", 2)
    return given


def _page(directories):
    from tf_gsnr import status

    _arguments("page", directories)
    if not directories:
        progress.stop("page: expected the run_dir of a training, or several", 2)
    try:
        print(status.page(*directories))
    except ValueError as error:
        progress.stop(f"error: {error}", 1)


if __name__ == "__main__":
    main()
