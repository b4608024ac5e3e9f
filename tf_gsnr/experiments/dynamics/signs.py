"""How far the signs of the examples' gradients agree, by layer and by what is averaged (figure 5c).

The paper's number is the majority's share, averaged over all parameters. A mean over parameters is
that of the layers with most of them, and a majority of few examples is above one half by chance.
So both agreements, the plain and the corrected, are recorded for each layer and as four means.

Index letters: j parameter, of P in all; l layer, of L.
"""

from __future__ import annotations

import keras
import numpy as np

from tf_gsnr import arrays, metrics
from tf_gsnr.gradients import network
from tf_gsnr.moments import Moments

CONVOLUTIONS = tuple(
    getattr(keras.layers, f"{kind}{rank}D{transposed}")
    for kind, ranks, transposed in (
        ("Conv", (1, 2, 3), ""),
        ("Conv", (1, 2, 3), "Transpose"),
        ("DepthwiseConv", (1, 2), ""),
        ("SeparableConv", (1, 2), ""),
    )
    for rank in ranks
)
AGREEMENTS = {"same_sign_plain": False, "same_sign": True}  # whether it is bias corrected


def by_layer(moments: Moments, model: keras.Model) -> dict:
    """The numbers of figure 5c at fixed weights.

    For `a` each of `same_sign_plain` and `same_sign` (`metrics.same_sign`), with a_j that of
    parameter j and a_l the mean of a_j over the parameters of layer l:

        a/convolution/<layer>, a/other/<layer>      a_l
        a/layers                                    1/L sum_l a_l
        a/convolutions                              the mean of a_j over convolutions' parameters
        a/convolution_layers                        the mean of a_l over the convolutions

    `a/mean`, the mean of a_j over all parameters, is `metrics.summarize`'s. And

        same_sign_of_all/mean    1/P sum_j max(n+_j, n-_j) / n

    where n counts all examples: the plain one divides by those with a gradient, n+_j + n-_j.

    Args:
      moments: with sign counts.
      model: its layers; its convolutions are Keras's layers of that name, `CONVOLUTIONS`.

    Returns:
      A flat dict of floats. Parameters whose share is not defined, as no example has a gradient
      there, are in no mean; where that leaves nothing it is NaN.
    """
    layers = metrics.by_layer([v.path for v in model.trainable_variables])
    inner = _convolutions(model, layers)
    numbers = {}
    for name, corrected in AGREEMENTS.items():
        shares = metrics.same_sign(moments, corrected)
        own = {layer: arrays.flat([shares[i] for i in of]) for layer, of in layers.items()}
        means = {layer: arrays.mean(shares) for layer, shares in own.items()}
        for layer, mean in means.items():
            numbers[f"{name}/{'convolution' if layer in inner else 'other'}/{layer}"] = mean
        numbers[f"{name}/layers"] = arrays.mean(np.array(list(means.values())))
        if inner:
            pooled = np.concatenate([own[layer] for layer in inner])
            numbers[f"{name}/convolutions"] = arrays.mean(pooled)
            numbers[f"{name}/convolution_layers"] = arrays.mean(np.array([means[k] for k in inner]))
    majority = arrays.flat([np.maximum(*n) for n in zip(moments.positives, moments.negatives)])
    share = np.where(majority > 0, majority / moments.count, np.nan)
    numbers["same_sign_of_all/mean"] = arrays.mean(share)
    return numbers


def _convolutions(model, layers):
    """Which of the layers that have weights are convolutions."""
    convolutions = [layer for layer in network.layers(model) if isinstance(layer, CONVOLUTIONS)]
    inside = metrics.by_layer([v.path for k in convolutions for v in k.trainable_variables])
    return [layer for layer in layers if layer in inside]
