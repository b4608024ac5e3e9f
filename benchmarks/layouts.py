"""Keras's and PyTorch's layouts of the same weights."""

import numpy as np


def to_torch(value, weights):
    """A Keras weight (or moment) in PyTorch's layout; both flatten images in their own order."""
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    if value.ndim == 2:
        width = weights[0].shape[-1]
        if weights[0].ndim == 4 and value.shape[0] == 16 * width:
            value = value.reshape(4, 4, width, -1).transpose(2, 0, 1, 3).reshape(value.shape)
        return np.ascontiguousarray(value.T)
    return value
