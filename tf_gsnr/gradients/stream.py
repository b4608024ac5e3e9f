"""Micro-batches through one engine, checked and merged.

Index letters: n example, j variable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_gsnr.gradients import (
    conservation,
    contract,
    distributed,
    examination,
    examples,
    losses,
    sums,
)
from tf_gsnr.moments import Moments

_ENTRIES = weakref.WeakKeyDictionary()  # model -> {options: _Entry}: a step is traced once


@dataclasses.dataclass
class _Entry:
    """What is known of a model under certain options.

    Attributes:
      step: traced, by whether moments are wide, on replicas, and which variables are added up.
      loss, strategy: kept, or their ids could become another's.
      pending: the variables that are still to be compared with their ordinary gradient.
      unfit: whether this engine was found not to measure the model right.
      wide: whether squares of the gradients would underflow in float32.
      merged: the variables whose sums would lose digits.
      told: whether the first micro-batch was asked for them.
      rounds: how often data were measured again because of such ones.
    """

    loss: Any
    strategy: Any
    pending: set
    step: dict = dataclasses.field(default_factory=dict)
    unfit: bool = False
    wide: bool = False
    merged: set = dataclasses.field(default_factory=set)
    told: bool = False
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
            used = getattr(model, "_compile_loss", None)  # made anew by each compile
        variables = model.trainable_variables
        key = (
            id(used),
            id(strategy),
            engine,
            jit_compile,
            dtype,
            *sorted(options.items()),
            *(id(v) for v in variables),
        )
        entries = _ENTRIES.setdefault(model, {})
        if key not in entries:
            pending = set(range(len(variables))) if engine == "layerwise" else {-1}
            entries[key] = _Entry(used, strategy, pending)
        self.entry = entries[key]
        self.given_loss = loss
        self.loss = losses.of_batch(model, loss)

    def all(self, data, again: bool):
        """`(moments, first example that is not finite or -1)`.

        Args:
          data: returns the micro-batches.
          again: whether it may be asked for them twice.
        """
        moments, bad, lost = self._all(data(), self._adds_up() and again)
        if not lost:
            return moments, bad
        entry = self.entry
        logging.debug("model %r: sums cancel, measured once more by merging", self.model.name)
        entry.rounds += 1
        entry.merged |= lost if entry.rounds < ROUNDS else set(range(len(moments.mean)))
        return self._all(data(), False)[:2]

    def _adds_up(self) -> bool:
        """Whether this engine adds up sums where it can, and merges moments where it must."""
        if self.engine != "layerwise" or self.strategy is not None or self.dtype is not None:
            return False
        return all(v.dtype in ("float32", "float64") for v in self.model.trainable_variables)

    def _all(self, batches, adds_up):
        """`(moments, bad, the variables that lost digits)`."""
        entry = self.entry
        state, added, totals = None, (), None
        batches = iter(batches)
        for index, batch in enumerate(batches):
            if state is None or entry.pending:
                found = self._checked(index, batch)
                state = found if state is None else _merged(state, found)
                if self.strategy is not None:
                    break
                continue
            if adds_up and totals is None and not entry.wide:
                added, totals, state = self._accumulators(*state)
            state = self._one(self._step(added), totals, *state, index, batch)
        if state is None:
            raise ValueError("x has no examples; expected at least one")
        if self.strategy is not None:
            rest = distributed.stream(
                self.strategy, self._step(), self._empty(), self.seed, batches, start=1
            )
            state = _merged(state, rest)
        if not added:
            return *state, set()
        moments, lost = totals.moments()
        lost = {j for j, wrong in zip(added, lost.numpy()) if wrong}
        return sums.joined(moments, state[0], added), state[1], lost

    def _accumulators(self, moments, bad):
        """`(the variables that are added up, their sums, the state of the others)`."""
        variables = self.model.trainable_variables
        if not self.entry.told:  # once: each new choice is traced anew
            self.entry.merged |= sums.likely_to_cancel(moments)
            self.entry.told = True
        added = tuple(j for j in range(len(variables)) if j not in self.entry.merged)
        if not added:
            return (), None, (moments, bad)
        chosen, others = sums.split(moments, added)
        signs = self.options["sign_counts"]
        totals = sums.Sums.accumulators([variables[j] for j in added], signs)
        totals.add(sums.Sums.of(chosen))
        return added, totals, (others, bad)

    def _empty(self):
        dtype = "float64" if self.entry.wide else self.dtype
        variables = self.model.trainable_variables
        empty = Moments.empty(variables, dtype, self.options["sign_counts"])
        return empty, tf.constant(-1, tf.int64)

    def _one(self, step, totals, moments, bad, index, batch):
        try:
            return step(totals, moments, bad, tf.constant(index, tf.int64), self.seed, *batch)
        except tf.errors.InvalidArgumentError as error:
            rows = examples.count(batch)
            examples.check_labels(self.model, batch[1], index * rows, error)
            raise

    def _checked(self, index, batch):
        """The state after one micro-batch alone, compared with the ordinary gradient.

        Raises:
          NotConserved: a variable's gradients do not add up.
          ValueError: examples act on each other.
        """
        first = index == 0 or self.engine == "layerwise"
        examined = self._examined(index, batch) if first and self.entry.pending else None
        if examined is not None:
            self._refuse(examined)
            self.entry.wide = self.entry.wide or _is_tiny(examined.gradients)
        state = self._one(self._step(single=True), None, *self._empty(), index, batch)
        if examined is None:
            return state
        if self.engine != "layerwise":
            self.entry.pending = set()
        elif int(state[1]) < 0 and all(
            g is None or np.isfinite(g).all() for g in examined.gradients
        ):
            self._compare(state[0], examined)
        return state

    def _examined(self, index, batch):
        options = self.options
        if options["training"] and options["batch_norm"] == "frozen":
            modes = contract.frozen_batch_norm(self.model)
        else:
            modes = contextlib.nullcontext()
        seeds = contract.seeds_for(self.model, self.seed, index)
        try:
            return examination.examine(
                self.model,
                self.loss,
                batch,
                [np.asarray(s) for s in seeds],
                modes,
                training=options["training"],
                contributions=options["contributions"],
            )
        except tf.errors.OpError as error:
            examples.check_labels(self.model, batch[1], index * examples.count(batch), error)
            if options["contributions"] or not self._works_whole(batch):
                raise
            raise ValueError(
                f"the loss {losses.name_of(self.loss)!r} of model {self.model.name!r} cannot be "
                "computed for one example at a time. To measure each example's contribution to "
                "the gradient of its micro-batch instead, pass contributions=True"
            ) from error

    def _works_whole(self, batch) -> bool:
        """Whether Keras computes the loss of the whole micro-batch."""
        x, y, sample_weight, _ = batch
        try:
            with keras.StatelessScope():
                self.loss(x, y, self.model(x, training=False), sample_weight)
        except Exception:  # whatever the user's own code raises
            return False
        return True

    def _refuse(self, examined):
        """Raises where an example has no gradient of its own, or its rows cannot be told."""
        name, options = self.model.name, self.options
        if options["contributions"]:
            return
        way_out = (
            "so an example has no gradient of its own. To measure each example's contribution to "
            "the gradient of its micro-batch instead, pass contributions=True"
        )
        if examined.loss_acts:
            raise ValueError(
                f"the loss {losses.name_of(self.loss)!r} of model {name!r} lets the examples of a "
                f"batch act on each other, {way_out}"
            )
        asked = options["training"] and options["batch_norm"] == "batch"
        if examined.mixing is not None and not asked:
            layer = examined.mixing
            raise ValueError(
                f"layer {layer.name!r} ({type(layer).__name__}) of model {name!r} lets the "
                f"examples of a batch act on each other, {way_out}"
            )
        if examined.scrambled is not None and self.engine == "layerwise":
            raise conservation.NotConserved(
                f"model {name!r}: the rows of layer {examined.scrambled.name!r} are not those of "
                "the examples in turn, so their gradients cannot be told apart: use "
                "engine='vectorized', or engine='auto', which does so by itself"
            )

    def _compare(self, moments, examined):
        n = int(moments.count)
        variables = self.model.trainable_variables
        means = [np.asarray(m, np.float64) for m in moments.mean]
        variances = [np.max(np.asarray(s, np.float64), initial=0) / n for s in moments.m2]
        ordinary = [
            np.zeros_like(mean) if g is None else g / n
            for g, mean in zip(examined.gradients, means)
        ]
        precision = conservation.precision_of(self.model)
        status = conservation.compared(variables, precision, means, ordinary, variances).numpy()
        wrong = [v.path for v, s in zip(variables, status) if s == conservation.DIFFERS]
        if wrong:
            raise conservation.NotConserved(
                f"model {self.model.name!r}: the per-example gradients of {', '.join(wrong)} do "
                "not add up to the ordinary gradient: the variable is used outside the call of its "
                "own layer, or a rule is wrong; use engine='vectorized', or engine='auto', which "
                "does so by itself"
            )
        for j, (found, gradient) in enumerate(zip(status, examined.gradients)):
            # Where the loss does not depend on it there is nothing to compare.
            nothing = gradient is None and found == conservation.ZERO
            if found == conservation.AGREES or nothing:
                self.entry.pending.discard(j)

    def _step(self, added=(), single=False):
        """A traced `(totals, moments, bad, index, seed, x, y, weight, valid) -> (moments, bad)`.

        The variables of `added` are added to the totals, in place. It holds the model by a weak
        reference only, so that the cache keeps no model alive.
        """
        wide = self.entry.wide
        replicated = self.strategy is not None and not single
        key = wide, replicated, added
        if key in self.entry.step:
            return self.entry.step[key]
        reference = weakref.ref(self.model)
        measure = self.build(
            weakref.proxy(self.model),
            losses.of_batch(weakref.proxy(self.model), self.given_loss),
            wide=wide,
            **({"summed": added} if added else {}),
            **self.options,
        )
        dtype = "float64" if wide else self.dtype

        @tf.function(jit_compile=self.jit_compile, autograph=False, reduce_retracing=False)
        def step(totals, moments, bad, index, seed, x, y, weight, valid):
            seeds = contract.seeds_for(reference(), seed, index)
            found = measure(x, y, weight, valid, seeds)
            wrong = valid & ~tf.math.is_finite(found.losses)
            here = index * tf.size(valid, tf.int64) + tf.argmax(wrong, output_type=tf.int64)
            bad = tf.where((bad < 0) & tf.reduce_any(wrong), here, bad)
            if added:
                totals.add(found.sums)
            more = found.moments if dtype is None else found.moments.astype(dtype)
            return moments.merge(more), bad

        if replicated:
            step = distributed.replicated(self.strategy, functools.partial(step, None))
        self.entry.step[key] = step
        return step


ROUNDS = 3  # of measuring again; then everything is merged
TINY = 1e-12  # squares of gradients below may underflow in float32


def _is_tiny(gradients) -> bool:
    sizes = [np.abs(g).max() for g in gradients if g is not None and g.size]
    return any(0 < size < TINY for size in sizes)


def _merged(a, b):
    """Two states `(moments, bad)` as one."""
    return a[0].merge(b[0]), tf.where(a[1] < 0, b[1], a[1])
