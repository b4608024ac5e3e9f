"""Which entries of a variable are measured, where not all of them are.

A sample is made of tiles, a few rows by a few columns of a matrix: per-example gradients of a
product at such places are small products, of a few columns of its input and of its output. The
tiles lie like the rooks on a chessboard, so that rows and columns all have about equal shares, and
each entry is as likely as any other. Index letters: m tile, a row in it, b column in it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

TILE = 8  # rows and columns of a tile of a matrix, at most
TILE_OF_KERNEL = 16  # of more axes: each costs a copy of its columns at all positions


@dataclasses.dataclass(frozen=True)
class Places:
    """Entries of a variable.

    Attributes:
      shape: of the variable.
      tiles: int64 `[m, a, b]`, places in the flattened variable; None for all, in order.
    """

    shape: tuple
    tiles: np.ndarray | None = None

    @property
    def whole(self) -> bool:
        return self.tiles is None

    @property
    def size(self) -> int:
        return math.prod(self.shape) if self.tiles is None else self.tiles.size

    @property
    def flat(self) -> np.ndarray:
        """Int64 `[size]`."""
        return np.arange(self.size) if self.tiles is None else self.tiles.reshape(-1)

    def product(self, columns: int):
        """The tiles as rows `[m, a]` times columns `[m, b]` of the variable as a matrix.

        Args:
          columns: of that matrix; its rows are all the rest.

        Returns:
          `(rows, columns)`; None if a tile is no product there.
        """
        row, column = np.divmod(np.asarray(self.tiles), columns)
        alike = (row == row[:, :, :1]).all() and (column == column[:, :1]).all()
        return (row[:, :, 0], column[:, 0]) if alike else None


def of(shape, size: int, seed: int) -> Places:
    """About `size` places, drawn without replacement; all of them where there are no more.

    Args:
      shape: of the variable. Its columns are its last axis; its rows the axis before, or the first
        one of three if that is longer (the inputs of a layer with heads). A tile is at one index of
        every other axis (one position of a convolution's kernel).
    """
    shape = tuple(shape)
    if size >= math.prod(shape):
        return Places(shape)
    rng = np.random.default_rng(seed)
    *lead, columns = (1, *shape) if len(shape) == 1 else shape
    axis = 0 if len(lead) == 2 and lead[0] > lead[1] else len(lead) - 1
    most = TILE if len(lead) == 1 else TILE_OF_KERNEL
    a, b = _divisor(lead[axis], most), _divisor(columns, most)
    sizes = [n // a if i == axis else n for i, n in enumerate(lead)]
    rows, columns = math.prod(sizes), columns // b
    t = np.arange(min(max(1, round(size / (a * b))), rows * columns))
    turn = t // math.lcm(rows, columns)  # after which rows and columns meet again, one further on
    row, column = rng.permutation(rows)[t % rows], rng.permutation(columns)[(t + turn) % columns]
    index = [i[:, np.newaxis, np.newaxis] for i in (*np.unravel_index(row, sizes), column)]
    index[axis] = index[axis] * a + np.arange(a)[:, np.newaxis]
    index[-1] = index[-1] * b + np.arange(b)
    tiles = np.ravel_multi_index(np.broadcast_arrays(*index), [*lead, columns * b])
    return Places(shape, tiles[np.argsort(tiles[:, 0, 0])])


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if number % d == 0)
