"""Does the GSNR predict the one-step generalisation ratio? Section 2.4; figures 4, 9 and 11.

For each configuration (n, p_random, width): M training sets of n examples, one initialisation, M
models trained apart by full-batch gradient descent, one test set. At chosen epochs both sides of
(19) are estimated on the same step: the measured side by (23), from the decrease of the losses, and
the predicted side by (24), from the per-example gradients on the training sets.

(19) holds where the weights do not depend on the training set: before training, and less and less
as the models adapt to it. With `unseen`, both sides are estimated a second time, from the same
weights, by a step on as many training sets that the models have not seen: what then is left of the
difference between the two sides is not due to the adaptation. That step is taken back.

The models of several training sets train as one program where that pays (`descent.ensemble`); or
each one on many devices, with a share of its training set on each (`descent.devices`).

Index letters: t training set (1..M), r of those that train together, tau epoch (= gradient-descent
iteration), i test example.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tf_gsnr import data, models
from tf_gsnr.descent import devices, ensemble, microbatches, single
from tf_gsnr.experiments.framework.experiment import Diverged
from tf_gsnr.experiments.osgr import one_step
from tf_gsnr.experiments.osgr.settings import Settings, set_work

STRATEGIES = devices.STRATEGIES

CHECKPOINT_SECONDS = 20
PIECE_SECONDS = 2  # of descent between two looks at the clock


def run(configuration: dict, settings: Settings, workbench) -> Iterator[dict]:
    """The records of one configuration, one per epoch, once all its models are trained."""
    start = time.monotonic()
    state = _State(configuration, settings, workbench)
    while state.t < settings.training_sets:
        _descend_together(state, settings, workbench)
        state.start(state.t + len(state.rises), settings)
    for index, epoch in enumerate(settings.epochs):
        yield {
            "experiment": "osgr",
            "dataset": settings.dataset,
            "resplit": settings.resplit,
            **configuration,
            "epoch": epoch,
            "training_sets": settings.training_sets,
            "learning_rate": settings.learning_rate,
            **one_step.record(
                [rows[index] for rows in state.rows],
                state.decreases[:, index] / settings.training_sets,
                settings.learning_rate,
            ),
            "seconds": time.monotonic() - start,
        }
    workbench.directory.clear_checkpoint()


def check(settings: Settings, source):
    """Raises ValueError where the network does not fit the data."""
    width = min(settings.width)
    models.build(settings.model, source.input_shape, source.outputs, width, settings.seed)


class _State:
    """Where a configuration is: its weights, what was measured, and the checkpoint of both."""

    def __init__(self, configuration, settings, workbench):
        source = workbench.source
        self.configuration = configuration
        self.directory = workbench.directory
        self.strategy = workbench.strategy
        self.clock = devices.clock(self.strategy) if self.strategy else time.monotonic
        self.saved = self.clock()
        network = _network(configuration, settings, workbench)
        self.model, self.descent, self.initial, self.together = network
        rng = self.rng(settings, stream=1)
        x, y = source.test(settings.test_size, rng)
        # D and D' are draws of one distribution: the test labels get the same noise [ours].
        y = data.randomise(y, configuration["p_random"], source, rng)
        self.test = microbatches.of_data(x, y, settings.batch_size)
        self.rows = []  # per training set, per epoch, a dict of numbers
        # Each test example's, summed over t; by a step on the training sets, and on unseen ones.
        self.decreases = np.zeros([1 + settings.unseen, len(settings.epochs), len(y)])
        self.start(0, settings)
        self._restore(settings, workbench.progress)
        if self.strategy:
            place = [configuration, self.t, self.epoch, len(self.rows)]
            devices.check_same_start(self.strategy, place, self.directory.path)

    def start(self, t, settings):
        """The training sets from the t-th on, as many as train together, at their first epoch."""
        size = min(self.together, settings.training_sets - t)
        self.t, self.epoch = t, 0
        self.weights = [np.repeat(w[np.newaxis], size, 0) for w in self.initial]
        self.rises, self.last_loss = np.zeros(size, int), np.full(size, np.inf)

    def rng(self, settings, stream):
        """A random stream of this configuration's own."""
        c = self.configuration
        p = round(c["p_random"] * 1e6)
        return np.random.default_rng([settings.seed, c["n"], p, c["width"], stream])

    def save(self, settings):
        self.saved = self.clock()
        self.directory.save_checkpoint(
            {
                "of": [self.configuration, settings.epochs],
                "place": [self.t, self.epoch],
                "rises": self.rises,
                "last_loss": np.asarray(self.last_loss),
                "rows": self.rows,
                "decreases": self.decreases,
                "weights": [np.asarray(w) for w in self.weights],
            }
        )

    def _restore(self, settings, progress):
        saved = self.directory.load_checkpoint()
        if not saved or saved.get("of") != [self.configuration, settings.epochs]:
            return
        self.t, self.epoch = saved["place"]
        self.rises, self.last_loss = saved["rises"], saved["last_loss"]
        self.rows, self.decreases, self.weights = (
            saved[k] for k in ("rows", "decreases", "weights")
        )
        descent, measurement = set_work(self.configuration, settings)
        together = len(self.rises) * self.epoch / (settings.epochs[-1] + 1)
        progress.skip((self.t + together) * (descent + measurement))


def _network(configuration, settings, workbench):
    """The network of this width, its descent, its initial weights, and how many train together."""
    width = configuration["width"]
    if width not in workbench.traced:
        source = workbench.source
        model = models.build(
            settings.model, source.input_shape, source.outputs, width, settings.seed
        )
        loss = models.loss(settings.model, source.classes)
        how = dict(engine=workbench.engine_for(model, loss), jit_compile=workbench.jit_compile)
        learning_rate, together = settings.learning_rate, workbench.replicas
        if workbench.strategy:
            together = 1
            functions = devices.build(model, loss, learning_rate, workbench.strategy, **how)
        else:
            if together is None:
                together = settings.training_sets if ensemble.pays(model, source.input_shape) else 1
            functions = single.build_ensemble(model, loss, learning_rate, together, **how)
        if together > 1:
            workbench.progress.say(
                f"width {width}: {together} models train as one program, compiled by XLA"
            )
        workbench.traced[width] = model, functions, model.get_weights(), together
    return workbench.traced[width]


def _training_sets(state, settings, source, unseen=False):
    """Those that train together, as micro-batches: x and y with a leading axis r.

    Or as many that have no example of theirs.
    """
    c, batch_size = state.configuration, settings.batch_size
    if state.strategy:  # no device without a micro-batch
        batch_size = min(batch_size, -(-c["n"] // state.strategy.num_replicas_in_sync))
    sets = []
    for t in range(state.t, state.t + len(state.rises)):
        rng = state.rng(settings, stream=2 + t)
        if unseen:
            x, y = (v[c["n"] :] for v in source.draw(c["n"], rng, beside=c["n"]))
        else:
            x, y = source.draw(c["n"], rng)
        y = data.randomise(y, c["p_random"], source, rng)
        sets.append(microbatches.of_data(x, y, batch_size))
    x, y, (valid, *_) = zip(*sets)
    stacked = tf.stack(x), tf.stack(y), valid
    return devices.share(state.strategy, stacked) if state.strategy else stacked


def _descend_together(state, settings, workbench):
    """Trains on the sets from t on, or goes on where the checkpoint is; measures at the epochs."""
    c, size = state.configuration, len(state.rises)
    if len(state.rows) == state.t:
        state.rows += [[] for _ in range(size)]
    training_sets = _training_sets(state, settings, workbench.source)
    measured_on = [training_sets]
    if settings.unseen:
        measured_on.append(_training_sets(state, settings, workbench.source, unseen=True))
    descent_work, measurement_work = (size * work for work in set_work(c, settings))
    steps_planned = max(settings.epochs[-1] - len(settings.epochs) + 1, 1)
    text = ", ".join(f"{k}={v}" for k, v in c.items())
    sets = f"set {state.t + 1}" if size == 1 else f"sets {state.t + 1} to {state.t + size}"

    def passed(work):
        if state.clock() - state.saved > CHECKPOINT_SECONDS:
            state.save(settings)
        place = f"{sets} of {settings.training_sets}, epoch {state.epoch}"
        workbench.progress.advance(work, f"{text} | {place}")

    piece = 1
    for index in range(len(state.rows[state.t]), len(settings.epochs)):
        while state.epoch < settings.epochs[index]:
            steps = min(piece, settings.epochs[index] - state.epoch)
            begin = state.clock()
            descended = state.descent.descend(
                state.weights, training_sets, tf.constant(steps), tf.constant(state.last_loss)
            )
            weights, state.last_loss, rises = tf.nest.map_structure(np.asarray, descended)
            state.weights, state.rises = weights, state.rises + rises
            _check_losses(state, state.epoch + steps - 1, state.last_loss)
            piece = max(1, int(PIECE_SECONDS * steps / (state.clock() - begin + 1e-9)))
            state.epoch += steps
            passed(descent_work * steps / steps_planned)
        seeds = [[state.t + r, state.epoch] for r in range(size)]
        step, *others = one_step.measured(
            state.descent, state.model, state.weights, measured_on, state.test, seeds
        )
        _check_losses(state, state.epoch, step.losses)
        state.rises = state.rises + (step.losses > state.last_loss)
        for r, row in enumerate(step.rows):
            unseen = {f"unseen_{k}": v for other in others for k, v in other.rows[r].items()}
            state.rows[state.t + r].append(row | unseen | {"rises": int(state.rises[r])})
        state.decreases[:, index] += [step.decrease, *(other.decrease for other in others)]
        state.weights, state.last_loss = step.weights, step.losses
        state.epoch += 1
        passed(measurement_work / len(settings.epochs))


def _check_losses(state, epoch, losses):
    for r, loss in enumerate(losses):
        if not np.isfinite(loss):
            c = ", ".join(f"{k}={v}" for k, v in state.configuration.items())
            raise Diverged(
                f"the training loss is {loss} at epoch {epoch} of training set "
                f"{state.t + r + 1} ({c}): the descent diverged (a smaller --learning_rate?) or "
                "the data hold NaN"
            )
