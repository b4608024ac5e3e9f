"""Programs that `gpu.py --export` wrote: loaded, run and timed where there is JAX, not TensorFlow.

    python benchmarks/exported.py [--seconds 5] FOLDER/NAME ...

Each is compiled for the first device that JAX sees, run on the inputs beside it, and compared with
the outputs beside it. Times are medians over rounds in which all take turns; "times" is against the
first. Exits with 1 if a program does not give what it gave in TensorFlow.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax._src.lib import xla_client  # a program of another framework has no public way in

jax.config.update("jax_enable_x64", True)  # labels are int64

WORST = 1e-2  # of the largest output; a GPU's TF32 gives about 1e-3


def loaded(stem, device):
    """`(executable, inputs, outputs in TensorFlow)`."""
    computation = xla_client.XlaComputation(Path(f"{stem}.hlo.pb").read_bytes())
    program = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    devices = xla_client.DeviceList((device,))
    options = xla_client.CompileOptions()
    executable = device.client.compile_and_load(program, devices, options)
    with np.load(f"{stem}.npz", allow_pickle=False) as arrays:
        inputs, outputs = (
            [arrays[name] for name in sorted(arrays.files) if name.startswith(kind)]
            for kind in ("in_", "out_")
        )
    return executable, [jax.device_put(v, device) for v in inputs], outputs


def run(executable, inputs):
    return jax.block_until_ready(executable.execute(inputs))


def difference(found, wanted):
    """The largest, of the largest entry of its output.

    Of outputs that are zero but for rounding (a key's bias in attention, which moves no attention),
    of a millionth of the largest output's.
    """
    pairs = [(np.asarray(a, np.float64), b) for a, b in zip(found, wanted, strict=True) if b.size]
    least = 1e-6 * max(np.abs(b).max() for _, b in pairs)
    return max(np.abs(a - b).max() / max(np.abs(b).max(), least) for a, b in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="+", metavar="FOLDER/NAME")
    parser.add_argument("--seconds", type=float, default=5, help="of timing, all together")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    stems = [stem.removesuffix(".hlo.pb") for stem in arguments.stems]
    programs, worst, times = [], [], [[] for _ in stems]
    for stem in stems:
        executable, inputs, outputs = loaded(stem, device)
        worst.append(difference(run(executable, inputs), outputs))
        programs.append((executable, inputs))
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for program, found in zip(programs, times):
            start = time.perf_counter()
            run(*program)
            found.append(time.perf_counter() - start)
    print(f"{device.device_kind}, jax {jax.__version__}")
    print("| program | ms | times | largest difference |\n|---|---|---|---|")
    medians = [statistics.median(found) for found in times]
    for stem, seconds, error in zip(stems, medians, worst):
        cells = [Path(stem).name, f"{1000 * seconds:.2f}", f"{seconds / medians[0]:.2f}"]
        print("| " + " | ".join([*cells, f"{error:.1e}"]) + " |")
    sys.exit(int(max(worst) > WORST))


if __name__ == "__main__":
    main()
