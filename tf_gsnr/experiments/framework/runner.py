"""Goes through the configurations of an experiment, past those that are complete."""

from __future__ import annotations

import time

from tf_gsnr import progress, records
from tf_gsnr.descent import devices
from tf_gsnr.experiments.framework.experiment import Diverged, Workbench


def go_through(
    experiment, settings, configurations, source, directory, *, skip_diverging=True, **how
):
    """Runs the configurations that are not complete and writes their records.

    Args:
      experiment: its module; see `experiments`.
      settings: the experiment's.
      configurations: those to run, of all that the settings have.
      source: the opened data set.
      directory: the `records.RunDirectory`, which knows what is complete.
      skip_diverging: whether one whose training diverges is noted in the directory, not to be tried
        again, and the others go on; else `Diverged` is raised.
      **how: to go about it: of the `Workbench`, `engine`, `jit_compile`, `replicas` and
        `strategy`.
    """
    works = [experiment.work(c, settings) for c in configurations]
    bar = progress.Progress(sum(works))
    bench = Workbench(source, directory, bar, traced={}, **how)
    written = directory.records()
    diverged = [d["configuration"] for d in records.read_diverged(directory.path)]
    if bench.strategy is not None:
        done = [[c, sorted(records.measured_epochs(c, written))] for c in configurations]
        devices.check_same_start(bench.strategy, [directory.settings, done], directory.path)
    for index, (configuration, work) in enumerate(zip(configurations, works)):
        epochs = records.measured_epochs(configuration, written)
        if (
            set(experiment.epochs(settings)) <= epochs
            or skip_diverging
            and configuration in diverged
        ):
            bar.skip(work)
            continue
        text = ", ".join(f"{k}={v}" for k, v in configuration.items())
        bar.advance(0, f"{text} | starting")
        begin, before = time.monotonic(), bar.done
        try:
            for record in experiment.run(configuration, settings, bench):
                if record["epoch"] not in epochs:
                    directory.append(record)
        except Diverged as error:
            if not skip_diverging:
                raise
            directory.note_divergence(configuration, str(error))
            directory.clear_checkpoint()
            bar.skip(before + work - bar.done)
            bar.say(f"configuration {index + 1} of {len(configurations)}: {text} diverged: {error}")
            continue
        finally:
            seconds = time.monotonic() - begin
            directory.add_seconds(seconds)
        bar.say(f"configuration {index + 1} of {len(configurations)}: {text} in {seconds:.0f} s")
