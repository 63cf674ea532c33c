"""Masks and biases as a device sees them that works on a part of the scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from keras import ops

from keras_mha._keras import Tensor
from keras_mha.biases import Bias
from keras_mha.kernels.parts import split_tensors
from keras_mha.masks import (
    And,
    Causal,
    Mask,
    Not,
    Or,
    Prefix,
    SlidingWindow,
    Tile,
    Where,
)

_OF_POSITIONS = (Causal, Prefix, SlidingWindow, Where)


class Part(NamedTuple):
    """Where in a call a device's part lies, and how much of the batch and heads it is.

    Args:
        row: Its first query position.
        column: Its first key position.
        batch: Its first row of the batch.
        head: Its first query head.
        batches: How many rows of the batch it has.
        heads: How many query heads it has.
    """

    row: Any
    column: Any
    batch: Any
    head: Any
    batches: int
    heads: int

    def there(self, tile: Tile) -> Tile:
        """Returns a tile of this part as one of the call."""
        return Tile(
            tile.row + self.row,
            tile.rows,
            tile.column + self.column,
            tile.columns,
            batch=None if tile.batch is None else tile.batch + self.batch,
            head=self.head + (0 if tile.head is None else tile.head),
            heads=tile.heads or self.heads,
        )

    def block(self, ask: Callable[[Tile], Tensor], tile: Tile) -> Tensor:
        """Asks for a tile of the call, and cuts out what is of this part."""
        there = self.there(tile)
        found = ops.convert_to_tensor(ask(there))
        found = ops.reshape(found, (1,) * (4 - len(found.shape)) + tuple(found.shape))
        if there.batch is not None:
            found = there.cut_batch(found)
        elif found.shape[0] not in (1, self.batches):
            found = _cut(found, 0, self.batch, self.batches)
        if found.shape[1] not in (1, there.heads):
            found = there.cut_heads(found, 1)
        return found


def _cut(x, axis, start, size):
    starts, sizes = [0] * len(x.shape), list(x.shape)
    starts[axis], sizes[axis] = start, size
    return ops.slice(x, starts, sizes)


@dataclass(frozen=True, eq=False)
class MaskOfPart(Mask):
    """A mask of a call, for a device's part of it; `part` are the fields of `Part`."""

    mask: Mask
    part: tuple

    def block(self, tile):
        return Part(*self.part).block(self.mask.block, tile)

    def status(self, tile):
        there = Part(*self.part).there(tile)
        return self.mask.status(there) if there.is_static else "mixed"


@dataclass(frozen=True, eq=False)
class BiasOfPart(Bias):
    """A bias of a call, for a device's part of it; `part` are the fields of `Part`."""

    bias: Bias
    part: tuple

    @property
    def is_finite(self) -> bool:
        return self.bias.is_finite

    def block(self, tile):
        return Part(*self.part).block(self.bias.block, tile)


def leaves(mask: Mask | None) -> list[Mask]:
    """Returns the masks that a mask is composed of, in the order of their tensors."""
    if mask is None:
        return []
    if type(mask) in (And, Or):
        return leaves(mask.left) + leaves(mask.right)
    return leaves(mask.mask) if type(mask) is Not else [mask]


def with_leaves(mask: Mask | None, change: Callable[[Mask], Mask]) -> Mask | None:
    """Returns a mask composed, as this one, of what its `leaves` are changed to."""
    if mask is None:
        return None
    if type(mask) in (And, Or):
        return type(mask)(
            with_leaves(mask.left, change), with_leaves(mask.right, change)
        )
    if type(mask) is Not:
        return Not(with_leaves(mask.mask, change))
    return change(mask)


def leaf_of_part(leaf: Mask, part: Part) -> Mask:
    """Returns one of the `leaves` of a call's mask as a device sees it."""
    is_whole = isinstance(part.row, int) and part.row == part.column == 0
    if is_whole and type(leaf) in _OF_POSITIONS and not split_tensors(leaf)[1]:
        return leaf  # as it is, kernels of the backend know it
    return MaskOfPart(leaf, tuple(part))
