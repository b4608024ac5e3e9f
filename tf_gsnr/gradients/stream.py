"""Micro-batches through one engine, checked and merged.

Index letters: n example, j variable.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr import checks, keras_internals
from tf_gsnr.gradients import (
    checking,
    distributed,
    examples,
    fingerprint,
    losses,
    network,
    sums,
)
from tf_gsnr.gradients.layerwise import rules
from tf_gsnr.moments import Moments

_KNOWN = weakref.WeakKeyDictionary()  # model -> _Known: a step is traced once
MOST_ENTRIES = 8  # of a model, under other options or losses; the longest unused goes
MOST_TRACES = 16  # of an entry, for other sizes and kinds of data; then all are made anew


@dataclasses.dataclass
class _Known:
    """What is known of a model.

    Attributes:
      entries: by all that a traced step depends on, the last used last.
      restless: the attributes of layers that change while a model runs (a counter, a record of the
        last input): steps do not depend on them.
    """

    entries: dict = dataclasses.field(default_factory=dict)
    restless: set = dataclasses.field(default_factory=set)


def forget(model):
    """Forgets all that is known of a model from earlier calls; the next one traces anew."""
    checks.keras_model(model)
    _KNOWN.pop(model, None)


@dataclasses.dataclass
class _Entry:
    """What is known of a model under certain options.

    Attributes:
      step: traced, by whether moments are wide, on replicas, and which variables are added up.
      traces: of these, by what they are called with.
      loss, strategy: kept, or their ids could become another's.
      pending: the variables that are still to be compared with their ordinary gradient.
      unfit: whether this engine was found not to measure the model right.
      wide: whether squares of the gradients would underflow in float32.
      merged: the variables whose sums would lose digits.
      scale: if wide, by which the gradients are multiplied that are added up.
      told: whether a micro-batch was asked for these two.
      weighs: whether it was said that an example alone has another weight than in a batch.
      rounds: how often data were measured again because of such ones.
    """

    loss: Any
    strategy: Any
    pending: set
    step: dict = dataclasses.field(default_factory=dict)
    traces: dict = dataclasses.field(default_factory=dict)
    unfit: bool = False
    wide: bool = False
    merged: set = dataclasses.field(default_factory=set)
    scale: float = 1.0
    told: bool = False
    weighs: bool = False
    rounds: int = 0


class Stream:
    """Micro-batches through one engine, the first of them checked."""

    def __init__(self, model, loss, engine, build, jit_compile, dtype, options, strategy, seed):
        self.model, self.engine, self.jit_compile, self.dtype = model, engine, jit_compile, dtype
        self.build = build
        self.options, self.strategy = options, strategy
        self.seed = None if seed is None else tf.constant(seed, tf.int64)
        used = loss
        if loss is None:
            used = keras_internals.compiled_loss(model)  # made anew by each compile
        known = _KNOWN.setdefault(model, _Known())
        self.known, self.used = known, used
        self.attributes = fingerprint.of(model, used)
        steady = self.attributes.items()
        if known.restless:
            steady = [item for item in steady if item[0] not in known.restless]
        variables = model.trainable_variables
        key = (
            id(used),
            id(strategy),
            engine,
            jit_compile,
            dtype,
            rules.version(),
            *sorted(options.items()),
            *(id(v) for v in variables),
            *steady,
        )
        entry = known.entries.pop(key, None)
        if entry is None:
            pending = set(range(len(variables))) if engine == "layerwise" else {-1}
            entry = _Entry(used, strategy, pending)
        known.entries[key] = self.entry = entry
        while len(known.entries) > MOST_ENTRIES:
            del known.entries[next(iter(known.entries))]
        self.given_loss = loss

    @functools.cached_property
    def loss(self):
        return losses.of_batch(self.model, self.given_loss)

    @property
    def loops(self) -> bool:
        """Whether it takes several micro-batches at once: see `examples.windows`."""
        return self.engine == "layerwise" and self.strategy is None and not self.jit_compile

    def all(self, data, again: bool):
        """`(moments, first example that is not finite or -1)`.

        Args:
          data: returns the micro-batches, or windows of them.
          again: whether it may be asked for them twice.
        """
        try:
            return self._twice_if_need_be(data, again)
        finally:
            now = fingerprint.of(self.model, self.used)
            self.known.restless |= fingerprint.changed(self.attributes, now)

    def _twice_if_need_be(self, data, again):
        moments, bad, lost = self._all(data(), self._adds_up() and again)
        if not lost or bad >= 0:
            return moments, bad
        logging.debug("model %r: sums cancel, measured once more by merging", self.model.name)
        entry, before = self.entry, self.entry.merged
        everything = set(range(len(moments.mean)))
        entry.merged = before | lost if entry.rounds + 1 < ROUNDS else everything
        moments, bad, _ = self._all(data(), False)
        if all(np.isfinite(m2).all() for m2 in moments.m2):
            entry.rounds += 1
        else:  # it was not for the digits
            entry.merged = before
        return moments, bad

    def _adds_up(self) -> bool:
        """Whether this engine adds up sums where it can, and merges moments where it must."""
        if self.engine != "layerwise" or self.strategy is not None or self.dtype is not None:
            return False
        return all(v.dtype in ("float32", "float64") for v in self.model.trainable_variables)

    def _all(self, batches, adds_up):
        """`(moments, bad, the variables that lost digits)`."""
        entry, batches = self.entry, iter(batches)
        begin = list(itertools.islice(batches, 1))
        if not begin:
            raise ValueError("x has no examples; expected at least one")
        if _size(begin[0]) == 1:
            begin += itertools.islice(batches, 1)
        first, *others = [batch for window in begin for batch in _split(window)]
        checked = None
        if entry.pending or self.strategy is not None:
            checked = self._checked(0, first)
        if self.strategy is not None:
            rest = distributed.stream(
                self.strategy,
                self._step(),
                self._empty(),
                self.seed,
                itertools.chain(others, batches),
                start=1,
            )
            return *_merged(checked, rest), set()
        groups, totals, scale = (), None, None
        if adds_up and others and not entry.pending:
            groups, totals, scale = self._accumulators(checked, first)
            checked = None  # it is measured once more, that a second call finds the same
        if checked is None:
            state, index, batches = self._empty(groups), 0, itertools.chain(begin, batches)
        else:
            state, index, batches = checked, 1, itertools.chain(others, batches)
        for window in batches:
            if entry.pending:  # to be compared one by one
                for batch in _split(window):
                    state = _merged(state, self._checked(index, batch))
                    index += 1
                continue
            if _size(window) == 1 and not groups:
                window = _split(window)[0]
            step = self._step(groups, loops=window[-1].shape.rank == 2)
            state = self._one(step, totals, scale, *state, index, window)
            index += _size(window)
        if not groups:
            return *state, set()
        variables = self.model.trainable_variables
        (mean, m2, *signs), wrong = totals.moments(int(state[0].count), extreme=entry.wide)
        if entry.wide:
            mean = [np.divide(v, entry.scale, dtype="float64") for v in mean]
            m2 = [np.divide(v, entry.scale**2, dtype="float64") for v in m2]
        lost = {j for j, v in sums.apart(groups, wrong, variables).items() if v.any()}
        return sums.joined((mean, m2, *signs), state[0], groups, variables), state[1], lost

    def _accumulators(self, checked, batch):
        """`(groups of the variables that are added up, their sums, the scale if wide)`.

        Args:
          checked: the state after the first micro-batch alone, if known.
          batch: that micro-batch.
        """
        entry, variables = self.entry, self.model.trainable_variables
        if not entry.told:  # once: each new choice is traced anew
            moments = (checked or self._checked(0, batch))[0]
            entry.merged = entry.merged | sums.likely_to_cancel(moments)
            entry.scale = sums.scale_for(moments)
            entry.told = True
        chosen = [j for j in range(len(variables)) if j not in entry.merged]
        groups = sums.groups_of(variables, chosen)
        if not groups:
            return (), None, None
        totals = sums.Sums.accumulators(variables, groups, self.options["sign_counts"])
        return groups, totals, tf.constant(entry.scale) if entry.wide else None

    def _empty(self, groups=()):
        """The state of no examples, of the variables that are in no group."""
        dtype = "float64" if self.entry.wide else self.dtype
        added = {j for group in groups for j in group}
        variables = [v for j, v in enumerate(self.model.trainable_variables) if j not in added]
        empty = Moments.empty(variables, dtype, self.options["sign_counts"])
        return empty, tf.constant(-1, tf.int64)

    def _one(self, step, totals, scale, moments, bad, index, batch):
        arguments = totals, scale, moments, bad, tf.constant(index, tf.int64), self.seed
        try:
            return self._trace(step, arguments, batch)(*arguments, *batch)
        except tf.errors.InvalidArgumentError as error:
            rows = batch[-1].shape[-1]
            examples.check_labels(self.model, batch[1], index * rows, error)
            raise

    def _trace(self, step, arguments, batch):
        """The trace of a step for such data: to call it takes half the time of finding it."""
        leaves = [v for v in tf.nest.flatten(batch) if v is not None]
        if self.strategy is not None or not all(isinstance(v, tf.Tensor) for v in leaves):
            return step
        loops = batch[-1].shape.rank == 2  # over any number of micro-batches

        def kind(v):
            return tf.TensorSpec([None, *v.shape[1:]] if loops else v.shape, v.dtype)

        kinds = tf.nest.map_structure(lambda v: v if v is None else kind(v), batch)
        key = id(step), self.seed is None, str(kinds)
        if key not in self.entry.traces:
            if len(self.entry.traces) >= MOST_TRACES:
                self.entry.traces.clear()
                self.entry.step.clear()
            self.entry.traces[key] = step.get_concrete_function(*arguments, *kinds)
        return self.entry.traces[key]

    def _checked(self, index, batch):
        """The state after one micro-batch alone, compared with the ordinary gradient.

        Raises:
          NotConserved: a variable's gradients do not add up.
          ValueError: examples act on each other.
        """
        entry, examined = self.entry, None
        if entry.pending and (index == 0 or self.engine == "layerwise"):
            seeds = network.seeds_for(self.model, self.seed, index)
            examined = checking.examined(self.model, self.loss, batch, index, seeds, self.options)
            if checking.are_finite(examined.gradients):  # else the numbers say nothing
                checking.refuse(self.model, self.loss, examined, self.engine, self.options)
            entry.wide = entry.wide or checking.are_tiny(examined.gradients)
        state = self._one(self._step(single=True), None, None, *self._empty(), index, batch)
        if examined is None:
            return state
        if examined.weighs and not entry.weighs:
            entry.weighs = True
            logging.warning("%s", checking.weighs(self.model, self.loss))
        finite = int(state[1]) < 0 and checking.are_finite(examined.gradients)
        if self.engine != "layerwise":
            if finite:
                checking.refuse_unlike(self.model, batch[0], state[0], examined, self.options)
            entry.pending = set()
        elif finite:
            entry.pending -= checking.agreeing(self.model, state[0], examined.gradients)
        return state

    def _step(self, groups=(), single=False, loops=False):
        """A traced `(totals, scale, moments, bad, index, seed, *batch) -> (moments, bad)`.

        The gradients of the groups are added to the totals, in place, times the scale. It holds
        the model by a weak reference only, so that the cache keeps no model alive. If it loops,
        the batch is a window of micro-batches, of which the index is that of the first.
        """
        wide = self.entry.wide
        replicated = self.strategy is not None and not single
        key = wide, replicated, groups, loops
        if key in self.entry.step:
            return self.entry.step[key]
        reference = weakref.ref(self.model)
        measure = self.build(
            weakref.proxy(self.model),
            losses.of_batch(weakref.proxy(self.model), self.given_loss),
            wide=wide,
            **({"summed": groups} if groups else {}),
            **self.options,
        )
        dtype = "float64" if wide else self.dtype

        def one(totals, scale, moments, bad, index, seed, x, y, weight, valid):
            seeds = network.seeds_for(reference(), seed, index)
            given = {} if scale is None else {"scale": scale}
            measured = measure(x, y, weight, valid, seeds, **given)
            wrong = valid & ~tf.math.is_finite(measured.losses)
            here = index * tf.size(valid, tf.int64) + tf.argmax(wrong, output_type=tf.int64)
            bad = tf.where((bad < 0) & tf.reduce_any(wrong), here, bad)
            if groups:
                totals.add(measured.sums)
            more = measured.moments if dtype is None else measured.moments.astype(dtype)
            return moments.merge(more), bad

        def several(totals, scale, moments, bad, index, seed, *window):
            *data, valid = window
            rows = valid.shape[1]

            def body(k, moments, bad):
                part = _rows(data, k, rows)
                position = index + tf.cast(k, tf.int64)
                return k + 1, *one(totals, scale, moments, bad, position, seed, *part, valid[k])

            start = (tf.constant(0), moments, bad)
            loop = tf.while_loop(
                lambda k, *_: k < tf.shape(valid)[0], body, start, parallel_iterations=1
            )
            return loop[1:]

        step = tf.function(several if loops else one, jit_compile=self.jit_compile, autograph=False)
        if replicated:
            step = distributed.replicated(self.strategy, functools.partial(step, None, None))
        self.entry.step[key] = step
        return step


ROUNDS = 3  # of measuring again; then everything is merged


def _rows(data, k, rows):
    """The rows of the k-th micro-batch of a window."""

    def some(v):
        return tf.ensure_shape(v[k * rows : (k + 1) * rows], [rows, *v.shape[1:]])

    return tf.nest.map_structure(lambda v: v if v is None else some(v), data)


def _size(window) -> int:
    """Of how many micro-batches it is."""
    valid = window[-1]
    return valid.shape[0] if valid.shape.rank == 2 else 1


def _split(window) -> list:
    """Its micro-batches one by one."""
    *data, valid = window
    if valid.shape.rank == 1:
        return [window]
    if valid.shape[0] == 1:
        return [(*data, valid[0])]
    rows = valid.shape[1]
    return [(*_rows(data, k, rows), valid[k]) for k in range(valid.shape[0])]


def _merged(a, b):
    """Two states `(moments, bad)` as one."""
    return a[0].merge(b[0]), tf.where(a[1] < 0, b[1], a[1])
