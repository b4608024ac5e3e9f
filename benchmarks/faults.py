"""What a run survives: kills at random moments, damaged files, two at once, a full disk.

    python benchmarks/faults.py [--kills 30] [--seed 0] [--only kills,damage,rest]

Needs no data: small runs of every experiment, and a training with `GSNRCallback` and a `run_dir`.
A killed run is started again by the same command until it ends by itself; its records must then be
those of a run that nobody disturbed, digit for digit, none lost and none twice. Prints a line per
kind of fault: how many were tried, how many came right. Exits with 1 if one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tf_gsnr import records  # noqa: E402

DATA = """
import numpy as np

def blobs(data_dir):
    rng = np.random.default_rng(0)
    def part(n):
        y = rng.integers(0, 3, n)
        return rng.normal(size=[n, 8, 8, 1]).astype("float32") + y[:, None, None, None], y
    return part(400), part(200)
"""
# A script as a user has it: Keras's own way to go on after a kill, and our records beside it.
TRAINING = """
import sys, keras, tf_gsnr
run = sys.argv[1]
keras.utils.set_random_seed(0)
from faults_data import blobs
(x, y), test = blobs(None)
model = keras.Sequential([keras.Input([8, 8, 1]), keras.layers.Flatten(),
                          keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(True))
model.fit(x, y, 20, epochs=8, shuffle=False, verbose=0, callbacks=[
    keras.callbacks.BackupAndRestore(run + ".backup"),
    tf_gsnr.GSNRCallback(x, y, every_epochs=1, test_data=test, run_dir=run)])
"""

BLOBS = ["--dataset=faults_data:blobs"]
COMMANDS = {
    "osgr": ["--dataset=toy", "--n=60,120", "--p_random=0,0.3", "--width=6", "--training_sets=3"]
    + ["--at_epochs=0,5,500", "--test_size=100", "--unseen"],
    "dynamics": [*BLOBS, "--model=logistic_regression", "--n=200", "--epochs=6", "--batch_size=20"]
    + ["--probe=100", "--test_size=100", "--repeats=2"],
    "freezing": ["--n=60", "--test_size=100", "--repeats=3"],
    "weights": [*BLOBS, "--n=100", "--width=6", "--epochs=40", "--every=2", "--term_every=10"]
    + ["--learning_rate=0.1", "--repeats=3"],
}
COMPARED_NOT = {"seconds"}


class Bench:
    """Runs commands in a folder of its own and counts what came right."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        self.failed = 0
        (folder / "faults_data.py").write_text(DATA)
        (folder / "training.py").write_text(TRAINING)

    def start(self, *line, **options):
        paths = os.pathsep.join([str(ROOT), str(self.folder)])
        more = {"PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        return subprocess.Popen(
            [sys.executable, *map(str, line)],
            cwd=self.folder,
            env=os.environ | more,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def experiment(self, name, run, *more, runs=None, **options):
        where = [f"--runs_dir={runs or self.folder / 'runs'}", f"--name={run}"]
        line = ["-m", "tf_gsnr.main", f"--experiment={name}", *COMMANDS[name], *where, *more]
        return self.start(*line, **options)

    def finished(self, process):
        """`(exit code, what it said)`."""
        said = process.communicate(timeout=600)[1]
        return process.returncode, said

    def tell(self, what, tried, right, note=""):
        self.failed += right < tried
        print(f"{what:<66} {tried:>4} {right:>5}  {note}", flush=True)


def rows(path):
    kept = [{k: v for k, v in r.items() if k not in COMPARED_NOT} for r in read(path)]
    return json.dumps(kept)  # in which NaN is equal to itself


def read(path):
    return records.read_records(path)


def kills(bench, count):
    """SIGKILL at random moments, from the first line of Python to the last."""
    kinds = [*COMMANDS, "callback"]
    shares = [count // len(kinds) + (i < count % len(kinds)) for i in range(len(kinds))]
    for kind, share in zip(kinds, shares):

        def begin(run, kind=kind):
            if kind == "callback":
                return bench.start("training.py", run), bench.folder / run
            return bench.experiment(kind, run), bench.folder / "runs" / run

        begun = time.monotonic()
        process, path = begin(f"{kind}-whole")
        code, said = bench.finished(process)
        assert code == 0, said
        takes, whole = time.monotonic() - begun, rows(path)
        right = done = lost = 0
        run = 0
        while done < share:
            name, struck = f"{kind}-{run}", 0
            while True:  # the same command until it ends by itself
                process, path = begin(name)
                wait = bench.random.uniform(0.1, 1.0) * takes
                try:
                    if done + struck >= share:
                        wait = 600.0
                    process.communicate(timeout=wait)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    struck += 1
                    # Keras's backup is gone once the training has ended: it would begin again.
                    if kind == "callback" and path.exists() and rows(path) == whole:
                        break
            ended = process.returncode in (0, -signal.SIGKILL)  # the latter after its last record
            same = ended and rows(path) == whole
            lost += abs(len(read(path)) - whole.count('"epoch"'))
            right, done, run = right + struck * same, done + struck, run + 1
        bench.tell(f"SIGKILL, {kind}", done, right, f"{run} runs, {lost} records lost or twice")


def damage(bench):
    """Files of a run that was killed, damaged; then the same command."""
    process = bench.experiment("dynamics", "whole")
    assert bench.finished(process)[0] == 0
    whole = rows(bench.folder / "runs" / "whole")
    path = bench.folder / "runs" / "stopped"
    process = bench.experiment("dynamics", "stopped")
    while not ((path / "checkpoint.npz").exists() and len(read(path)) >= 3):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.communicate()
    for file, ways in (("checkpoint.npz", CHECKPOINT), ("records.jsonl", RECORDS)):
        right, notes = 0, []
        for name, way in ways.items():
            copy = shutil.copytree(path, bench.folder / "runs" / f"{file}-{name}".replace(" ", "_"))
            way(copy / file, bench.random)
            code, said = bench.finished(bench.experiment("dynamics", copy.name))
            if file == "checkpoint.npz" or name in ("cut in the last line", "whole"):
                good = code == 0 and rows(copy) == whole
            else:  # told, and the run is as it was: without that line the command goes on
                good = code in (1, 2) and "records.jsonl, line" in said and "Traceback" not in said
            right += good
            notes += [] if good else [name]
        bench.tell(f"{file} damaged", len(ways), right, ", ".join(notes))


def _write(content):
    return lambda file, rng: file.write_bytes(content)


def _cut(share):
    def way(file, rng):
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return way


def _flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _pickled(file, rng):
    np.savez(file, values=np.array([{"a": 1}], object))


def _arrays(change):
    def way(file, rng):
        with np.load(file) as saved:
            arrays = dict(saved)
        change(arrays, sorted(arrays)[rng.randrange(len(arrays))])
        np.savez(file, **arrays)

    return way


def _line(change):
    def way(file, rng):
        lines = file.read_text().splitlines(keepends=True)
        k = rng.randrange(len(lines))
        lines[k : k + 1] = change(lines[k])
        file.write_text("".join(lines))

    return way


CHECKPOINT = {
    "empty": _write(b""),
    "one byte": _write(b"P"),
    "text": _write(b"not a checkpoint\n" * 100),
    "zeros": _write(bytes(5000)),
    "cut at a tenth": _cut(0.1),
    "cut in the middle": _cut(0.5),
    "cut at the end": _cut(0.999),
    "a bit flipped": _flip,
    "another bit": _flip,
    "a third": _flip,
    "pickled": _pickled,
    "lacks an array": _arrays(lambda arrays, name: arrays.pop(name)),
    "another shape": _arrays(lambda arrays, name: arrays.update({name: np.ones(3)})),
    "other values": _arrays(lambda arrays, name: arrays.update(epoch=np.array(3))),
}
RECORDS = {
    "cut in the last line": _cut(0.98),
    "whole": lambda file, rng: None,
    "a line cut": _line(lambda line: [line[: len(line) // 2] + "\n"]),
    "a line twice": _line(lambda line: [line, line]),
    "a list": _line(lambda line: ["[1, 2]\n"]),
    "a number": _line(lambda line: ["7\n"]),
    "an empty line": _line(lambda line: [line, "\n"]),
    "zeros": _line(lambda line: ["\0\0\0\n"]),
    "a field missing": _line(lambda line: [line.replace('"epoch"', '"epcoh"')]),
    "a field that is a list": _line(
        lambda line: [line.replace('"epoch": ', '"x": [1], "epoch": ')]
    ),
    "of another run": _line(lambda line: [line, '{"a": 1}\n']),
}


def rest(bench):
    """Two at once, directories of others, divergence, one seed, repeated values, a full disk."""
    runs = bench.folder / "runs"

    def case(what, good, said=""):
        bench.tell(what, 1, int(bool(good)), "" if good else said.strip()[-200:])

    long = ["--at_epochs=40000", "--replicas=1"]  # beside 0, 5 and 500, of 4 configurations
    for what, more in (("the same command", []), ("one with --overwrite", ["--overwrite"])):
        name = f"two{len(more)}"
        both = [bench.experiment("osgr", name, *long, *m) for m in ([], more)]
        (code, said), (other, told) = (bench.finished(process) for process in both)
        good = sorted([code, other]) in ([0, 1], [0, 2]) and len(read(runs / name)) == 16
        case(f"{what} at the same time", good and "is writing there" in said + told, said + told)

    other = runs / "other"
    other.mkdir()
    (other / "config.json").write_text('{"module": "keras", "registered_name": "Functional"}')
    code, said = bench.finished(bench.experiment("osgr", "other", "--overwrite"))
    case("--overwrite of a saved model's directory", code and len(list(other.iterdir())) == 1, said)
    for name in ("../x", "/abs", "."):
        code, said = bench.finished(bench.experiment("osgr", name))
        case(f"--name={name}", code == 2 and "inside --runs_dir" in said, said)

    half = runs / "half"
    half.mkdir()
    (half / "config.json.12345.partial").write_text('{"set')
    (half / "lock").write_text("")
    code, said = bench.finished(bench.experiment("osgr", "half"))
    case("a directory whose making was stopped", code == 0 and len(read(half)) == 12, said)

    diverging = ["--learning_rate=1e6", "--p_random=0", "--at_epochs=0,50"]
    for time_of in ("first", "second"):
        code, said = bench.finished(bench.experiment("osgr", "diverging", *diverging))
        case(f"divergence, the {time_of} time", code == 3 and "4 of 4 config" in said, said)

    code, said = bench.finished(bench.experiment("weights", "one", "--repeats=1"))
    case("weights with --repeats=1", code == 0 and (runs / "one" / "summary.json").exists(), said)
    repeated = ["--n=60,60,60,120", "--p_random=0,0.3"]
    code, said = bench.finished(bench.experiment("osgr", "repeated", *repeated))
    case("--n=60,60,60,120", code == 0 and len(read(runs / "repeated")) == 12, said)

    code, said = bench.finished(bench.experiment("osgr", "x", runs="/etc/passwd"))
    good = code in (1, 2) and "Traceback" not in said and "--runs_dir" in said
    case("--runs_dir=/etc/passwd", good, said)

    def small_disk():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    code, said = bench.finished(bench.experiment("osgr", "full", preexec_fn=small_disk))
    good = code == 1 and "Traceback" not in said and "--runs_dir" in said
    code, again = bench.finished(bench.experiment("osgr", "full"))
    good &= code == 0 and len(read(runs / "full")) == 12
    case("no room on the disk, then room", good, said)

    process = bench.experiment("osgr", "gone")
    while not (runs / "gone" / "records.jsonl").exists():
        time.sleep(0.01)
    shutil.rmtree(runs / "gone")
    code, said = bench.finished(process)
    case("the directory gone in mid-run", code == 1 and "Traceback" not in said, said)

    evil = runs / "evil"
    shutil.copytree(runs / "half", evil)
    config = json.loads((evil / "config.json").read_text())
    config["settings"]["experiment"] = "runs.evil.evil"
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text("open('ran', 'w')")
    for line in (["-m", "tf_gsnr.report", evil], ["-m", "tf_gsnr.main", f"--replay={evil}"]):
        code, said = bench.finished(bench.start(*line))
        good = code and "is not imported unless" in said.replace("\n", " ")
        good = good and not (bench.folder / "ran").exists()
        case(f"a run that names code, {line[1]}", good, said)

    for by in ("SIGTERM", "SIGHUP", "SIGINT"):
        process = bench.experiment("osgr", f"by-{by}", "--at_epochs=0,5,40000")
        while not (runs / f"by-{by}" / "plan.json").exists():
            time.sleep(0.01)
        time.sleep(bench.random.uniform(0.5, 5))
        process.send_signal(getattr(signal, by))
        code, said = bench.finished(process)
        good = code == 1 and "goes on from here" in said and "Traceback" not in said
        case(f"{by} at a random moment", good, said)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="kills,damage,rest")
    args = parser.parse_args()
    print(f"{'fault':<66} {'tried':>4} {'right':>5}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.seed)
        for part in args.only.split(","):
            {"kills": lambda: kills(bench, args.kills), "damage": lambda: damage(bench)}.get(
                part, lambda: rest(bench)
            )()
    return int(bench.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
