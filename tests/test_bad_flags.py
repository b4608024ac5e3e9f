"""Bad flags by the hundred: exit code 2, and a line that names the flag."""

import subprocess
import sys

import bad_flags
import pytest
from test_bad_arguments import report


def test_every_flag():
    found = report(bad_flags)
    assert not found["silent"] and not found["foreign"]
    assert not found["refused"]
    assert len(found["clear"]) > 2500 and len(found["accepted"]) < 80


@pytest.mark.parametrize(
    "command",
    [
        ["tf_gsnr.main", "--experiment=osgr", "--dataset=toy", "--n="],
        ["tf_gsnr.report", "--html="],
        ["tf_gsnr", "page", ""],
    ],
)
def test_the_programs_themselves(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert command[-1].partition("=")[0] in done.stderr and not list(tmp_path.iterdir())
