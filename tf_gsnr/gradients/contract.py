"""What every engine takes, gives and leaves alone.

g[n] is the gradient of example n's own loss: never divided by the batch size, times its sample
weight, without weight penalties. The model is left as it was found: the pass is made in a
`keras.StatelessScope`, so that what a layer assigns (a seed, a moving average) stays in it; the
variables that it reads are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras

from tf_gsnr.moments import Moments


class Measured(NamedTuple):
    """What an engine finds on one batch.

    Attributes:
      losses: `[batch]`, each example's own loss.
      moments: of the valid examples' gradients, in the order of `model.trainable_variables`.
      sums: `sums.Sums` of the groups for which they were asked in the place of moments.
    """

    losses: Any
    moments: Moments
    sums: Any = None


class Measure(Protocol):
    """Measures a batch of examples whose number is fixed by the shapes, in a graph or outside."""

    def __call__(self, x, y, sample_weight=None, valid=None, seeds=None) -> Measured:
        """What is found.

        Args:
          x, y: nested tensors with a leading axis of examples, as model and loss take them.
          sample_weight: per-example (or per-position) factors of the loss; None for 1.
          valid: bool `[batch]`, False for padding, which counts for nothing; None for all.
          seeds: a value per variable of `network.seeds(model)`; None for their current values.
        """
        ...


class Engine(Protocol):
    """Makes a `Measure` for a model and a loss."""

    def __call__(
        self,
        model: keras.Model,
        loss: Callable,
        *,
        sign_counts: bool = False,
        training: bool = False,
        batch_norm: str = "frozen",
        contributions: bool = False,
        wide: bool = False,
    ) -> Measure:
        """The measure.

        Args:
          loss: of `losses.of_batch`.
          sign_counts, training, batch_norm, contributions: as in `gradient_moments`.
          wide: whether gradients are scaled before they are squared, and moments are float64.
        """
        ...
