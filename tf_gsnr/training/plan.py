"""What is known of a model from the training steps that were made: what is measured, and why not.

A step's trace notes, a step's logs bring back what it saw, and `learn` draws the conclusions, in
Python, between two steps. Index letters: n example.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import conservation, independence, losses, network
from tf_gsnr.gradients.layerwise import engine as layerwise

CHECKS = "gsnr_checks"  # the entry of a step's logs that `learn` reads


@dataclasses.dataclass
class Plan:
    """What is known of a model from the steps that were made.

    Attributes:
      whole: layers that are observed from outside; see `layerwise.whole_layers`.
      unmeasured: `id(variable) -> ` why it is not measured.
      folds: `(id(layer), k) -> ` rows per example of the layer's k-th call.
      uneven: `(id(layer), k)` of calls whose number of rows depends on the data.
      layers: of the outputs that the first step looked at, in order.
      called: the layers of the calls whose rows the first step looked at.
      reasons: `id(variable) -> ` why no rule and no fallback measures it, of the last trace.
      missed: variables that no call accounts for, of the last trace.
      settled: whether the first step is done.
      misplaced: whether the first step took rows for examples' that are not.
      hides_batch_size: whether the batch size is not known when Keras traces its step.
      sizes_vary: whether the sizes of examples differ from batch to batch (lengths of sequences).
      contributions: what lets examples act on each other, or None.
    """

    whole: list
    unmeasured: dict = dataclasses.field(default_factory=dict)
    folds: dict = dataclasses.field(default_factory=dict)
    uneven: set = dataclasses.field(default_factory=set)
    layers: list = dataclasses.field(default_factory=list)
    called: list = dataclasses.field(default_factory=list)
    reasons: dict = dataclasses.field(default_factory=dict)
    missed: list = dataclasses.field(default_factory=list)
    settled: bool = False
    misplaced: bool = False
    sizes_vary: bool = False
    hides_batch_size: bool = False
    contributions: str | None = None


def plan_for(model) -> Plan:
    return Plan(layerwise.whole_layers(model))


class LossPass(NamedTuple):
    """How the loss came from the outputs.

    Attributes:
      value: the loss, times what mixed precision scales it by.
      tape: persistent, sees it.
      again: `(x, y, predictions, sample_weight) -> ` the loss.
      given: what it was called with.
      operations: that it consists of; none where it is not traced.
      after: how many of the calls of layers were made before it.
    """

    value: tf.Tensor
    tape: tf.GradientTape
    again: Callable
    given: tuple
    operations: list
    after: int


def first_checks(plan, model, tape, seen_pass, loss: LossPass, n) -> dict:
    """Whether examples act on each other, and where the rows of each call are.

    Args:
      tape: persistent, of the forward pass.
      seen_pass: the `capture.Pass` of it.
      loss: what came of it.
      n: the number of examples; nothing is said where it is not known when traced.
    """
    # TensorFlow gives the gradient of a Python function once only.
    if not isinstance(n, int) or any("PyFunc" in op.type for op in operations()):
        return {}
    norms = network.batch_norms(model)
    layers, outputs = ((), ()) if norms else _looked_at(seen_pass.outputs, loss.given[0])
    plan.layers = list(layers)
    doubtful = _doubtful(seen_pass.calls, loss, n)
    plan.called = [call.layer for call in doubtful]
    places, counts = {}, {}
    for call in seen_pass.calls:
        k = counts[id(call.layer)] = counts.get(id(call.layer), -1) + 1
        places[id(call.layer), k] = call.fold
    known = {key: fold for key, fold in places.items() if isinstance(fold, int)}
    plan.folds = {key: f for key, f in known.items() if f == 1 or not plan.sizes_vary}
    if n < 2:
        return {}
    firsts = [next(z for z in tf.nest.flatten(call.output) if z.shape.rank) for call in doubtful]
    looked_at = [*outputs, *firsts]
    try:
        seen = independence.rows_seen(tape, loss.given[2], looked_at, n) if looked_at else []
        if firsts:
            _look_from_data(tape, loss.given[0], seen, firsts, n)
    except Exception:  # a gradient that cannot be taken: nothing is seen, and training goes on
        return {}
    try:
        coupling = _coupling(model, outputs, loss, n)
    except Exception:  # an op without a second gradient, a loss that does not take other outputs
        coupling = None
    rows = [(-1.0, 0.0, 0.0) if s is None else tuple(s) for s in [*seen, coupling]]
    return {"rows": tf.stack([tf.stack(r) for r in rows])}


def _doubtful(calls, loss, n) -> list:
    """The calls whose rows may be others than the examples' in turn.

    An example has several; the loss made the call; the layer has others, perhaps in another order;
    it is called on no data; or the second axis of a sequence may be the examples'. Of one that has
    a row for each nothing can be said where no output of the model has.
    """
    blind = not any(p.shape[:1] == [n] for p in independence.real(loss.given[2]))
    counts = collections.Counter(id(call.layer) for call in calls if call.used)
    outputs = [next(z for z in tf.nest.flatten(call.output) if z.shape.rank) for call in calls]
    from_data = independence.come_from(outputs, loss.given[0])

    def other(k, call, z):
        several = counts[id(call.layer)] > 1 or k >= loss.after
        return several or not from_data[k] or z.shape.rank == 3 and z.shape[1] == n

    return [
        call
        for k, (call, z) in enumerate(zip(calls, outputs))
        if call.used and (call.folded or not blind and other(k, call, z))
    ]


def _look_from_data(tape, x, seen, firsts, n):
    """Puts into the last of `seen` what calls depend on that no output of the model depends on.

    Such as are made while the loss is computed, on examples or on rows of its own. Their rows are
    compared with those of the data and of the calls that outputs do depend on.
    """
    of_calls = seen[-len(firsts) :]
    known = [v for v in tf.nest.flatten(x) if tf.is_tensor(v) and v.dtype.is_floating]
    known += [z for z, one in zip(firsts, of_calls) if one is not None]
    for k, (z, one) in enumerate(zip(firsts, of_calls), len(seen) - len(firsts)):
        if one is None:
            seen[k] = independence.rows_of(tape, z, known, n)


def _coupling(model, outputs, loss, n):
    """`independence.Seen` of the loss, or None where nothing can be said.

    A loss that keeps nothing, and cannot fail, is computed again, for other outputs and with half
    of the examples twice. Of others, and of what the model adds, a second gradient is taken.

    Args:
      outputs: of layers.
    """
    predictions = independence.sources(loss.given[2])
    adds = losses.adds(model)
    if not adds and loss.operations and not any(_keeps(op) for op in loss.operations):
        error = independence.loss_error(loss.again, *loss.given)
        return independence.Seen(tf.ones([]), tf.square(error), tf.zeros([]))
    tensors = [*outputs, *predictions] if adds else predictions
    passed = operations() if adds else loss.operations
    if any(op.type in _NOT_TWICE for op in passed):
        return None
    return independence.loss_coupling(loss.tape, loss.value, tensors, n)


def _keeps(op) -> bool:
    """Whether an operation may change or draw something, or fail, when it is made of others."""
    if op.op_def is None or op.type in (*_NOT_TWICE, *_MAY_FAIL):
        return True
    return op.op_def.is_stateful and op.type not in _READ


_MAY_FAIL = ("Cholesky", "MatrixInverse", "MatrixSolve", "MatrixTriangularSolve", "CheckNumerics")
_READ = ("ReadVariableOp", "ResourceGather")
# What may hold operations whose second gradient fails only when it is run.
_NOT_TWICE = ("While", "StatelessWhile", "PartitionedCall", "StatefulPartitionedCall")


def operations() -> list:
    """Of the graph that is being traced; none outside of one."""
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()


MOST = 24  # outputs looked at: what a layer mixes shows at every output before it


def _looked_at(outputs, x) -> tuple:
    """Layers and outputs, some of many, evenly spaced from the first on.

    Of those that come from the data: what all examples share (positions, prototypes) is no example
    that acts on others.
    """
    there = independence.come_from([z for _, z in outputs], x)
    outputs = [pair for pair, comes in zip(outputs, there) if comes]
    if not outputs:
        return (), ()
    every = -(-len(outputs) // MOST)
    return tuple(zip(*outputs[::every]))


def learn(model, plan: Plan, checks: dict, status) -> list[str]:
    """Takes what the steps so far have seen into the plan; returns what the user is to be told.

    Args:
      checks: of the first step's logs.
      status: per variable the worst that comparisons with the ordinary gradient have found.
    """
    told = []
    if not plan.settled:
        told += _learn_rows(model, plan, checks)
        plan.misplaced = bool(plan.unmeasured)
    plan.whole, unseen = layerwise.wider(model, plan.whole, plan.missed)
    wrong = []
    for variable, outcome in zip(model.trainable_variables, status):
        if outcome == conservation.DIFFERS and id(variable) not in plan.unmeasured:
            wrong.append(variable)
    for variable in [*unseen, *wrong]:
        why = plan.reasons.get(id(variable), _OUTSIDE)
        plan.unmeasured[id(variable)] = why
        told.append(f"{variable.path} is trained by its ordinary gradient, but not measured: {why}")
    plan.settled, plan.missed = True, []
    return told


_OUTSIDE = (
    "what passes through the calls of its layer does not add up to its gradient, now and then at "
    "least: it is used outside of them as well, or the layer keeps a state or rounds its numbers"
)


def _learn_rows(model, plan, checks) -> list[str]:
    """Which calls have rows that are not the examples' in turn; whether examples act on others."""
    rows = np.asarray(checks["rows"]) if "rows" in checks else np.zeros([0, 3])
    seen = [independence.Seen(*row) if row[0] >= 0 else None for row in rows]
    told = []
    coupling = seen.pop() if seen else None
    of_calls = seen[len(plan.layers) :]
    for layer, one in zip(plan.called, of_calls):
        if one is None or independence.are_scrambled(one):
            why = f"the rows of layer {layer.name!r} cannot be told to be the examples' in turn"
            for variable in layer.trainable_variables:
                if id(variable) not in plan.unmeasured:
                    told.append(f"{variable.path} is trained, but not measured: {why}")
                plan.unmeasured[id(variable)] = why
    norms = network.batch_norms(model)
    mixing = independence.mixing_layer(plan.layers, seen[: len(plan.layers)])
    mixing = norms[0] if norms else mixing
    if mixing is not None:
        plan.contributions = f"layer {mixing.name!r} ({type(mixing).__name__})"
    if coupling is not None and independence.is_foreign(coupling):
        if not losses.adds(model):
            plan.contributions = f"the loss {losses.names_of(model)!r}"
        elif mixing is None:  # through which what is added would act, too
            plan.contributions = "a loss that the model adds (add_loss)"
    if plan.contributions:
        told.append(
            f"{plan.contributions} lets the examples of a batch act on each other. Training is "
            "Keras's; what is shown is of the examples' contributions to the batch's gradient"
        )
    return told
