"""Goes through the configurations of an experiment, past those that are complete."""

from __future__ import annotations

import time

from tf_gsnr import progress, records
from tf_gsnr.descent import devices
from tf_gsnr.experiments.framework.experiment import Workbench


def go_through(experiment, settings, configurations, source, directory, **how):
    """Runs the configurations that are not complete and writes their records.

    Args:
      experiment: its module; see `experiments`.
      settings: the experiment's.
      configurations: those to run, of all that the settings have.
      source: the opened data set.
      directory: the `records.RunDirectory`, which knows what is complete.
      **how: to go about it: of the `Workbench`, `engine`, `jit_compile`, `replicas` and
        `strategy`.
    """
    works = [experiment.work(c, settings) for c in configurations]
    bar = progress.Progress(sum(works))
    bench = Workbench(source, directory, bar, traced={}, **how)
    written = directory.records()
    if bench.strategy is not None:
        done = [[c, sorted(records.measured_epochs(c, written))] for c in configurations]
        devices.check_same_start(bench.strategy, [directory.settings, done], directory.path)
    for index, (configuration, work) in enumerate(zip(configurations, works)):
        epochs = records.measured_epochs(configuration, written)
        if set(experiment.epochs(settings)) <= epochs:
            bar.skip(work)
            continue
        text = ", ".join(f"{k}={v}" for k, v in configuration.items())
        bar.advance(0, f"{text} | starting")
        begin = time.monotonic()
        try:
            for record in experiment.run(configuration, settings, bench):
                if record["epoch"] not in epochs:
                    directory.append(record)
        finally:
            seconds = time.monotonic() - begin
            directory.add_seconds(seconds)
        bar.say(f"configuration {index + 1} of {len(configurations)}: {text} in {seconds:.0f} s")
