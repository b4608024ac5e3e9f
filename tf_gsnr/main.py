r"""Runs an experiment of "Understanding Why Neural Networks Generalize Well Through GSNR of
Parameters" (Liu et al., ICLR 2020).

  python -m tf_gsnr.main --flagfile=flags/quickstart.flags
  python -m tf_gsnr.main --flagfile=flags/mnist_small.flags --data_dir=DIR

What it makes is in runs/<name>/: config.json, records.jsonl (a line a measurement), summary.json
and figures/. The same command again goes on where the last one stopped. Ctrl-C is safe at any time.

Grids are comma-separated or repeated: --n=500,1000 --n=2000. One on the command line replaces the
flagfile's. What is not given is the paper's value for the data set.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

# Convolutions on a CPU are several times faster with oneDNN, which TensorFlow turns on by itself
# only where the CPU has AVX-512; it must be chosen before TensorFlow is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging  # noqa: E402

from tf_gsnr import __version__, plots, progress, records  # noqa: E402
from tf_gsnr.experiments import EXPERIMENTS  # noqa: E402

FLAGS = flags.FLAGS


class _List(flags.ArgumentParser):
    """Comma-separated numbers."""

    def __init__(self, number):
        self.number = number
        self.syntactic_help = f"a comma separated list of {number.__name__} numbers"

    def parse(self, argument):
        if isinstance(argument, (int, float)):
            return [self.number(argument)]
        try:
            return [self.number(part) for part in str(argument).split(",") if part.strip()]
        except ValueError:
            raise ValueError(
                f"{argument!r} is not a comma separated list of {self.number.__name__} numbers"
            ) from None

    def flag_type(self):
        return f"list of {self.number.__name__}"


class _ListSerializer(flags.ArgumentSerializer):
    def serialize(self, value):
        return ",".join(map(str, value))


def _define_grid(name, number, help_text):
    flags.DEFINE_multi(_List(number), _ListSerializer(), name, None, help_text)


flags.DEFINE_string(
    "experiment",
    "osgr",
    f"Which experiment: {', '.join(EXPERIMENTS)}, or a module of your own "
    "(docs/your_own_experiment.md).",
)
flags.DEFINE_string(
    "dataset",
    "mnist",
    "toy (generated), mnist, cifar10 or another image-classification data set of TensorFlow "
    "Datasets; or module:function, a function of your own, (data_dir) -> ((x_train, y_train), "
    "(x_test, y_test)).",
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
flags.DEFINE_integer(
    "seed", 0, "Of the initial weights, the training sets and the label noise.", lower_bound=0
)
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
)
flags.DEFINE_string(
    "model",
    None,
    "Which network (dynamics: several, comma-separated): a name in tf_gsnr/models.py, or "
    "module:function, a function of your own, (input_shape, outputs, width) -> keras.Model. "
    "Default: the paper's for the data set.",
)
flags.DEFINE_enum(
    "strategy",
    "none",
    ["none", "mirrored", "multi_worker"],
    "osgr: the devices that share out each training set: none, one device; mirrored, all of this "
    "machine; multi_worker, those of all processes of TF_CONFIG, each of which runs this command "
    "(docs/measuring_your_model.md). Process i > 0 writes into <name>-worker<i>.",
)
flags.DEFINE_bool(
    "unseen",
    False,
    "osgr: estimate both sides of the ratio once more, from the same weights, by training sets "
    "that the models have not seen: is it their adaptation that parts the two sides? Measurements "
    "then take half as long again, and more.",
)
_define_grid("n", int, "Training-set sizes.")
_define_grid("p_random", float, "Probabilities with which a label is replaced by a random one.")
_define_grid("width", int, "Widths of the network: p of tables 2 and 3, hidden units on toy data.")
_define_grid(
    "epochs",
    int,
    "Gradient-descent iterations at which both sides are measured; dynamics, weights: how many.",
)
flags.DEFINE_integer("training_sets", None, "M, the training sets a configuration has.")
flags.DEFINE_float("learning_rate", None, "lambda, the step of full-batch gradient descent.")
flags.DEFINE_integer("test_size", None, "Test examples. Default: the whole test set.")
flags.DEFINE_integer(
    "batch_size",
    None,
    "Examples a micro-batch, for speed and memory only; dynamics, weights: examples a step of SGD.",
)
flags.DEFINE_integer("probe", None, "dynamics: training examples measured on. Default: all.")
flags.DEFINE_integer("steps", None, "freezing: gradient-descent steps.")
flags.DEFINE_integer("every", None, "Steps (freezing) or epochs (others) between measurements.")
flags.DEFINE_integer("term_every", None, "weights: epochs between evaluations of (28); 0: none.")
flags.DEFINE_integer("repeats", None, "freezing, dynamics, weights: seeds, from --seed on.")
flags.DEFINE_float(
    "initial_scale",
    None,
    "freezing: standard deviation of the initial weights; dynamics: factor of the last layer's.",
)
flags.DEFINE_float("toy_input_scale", 1.0, "Toy data: inputs are uniform on +- this [ours].")
flags.DEFINE_float("toy_noise_scale", 0.01, "Toy data: noise is uniform on +- this [ours].")
flags.DEFINE_string(
    "shard",
    None,
    "i/k: only every k-th configuration from the i-th on (0 <= i < k), into <name>-<i>of<k>; "
    "python -m tf_gsnr.report joins the shards.",
)


# What any experiment may be given, whether its records depend on it or not.
GENERAL = ["experiment", "dataset", "data_dir", "runs_dir", "name", "overwrite", "seed", "engine"]
GENERAL += ["jit_compile", "replicas", "strategy", "shard"]


def parse_flags(argv):
    """absl's parser, but a grid given on the command line replaces the flagfile's."""
    from_file, direct = [], []
    for place, argument in enumerate(argv[1:], 1):
        of_file = "flagfile" in (argument.lstrip("-"), argv[place - 1].lstrip("-"))
        of_file |= argument.lstrip("-").startswith("flagfile=")
        (from_file if of_file else direct).append(argument)
    try:
        FLAGS([argv[0], *from_file])
        for name in FLAGS:
            if isinstance(FLAGS[name], flags.MultiFlag):
                FLAGS[name].present = 0  # the next value given starts the list anew
        return FLAGS([argv[0], *direct])
    except flags.Error as error:
        sys.exit(f"{error}\nSee {Path(argv[0]).name} --help")


def _flag_values(names):
    values = {}
    for name in names:
        if name in FLAGS:
            value = FLAGS[name].value
            if isinstance(FLAGS[name], flags.MultiFlag) and value is not None:
                value = [number for part in value for number in part]
            values[name] = value
    return values


def _check_flags(fields):
    """Raises ValueError where a flag is given that the experiment, of these settings, lacks."""
    for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__]):
        if flag.value != flag.default and flag.name not in (*GENERAL, *fields):
            raise ValueError(
                f"--{flag.name}: the experiment {FLAGS.experiment!r} has no such setting; it has "
                f"{', '.join(fields)}"
            )


def _shard():
    """Which configurations to run, and what the run directory's name says of it."""
    if FLAGS.shard is None:
        return slice(None), ""
    try:
        i, k = map(int, FLAGS.shard.split("/"))
    except ValueError:
        i, k = 0, 0
    if not 0 <= i < k:
        raise ValueError(f"--shard={FLAGS.shard}: expected i/k with 0 <= i < k, such as 0/4")
    return slice(i, None, k), f"-{i}of{k}"


def _strategy(experiment):
    """The strategy of the flag, or None."""
    from tf_gsnr.descent import devices as data_parallel

    if FLAGS.strategy == "none":
        return None
    if FLAGS.replicas is not None:
        raise ValueError(
            f"--replicas={FLAGS.replicas} with --strategy={FLAGS.strategy}: there, models train "
            "one after the other, each on all devices; leave one of the two flags out"
        )
    return data_parallel.strategy(FLAGS.strategy, getattr(experiment, "STRATEGIES", ()))


def _environment(engine, jit_compile):
    import keras
    import numpy
    import tensorflow as tf

    devices = [
        tf.config.experimental.get_device_details(d).get("device_name", d.device_type)
        for d in tf.config.list_physical_devices()
    ]
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "flags": _flag_values(
            f.name for f in FLAGS.get_key_flags_for_module(sys.modules[__name__])
        ),
        "versions": {
            "tf_gsnr": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "devices": devices,
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "engine": engine,
        "jit_compile": jit_compile,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _processor():
    """The processor's name, as Linux tells it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _name():
    return FLAGS.name or f"{FLAGS.experiment}_{FLAGS.dataset}".replace(":", ".").replace("/", "-")


def run(argv):
    """Runs the experiment that the flags describe and returns its run directory."""
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}: every option is a --flag=value")
    from tf_gsnr import data, experiments  # imports TensorFlow
    from tf_gsnr.descent import devices as data_parallel
    from tf_gsnr.experiments.framework import runner
    from tf_gsnr.gradients import engines

    experiment = experiments.load(FLAGS.experiment)
    _quieten_tensorflow()
    strategy = _strategy(experiment)  # before anything else of TensorFlow runs
    engines.check_name(FLAGS.engine)
    jit = {"auto": "auto", "true": True, "false": False}[FLAGS.jit_compile]
    jit = engines.resolve_jit_compile(jit)
    _check_flags(experiment.Settings._fields)
    settings = experiment.settings(**_flag_values(experiment.Settings._fields))
    configurations = experiment.configurations(settings)
    part, suffix = _shard()
    worker = data_parallel.worker(strategy)
    suffix += f"-worker{worker}" if worker else ""
    chosen = configurations[part]
    if not chosen:
        raise ValueError(f"--shard={FLAGS.shard}: there are {len(configurations)} configurations")
    options = dict(input_scale=FLAGS.toy_input_scale, noise_scale=FLAGS.toy_noise_scale)
    source = data.load(FLAGS.dataset, FLAGS.data_dir, **options)
    sizes = getattr(settings, "n", None) or 0
    largest = max(sizes) if isinstance(sizes, list) else sizes
    unseen = bool(getattr(settings, "unseen", False))
    if source.pool is not None and largest * (1 + unseen) > source.pool:
        more = " (and as many others, for --unseen)" if unseen else ""
        raise ValueError(f"--n={largest}{more}: {source.name} has {source.pool} training examples")
    directory = records.RunDirectory(
        Path(FLAGS.runs_dir) / (_name() + suffix),
        settings._asdict() | {"experiment": FLAGS.experiment},
        grown=experiment.GRID,
        overwrite=FLAGS.overwrite,
    )
    directory.write_config(_environment(FLAGS.engine, jit) | {"worker": worker})
    directory.write_plan(configurations, experiment.epochs(settings), experiment.GRID)
    progress.say(
        f"{FLAGS.experiment} on {FLAGS.dataset}: {len(chosen)} configurations into "
        f"{directory.path}; engine {FLAGS.engine}, XLA {'on' if jit else 'off'}"
        + (f", {FLAGS.strategy} devices: {strategy.num_replicas_in_sync}" if strategy else "")
    )
    options = dict(engine=FLAGS.engine, jit_compile=jit, replicas=FLAGS.replicas, strategy=strategy)
    runner.go_through(experiment, settings, chosen, source, directory, **options)
    return _finish(directory)


def _quieten_tensorflow():
    """Drops its warning of frequent tracing, which takes all networks' functions for one."""
    import tensorflow as tf

    tf.get_logger().addFilter(
        lambda record: "triggered tf.function retracing" not in record.getMessage()
    )


def _finish(directory):
    """Summary, table and figure of all records of the run."""
    found = directory.records()
    drawn = plots.load(FLAGS.experiment)
    directory.write_json("summary.json", {"experiment": FLAGS.experiment, **drawn.summary(found)})
    figure = plots.draw(
        FLAGS.experiment, found, directory.path / "figures" / f"{FLAGS.experiment}.png"
    )
    print(drawn.table(found))
    print(f"\nrecords: {directory.path / 'records.jsonl'}\nfigure:  {figure}")
    return directory


def main(argv):
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TensorFlow Datasets says much at INFO
    try:
        run(argv)
    except ValueError as error:
        logging.debug("", exc_info=True)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
