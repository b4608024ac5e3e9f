"""What is known of a model from the training steps that were made: what may be served, and how.

A step's trace notes, a step's logs bring back what it saw, and `learn` draws the conclusions, in
Python, between two steps. Index letters: n example.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from tf_gsnr.gradients import conservation, contract, independence, layerwise, losses

CHECKS = "gsnr_checks"  # the entry of a step's logs that `learn` reads


@dataclasses.dataclass
class Plan:
    """What is known of a model from the steps that were made.

    Attributes:
      whole: layers that are observed from outside; see `layerwise.whole_layers`.
      served: `id(variable) -> ` whether the gradient of its regulariser is to be added to the sum
        over its examples. These variables agreed with the ordinary gradient.
      unmeasured: `id(variable) -> ` why it is not measured.
      folds: `(id(layer), k) -> ` rows per example of the layer's k-th call.
      layers: of the outputs that the first step looked at, in order.
      folded: the layers of which an example has several rows, call by call.
      reasons: `id(variable) -> ` why no rule and no fallback measures it, of the last trace.
      missed: variables that no call accounts for, of the last trace.
      settled: whether the first step is done.
      hides_batch_size: whether the batch size is not known when Keras traces its step.
      sizes_vary: whether the sizes of examples differ from batch to batch (lengths of sequences).
      contributions: what lets examples act on each other, or None.
    """

    whole: list
    served: dict = dataclasses.field(default_factory=dict)
    unmeasured: dict = dataclasses.field(default_factory=dict)
    folds: dict = dataclasses.field(default_factory=dict)
    layers: list = dataclasses.field(default_factory=list)
    folded: list = dataclasses.field(default_factory=list)
    reasons: dict = dataclasses.field(default_factory=dict)
    missed: list = dataclasses.field(default_factory=list)
    settled: bool = False
    sizes_vary: bool = False
    hides_batch_size: bool = False
    contributions: str | None = None

    def pending(self, variables) -> list:
        known = {*self.served, *self.unmeasured}
        return [j for j, v in enumerate(variables) if id(v) not in known]


def plan_for(model) -> Plan:
    return Plan(layerwise.whole_layers(model))


def first_checks(model, plan, tape, found, data, n) -> dict:
    """Whether examples act on each other, and where the rows of each call are."""
    x, y, predictions, sample_weight = data
    if not isinstance(n, int):
        return {}
    norms = contract.batch_norm_layers(model)
    layers, outputs = ((), ()) if norms else _looked_at(found.outputs)
    plan.layers = list(layers)
    folded = [call for call in found.calls if call.used and call.folded]
    plan.folded = [call.layer for call in folded]
    places, counts = {}, {}
    for call in found.calls:
        k = counts[id(call.layer)] = counts.get(id(call.layer), -1) + 1
        places[id(call.layer), k] = call.fold
    known = {key: fold for key, fold in places.items() if isinstance(fold, int)}
    plan.folds = {key: f for key, f in known.items() if f == 1 or not plan.sizes_vary}
    if n < 2:
        return {}
    firsts = [next(z for z in tf.nest.flatten(call.output) if z.shape.rank) for call in folded]
    looked_at = [*outputs, *firsts]
    seen = independence.rows_seen(tape, predictions, looked_at, n) if looked_at else []
    pairs = [(-1.0, 0.0) if s is None else (s.own, s.foreign) for s in seen]
    checks = {"rows": tf.stack([tf.stack(p) for p in pairs])} if pairs else {}

    def loss(x, y, predictions, sample_weight, training):
        return model._compute_loss(x, y, predictions, sample_weight, training=training)

    loss.uses_inputs = True
    try:
        errors = independence.loss_apart(loss, x, y, predictions, sample_weight, True, n)
    except Exception:  # a loss of the user's that takes whole batches only
        errors = []
    return checks | ({"loss": tf.stack(errors)} if errors else {})


MOST = 24  # outputs looked at: what a layer mixes shows at every output before it


def _looked_at(outputs) -> tuple:
    """Layers and outputs, some of many, evenly spaced from the first on."""
    if not outputs:
        return (), ()
    every = -(-len(outputs) // MOST)
    return tuple(zip(*outputs[::every]))


def learn(model, plan: Plan, checks: dict) -> list[str]:
    """Takes what a step's checks say into the plan; returns what the user is to be told."""
    told = []
    variables = model.trainable_variables
    status = checks.get("status")
    if not plan.settled:
        told += _learn_rows(model, plan, checks)
    plan.whole, unseen = layerwise.wider(model, plan.whole, plan.missed)
    for variable in unseen:
        why = plan.reasons.get(id(variable), "it is used outside the call of its own layer")
        plan.unmeasured.setdefault(id(variable), why)
        told.append(f"{variable.path} is not measured: {why}")
    promoted = {id(v) for v in plan.missed} - {id(v) for v in unseen}
    for j in plan.pending(variables) if status is not None else []:
        variable, found = variables[j], int(status[j])
        if id(variable) in promoted:
            continue
        if found in (conservation.AGREES, conservation.PENALISED):
            plan.served[id(variable)] = found == conservation.PENALISED
        elif found == conservation.DIFFERS:
            why = plan.reasons.get(
                id(variable),
                "what passes through its layer is not the whole of its gradient: it is used "
                "outside the call of its own layer as well",
            )
            plan.unmeasured[id(variable)] = why
            told.append(f"{variable.path} is not measured: {why}")
    plan.settled, plan.missed = True, []
    return told


def _learn_rows(model, plan, checks) -> list[str]:
    """Which calls have rows that are not the examples' in turn; whether examples act on others."""
    rows = np.asarray(checks["rows"]) if "rows" in checks else np.zeros([0, 2])
    seen = [independence.Seen(*row) if row[0] >= 0 else None for row in rows]
    told = []
    for layer, one in zip(plan.folded, seen[len(plan.layers) :]):
        if one is None or independence.are_scrambled(one):
            why = f"the rows of layer {layer.name!r} cannot be told to be the examples' in turn"
            for variable in layer.trainable_variables:
                plan.unmeasured[id(variable)] = why
                told.append(f"{variable.path} is not measured: {why}")
    norms = contract.batch_norm_layers(model)
    mixing = independence.mixing_layer(plan.layers, seen[: len(plan.layers)])
    mixing = norms[0] if norms else mixing
    if mixing is not None:
        plan.contributions = f"layer {mixing.name!r} ({type(mixing).__name__})"
    if "loss" in checks and (np.asarray(checks["loss"]) > 1e-3).any():
        plan.contributions = f"the loss {losses.names_of(model)!r}"
    if plan.contributions:
        told.append(
            f"{plan.contributions} lets the examples of a batch act on each other. Training is "
            "Keras's; what is shown is of the examples' contributions to the batch's gradient"
        )
    return told
