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

from tf_gsnr import lookup, progress

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

        print(listing.text(*rest[:1]))
    elif command in ("help", "--help", "-h", "-help"):
        print(__doc__.strip())
    else:
        progress.stop(
            f"unknown command {command!r}{lookup.suggestion(command, COMMANDS)}\n{__doc__.strip()}",
            2,
        )


def _page(directories):
    from tf_gsnr import status

    if not directories:
        progress.stop("page: expected the run_dir of a training, or several", 2)
    try:
        print(status.page(*directories))
    except ValueError as error:
        progress.stop(f"error: {error}", 1)


if __name__ == "__main__":
    main()
