"""Processes of a test's own: `distributed_worker.py`, once or several times at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("distributed_worker.py")


def start(mode, file, **environment):
    root = str(WORKER.parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(
        [sys.executable, str(WORKER), mode, str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, file):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-5000:]
    return json.loads(Path(file).read_text())


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
