r"""Runs an experiment of "Understanding Why Neural Networks Generalize Well Through GSNR of
Parameters" (Liu et al., ICLR 2020).

  python -m tf_gsnr.main --flagfile=flags/quickstart.flags
  python -m tf_gsnr.main --flagfile=flags/mnist_small.flags --data_dir=DIR

python -m tf_gsnr.main --list says what there is; --dry_run what a run would take; --replay=RUN
runs a run again, and says what differs.

What it makes is in runs/<name>/: config.json, records.jsonl (a line a measurement), summary.json
and figures/. The same command again goes on where the last one stopped. Ctrl-C is safe at any time.

Each experiment has the flags of its settings: --experiment=dynamics --help shows those of dynamics.
Grids are comma-separated or repeated: --n=500,1000 --n=2000. One on the command line replaces the
flagfile's. What is not given is the paper's value for the data set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Convolutions on a CPU are several times faster with oneDNN, which TensorFlow turns on by itself
# only where the CPU has AVX-512; it must be chosen before TensorFlow is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")  # figures go into files

from absl import app, flags, logging  # noqa: E402

from tf_gsnr import (  # noqa: E402
    checks,
    ending,
    experiments,
    listing,
    progress,
    records,
    replay,
    running,
)
from tf_gsnr.experiments.framework.settings import fields  # noqa: E402

FLAGS = flags.FLAGS
DIRECTORIES = ("runs_dir", "data_dir")
USAGE, DIVERGED = 2, 3  # exit codes: called wrongly; ended, but some configurations diverged


class _List(flags.ArgumentParser):
    """A comma-separated list."""

    def __init__(self, kind):
        self.kind = kind
        self.syntactic_help = f"a comma separated list of {self.entries}"

    @property
    def entries(self):
        return "names" if self.kind is str else f"{self.kind.__name__} numbers"

    def parse(self, argument):
        if isinstance(argument, (int, float)):
            return [self.kind(argument)]
        try:
            entries = [self.kind(part.strip()) for part in str(argument).split(",")]
        except ValueError:
            entries = []
        if not all(str(entry) for entry in entries) or not entries:
            raise ValueError(f"{argument!r} is not a comma separated list of {self.entries}")
        return entries

    def flag_type(self):
        return f"list of {self.kind.__name__}"


class _ListSerializer(flags.ArgumentSerializer):
    def serialize(self, value):
        return ",".join(map(str, value))


flags.DEFINE_string(
    "experiment",
    "osgr",
    f"Which experiment: {', '.join(experiments.EXPERIMENTS)}, or a module of your own "
    "(docs/your_own_experiment.md).",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "Where TensorFlow Datasets keeps its data: the directory that holds mnist/. Default: TFDS's "
    "own, ~/tensorflow_datasets. What is missing is downloaded.",
)
flags.DEFINE_string("runs_dir", "runs", "Where run directories go.")
flags.DEFINE_string("name", None, "Name of the run directory. Default: <experiment>_<dataset>.")
flags.DEFINE_bool("overwrite", False, "Throw away what an earlier run left in the run directory.")
flags.DEFINE_string(
    "engine", "auto", "How per-example gradients are obtained: auto, layerwise or vectorized."
)
flags.DEFINE_enum(
    "jit_compile",
    "auto",
    ["auto", "true", "false"],
    "Compile with XLA; auto: on an accelerator and not on a CPU. Models that train together are "
    "compiled in any case: see --replicas.",
)
flags.DEFINE_integer(
    "replicas",
    None,
    "osgr: how many training sets' models train as one program, compiled by XLA; speed and memory "
    "only. Default: all of them, where the network has neither convolutions nor recurrent layers, "
    "for which it does not pay; else 1. benchmarks/experiments.py measures both.",
    lower_bound=1,
    upper_bound=100_000,
)
flags.DEFINE_enum(
    "strategy",
    "none",
    ["none", "mirrored", "multi_worker"],
    "osgr: the devices that share out each training set: none, one device; mirrored, all of this "
    "machine; multi_worker, those of all processes of TF_CONFIG, each of which runs this command "
    "(docs/measuring_your_model.md). Process i > 0 writes into <name>-worker<i>.",
)
flags.DEFINE_string(
    "shard",
    None,
    "i/k: only every k-th configuration from the i-th on (0 <= i < k), into <name>-<i>of<k>; "
    "python -m tf_gsnr.report joins the shards.",
)
flags.DEFINE_enum(
    "on_divergence",
    "skip",
    ["skip", "stop"],
    "What happens where the training of a configuration diverges: skip, it ends there, is noted in "
    "diverged.json and not tried again, the others run, and the exit code is 3; stop, all ends.",
)
flags.DEFINE_bool(
    "deterministic",
    False,
    "Only operations that give the same digits each time: slower on an accelerator, and where one "
    "has no such form, an error. A CPU gives the same digits on the same machine without it.",
)
flags.DEFINE_string(
    "replay",
    None,
    "A run directory: run again what its config.json says, into <name>-replay, then say what "
    "differs, in replay.json too. Other flags beside it replace what is said there.",
)
flags.DEFINE_bool(
    "dry_run",
    False,
    "Say what would be run, how much of it is done, and about what it will take, as a few seconds "
    "of its largest configuration tell; then stop. Nothing is written.",
)
flags.DEFINE_bool("list", False, "List the experiments, flagfiles and runs; then stop.")


_DEFINED: list[str] = []  # the flags of the experiment that was asked for last


def _define(experiment):
    """Makes the flags of an experiment's settings."""
    for name in set(_DEFINED) & set(FLAGS):
        delattr(FLAGS, name)
    _DEFINED.clear()
    for field in fields(experiment.Settings):
        default = "" if field.default is None else f" Default: {_text(field.default)}."
        about = dict(name=field.flag, default=None, help=field.setting.help + default)
        if field.is_list:
            flags.DEFINE_multi(_List(field.kind), _ListSerializer(), **about)
        elif field.kind is bool:
            flags.DEFINE_bool(**about)
        else:
            define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
            define.get(field.kind, flags.DEFINE_string)(**about)
        _DEFINED.append(field.flag)


def _text(default):
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)


def parse_flags(argv):
    """absl's parser, with the flags of the experiment that is asked for.

    A grid given on the command line replaces the flagfile's.
    """
    given, direct = [], []  # from flagfiles, and beside them
    for place, argument in enumerate(argv[1:], 1):
        of_file = "flagfile" in (argument.lstrip("-"), argv[place - 1].lstrip("-"))
        of_file |= argument.lstrip("-").startswith("flagfile=")
        (given if of_file else direct).append(argument)
    try:
        _check_flagfiles(given)
        given = FLAGS.read_flags_from_files(given)
        of = _value_in([*given, *direct], "replay")
        if of is not None:
            given = [*replay.flags(of, direct), *given]
        name = _value_in([*given, *direct], "experiment") or FLAGS["experiment"].default
        experiment = experiments.load(name)
        _define(experiment)
        before = {f.setting.before: f.flag for f in fields(experiment.Settings)}
        given, direct = ([_renamed(a, before) for a in part] for part in (given, direct))
        FLAGS([argv[0], *given])
        for flag in FLAGS:
            if isinstance(FLAGS[flag], flags.MultiFlag):
                FLAGS[flag].present = 0  # the next value given starts the list anew
        return FLAGS([argv[0], *direct])
    except flags.UnrecognizedFlagError as error:
        progress.stop(
            f"--{error.flagname}: the experiment {name!r} has no such setting; it has "
            f"{', '.join(_DEFINED)}.\n{error}\nSee {Path(argv[0]).name} --help",
            USAGE,
        )
    except flags.Error as error:
        progress.stop(f"{error}\nSee {Path(argv[0]).name} --help", USAGE)
    except ValueError as error:
        progress.stop(f"error: {error}", USAGE)


def _check_flagfiles(arguments):
    """Raises ValueError for a flagfile that is no text, or never ends."""
    for argument, after in zip(arguments, [*arguments[1:], ""]):
        flag, equals, value = argument.lstrip("-").partition("=")
        if flag != "flagfile" or not argument.startswith("-"):
            continue
        file = checks.path("--flagfile", value if equals else after, "a file of flags")
        device = file.is_char_device() or file.is_block_device()
        if device or file.is_dir():
            checks.refuse("--flagfile", str(file), "the path of a file of flags")
        if file.is_file():
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                checks.refuse("--flagfile", str(file), "a file of flags, which is text")


def _value_in(arguments, wanted):
    """What these arguments say of a flag, the last of them if several do; None if none does."""
    found = None
    for argument, after in zip(arguments, [*arguments[1:], ""]):
        flag, equals, value = argument.lstrip("-").partition("=")
        if flag == wanted and argument.startswith("-"):
            found = value if equals else after
    return found


def _renamed(argument, names):
    """The argument with the flag's name of today."""
    dashes = argument[: len(argument) - len(argument.lstrip("-"))]
    flag, equals, value = argument[len(dashes) :].partition("=")
    return f"{dashes}{names[flag]}{equals}{value}" if dashes and flag in names else argument


def _given(settings) -> dict:
    """What the flags say of an experiment's settings."""
    values = {}
    for field in fields(settings):
        value = FLAGS[field.flag].value
        if isinstance(FLAGS[field.flag], flags.MultiFlag) and value is not None:
            value = [entry for part in value for entry in part]
        values[field.name] = value
    return values


def wanted() -> running.Wanted:
    """What the flags say."""
    named: dict = {name: FLAGS[name].value for name in running.Wanted._fields if name in FLAGS}
    jit: dict = {"auto": "auto", "true": True, "false": False}
    own = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    more: dict = dict(
        given=_given(experiments.load(FLAGS.experiment).Settings),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        flags={flag.name: flag.value for flag in own},
        jit_compile=jit[FLAGS.jit_compile],
    )
    return running.Wanted(**named | more)


def plan(argv) -> running.Plan:
    """What the flags describe, checked; errors as of `running.plan`."""
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}: every option is a --flag=value")
    return running.plan(wanted())


def run(argv):
    """Runs the experiment that the flags describe and returns its run directory."""
    return running.go(plan(argv))


def main(argv):
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TensorFlow Datasets says much at INFO
    if FLAGS.list:
        print(listing.text(FLAGS.runs_dir))
        return
    try:
        with ending.signals(wanted=FLAGS.strategy == "none"):
            _do(argv)
    except OSError as error:
        logging.debug("", exc_info=True)
        progress.stop(f"error: {ending.fault(error, {f: FLAGS[f].value for f in DIRECTORIES})}")
    except KeyboardInterrupt:
        progress.stop("\nstopped; the same command goes on from here")


def _do(argv):
    try:
        planned = plan(argv)
    except ValueError as error:
        logging.debug("", exc_info=True)
        progress.stop(f"error: {error}", USAGE)
    try:
        directory = (running.tell if FLAGS.dry_run else running.go)(planned)
    except ValueError as error:
        logging.debug("", exc_info=True)
        progress.stop(f"error: {error}")
    diverged = records.read_diverged(directory.path) if directory else []
    if diverged:
        progress.stop(
            f"{len(diverged)} of {len(planned.configurations)} configurations diverged "
            f"({directory.path / 'diverged.json'}); a smaller --learning_rate, as another --name?",
            DIVERGED,
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
