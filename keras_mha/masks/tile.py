"""A rectangle of the score matrix, which is what kernels ask masks and biases about."""

from typing import Any, Literal, NamedTuple

import numpy as np
from keras import ops

from keras_mha._keras import Tensor
from keras_mha._lengths import unless_one
from keras_mha.ops.tensors import is_read_by_compiler

Status = Literal["empty", "full", "mixed"]
"""What a mask says of a tile: no pair may attend, every pair may, or it depends."""


class Tile(NamedTuple):
    """A rectangle of the score matrix.

    Args:
        row: First query position. An int, or a scalar tensor inside a loop.
        rows: Number of query positions.
        column: First key position. An int, or a scalar tensor inside a loop.
        columns: Number of key positions.
        whole: Whether the tile is the whole matrix, so that nothing need be cut.
        batch: The one row of the batch that the tile is for, or `None` for all.
        head: The first query head that the tile is for, or `None` for all heads.
        heads: How many heads the tile is for, from this one on.
    """

    row: Any
    rows: Any
    column: Any
    columns: Any
    whole: bool = False
    batch: Any = None
    head: Any = None
    heads: int | None = None

    @property
    def is_static(self) -> bool:
        """Whether all four numbers are known now."""
        return all(isinstance(number, int) for number in self[:4])

    @property
    def row_indices(self) -> Tensor:
        """The query positions, int32, shape `(rows, 1)`."""
        return _positions(self.row, self.rows)[:, None]

    @property
    def column_indices(self) -> Tensor:
        """The key positions, int32, shape `(1, columns)`."""
        return _positions(self.column, self.columns)[None, :]

    @property
    def cheap_indices(self) -> tuple[Tensor, Tensor]:
        """Both positions, as NumPy arrays where they are few: comparing some numbers
        takes less time than calling the backend for it."""
        few = self.is_static and self.rows * self.columns <= 2**12
        if few and not is_read_by_compiler():
            rows = np.arange(self.row, self.row + self.rows)
            columns = np.arange(self.column, self.column + self.columns)
            return rows[:, None], columns[None, :]
        return self.row_indices, self.column_indices

    def cut_batch(self, x: Tensor, axis: int = 0) -> Tensor:
        """Cuts the tile's row of the batch out of `x`; an axis of length 1 stays."""
        return x if self.batch is None else _cut(x, axis, self.batch, 1)

    def cut_heads(self, x: Tensor, axis: int) -> Tensor:
        """Cuts the tile's heads out of `x`; an axis of length 1 stays."""
        return x if self.head is None else _cut(x, axis, self.head, self.heads)

    def cut_rows(self, x: Tensor, axis: int) -> Tensor:
        """Cuts the tile's rows out of `x`; an axis of length 1 stays, to broadcast."""
        return x if self.whole else _cut(x, axis, self.row, self.rows)

    def cut_columns(self, x: Tensor, axis: int) -> Tensor:
        """Cuts the tile's columns out of `x`; an axis of length 1 stays."""
        return x if self.whole else _cut(x, axis, self.column, self.columns)


def with_axes(x: Tensor, *axes: int) -> Tensor:
    # LiteRT knows `x[:, None]` only of lengths that are known beforehand.
    for axis in axes:
        x = ops.expand_dims(x, axis)
    return x


def _positions(start: Any, length: Any) -> Tensor:
    if isinstance(start, int) and isinstance(length, int):
        return ops.arange(start, start + length, dtype="int32")
    return ops.arange(length, dtype="int32") + ops.cast(start, "int32")


def whole_tile(rows: Any, columns: Any) -> Tile:
    """Returns the tile that is the whole score matrix."""
    return Tile(0, rows, 0, columns, whole=True)


def _cut(x: Tensor, axis: int, start: Any, size: Any) -> Tensor:
    if x.shape[axis] == 1:
        return x
    starts = [0] * len(x.shape)
    sizes = list(ops.shape(x))
    length = sizes[axis]
    starts[axis] = unless_one(length, start, one=0)
    sizes[axis] = unless_one(length, size)
    return ops.slice(x, starts, sizes)
