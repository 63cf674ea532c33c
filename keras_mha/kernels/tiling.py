"""How a score matrix is cut into tiles, and which of them a mask leaves alive."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_mha._keras import Tensor
from keras_mha._lengths import longer, shorter
from keras_mha.masks import Mask, Tile

# Rows and columns of a tile at most, and as many as they usually are: on a CPU each
# backend has measured its own (`LARGEST_TILE`).
TILE, USUAL = 1024, 512
_MULTIPLE = 16  # of numbers, what vector instructions take at once


class Pieces(NamedTuple):
    """An axis cut into pieces of one size.

    Where the size does not divide the length, the last piece begins earlier and
    overlaps the one before it: no piece reaches beyond the axis.

    Args:
        length: Of the axis; an int, or a scalar tensor where it is known later.
        size: Of a piece.
        count: Number of pieces.
    """

    length: Any
    size: Any
    count: Any

    @property
    def is_static(self) -> bool:
        """Whether the numbers are known now."""
        return isinstance(self.length, int)

    @property
    def may_overlap(self) -> bool:
        """Whether the last piece repeats part of the one before it."""
        if isinstance(self.count, int) and self.count == 1:
            return False
        return not self.is_static or self.size * self.count != self.length

    def start(self, index: Any) -> Any:
        """Returns where a piece begins."""
        if not self.may_overlap:
            return index * self.size
        return shorter(index * self.size, self.length - self.size)

    def first_new(self, index: Any) -> Any:
        """Returns the first position that no earlier piece holds."""
        return index * self.size

    def joined(self, pieces: Tensor) -> Tensor:
        """Puts the axis together again.

        Args:
            pieces: Shape `(..., count, size)`.

        Returns:
            Shape `(..., length)`, without what the last piece repeats.
        """
        lead, whole = ops.shape(pieces)[:-2], self.size * self.count
        flat = ops.reshape(pieces, (*lead, whole))
        if not self.may_overlap:
            return flat
        early = (self.count - 1) * self.size
        parts = ((0, early), (whole - self.length + early, self.length - early))
        none = (0,) * len(lead)
        return ops.concatenate(
            [ops.slice(flat, (*none, start), (*lead, n)) for start, n in parts], axis=-1
        )


def cut_in_pieces(length: Any, size: int | None) -> Pieces:
    """Cuts an axis into pieces of at most about `size`, all alike; `None` for one."""
    if size is None:
        return Pieces(length, length, 1)
    # A length that is not known yet may be 0: that is one piece, and an empty one.
    count = longer(_ceil_div(length, size), 1)
    even = _ceil_div(length, count)
    size = shorter(length, _ceil_div(even, _MULTIPLE) * _MULTIPLE)
    return Pieces(length, size, longer(_ceil_div(length, longer(size, 1)), 1))


class Schedule(NamedTuple):
    """The tiles to compute in each row of tiles.

    Args:
        columns: Integers, shape `(row pieces, column pieces)`: in each row first the
            tiles in which every pair may attend, then those to be masked.
        full: Integers, shape `(row pieces,)`: how many are of the first kind.
        live: Integers, shape `(row pieces,)`: how many are of both kinds.
    """

    columns: np.ndarray
    full: np.ndarray
    live: np.ndarray


def schedule(mask: Mask | None, rows: Pieces, columns: Pieces) -> Schedule | None:
    """Asks the mask about every tile; `None` where the lengths are not known yet.

    Near tiles come before far ones: what these add may turn out to be nothing.
    """
    if not (rows.is_static and columns.is_static):
        return None
    order = np.zeros((rows.count, columns.count), "int32")
    full, live = np.zeros((2, rows.count), "int32")
    for i in range(rows.count):
        kinds: dict[str, list[int]] = {"full": [], "mixed": [], "empty": []}
        for j in _nearest_first(rows, columns, i):
            kinds[_status(mask, rows, columns, i, j)].append(j)
        wanted = kinds["full"] + kinds["mixed"]
        order[i, : len(wanted)] = wanted
        full[i], live[i] = len(kinds["full"]), len(wanted)
    return Schedule(order, full, live)


def _nearest_first(rows: Pieces, columns: Pieces, i: int) -> list[int]:
    middle = 2 * rows.start(i) + rows.size
    return sorted(
        range(columns.count),
        key=lambda j: abs(2 * columns.start(j) + columns.size - middle),
    )


def _status(mask: Mask | None, rows: Pieces, columns: Pieces, i: int, j: int) -> str:
    status = "full"
    if mask is not None:
        tile = Tile(rows.start(i), rows.size, columns.start(j), columns.size)
        status = mask.status(tile)
    repeats = rows.start(i) != rows.first_new(i)
    repeats |= columns.start(j) != columns.first_new(j)
    return "mixed" if repeats and status == "full" else status


def _ceil_div(x: Any, y: Any) -> Any:
    return (x + y - 1) // y
