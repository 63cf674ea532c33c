"""Masks and biases for scores whose first columns are learned keys: seen by all queries
whatever hides the keys behind them, and with nothing added.

The columns behind are those of the sequence, of which the mask or the bias speaks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_mha._keras import Shape, Tensor, dtype_name, larger, smaller
from keras_mha._lengths import shorter
from keras_mha.biases import Bias
from keras_mha.kernels.masking import mask_block
from keras_mha.masks import And, Causal, Mask, Or, Padding, Prefix, Tile


def mask_beside_memory(
    mask: Mask | None, count: int, length: Any, scores_shape: Shape
) -> Mask | None:
    """Returns a mask of a sequence as one of all columns.

    Args:
        mask: Says who of the sequence may attend to whom; `None` for everybody.
        count: How many learned keys there are.
        length: Of the sequence: an int, or a scalar tensor where it is known later.
        scores_shape: `(B, N, T, S)` of the sequence alone, as far as it is known.
    """
    if mask is None:
        return None
    moved = _moved(mask, count, length)
    if moved is not None:
        return moved
    return MaskBesideMemory(count, length, mask, tuple(scores_shape))


def bias_beside_memory(bias: Tensor, count: int, length: Any) -> Tensor:
    """Returns a bias of a sequence's scores, as it broadcasts, with zeros in front; see
    `mask_beside_memory`."""
    shape = (1,) * (1 - len(bias.shape)) + tuple(ops.shape(bias))
    bias = ops.reshape(bias, shape)
    if not isinstance(shape[-1], int) or shape[-1] == 1:
        # What is the same for all keys of the sequence is not added to learned ones.
        bias = ops.broadcast_to(bias, (*shape[:-1], length))
    zeros = _filled(0.0, (*shape[:-1], count), dtype_name(bias))
    return ops.concatenate([zeros, bias], axis=-1)


def _moved(mask: Mask, count: int, length: Any) -> Mask | None:
    """Returns a mask of a kind that kernels know, if one says the same."""
    move = _MOVES.get(type(mask))  # a user's subclass may allow something else
    return None if move is None else move(mask, count, length)


def _moved_both(mask, count, length):
    parts = [_moved(part, count, length) for part in (mask.left, mask.right)]
    return None if None in parts else type(mask)(*parts)


def _moved_causal(mask, count, length):
    # Lower offsets would hide learned keys from the first queries.
    if isinstance(mask.offset, int) and mask.offset >= -1:
        return Causal(mask.offset + count)
    return None


def _moved_prefix(mask, count, length):
    if isinstance(mask.n, int):
        return Prefix(mask.n + count)
    # Small integers would overflow, and numbers below 0 hide learned keys.
    return Prefix(larger(ops.cast(mask.n, "int32"), 0) + count)


def _moved_padding(mask, count, length):
    batch = ops.shape(mask.valid)[0]
    valid = ops.broadcast_to(ops.cast(mask.valid, "bool"), (batch, length))
    seen = _filled(True, (batch, count), "bool")
    return Padding(ops.concatenate([seen, valid], axis=1))


_MOVES = {
    And: _moved_both,
    Or: _moved_both,
    Causal: _moved_causal,
    Prefix: _moved_prefix,
    Padding: _moved_padding,
}


@dataclass(frozen=True, eq=False)
class _BesideMemory:
    """What belongs to a sequence that has learned keys before it.

    Args:
        count: How many learned keys there are.
        length: Of the sequence: an int, or a scalar tensor where it is known later.
    """

    count: int
    length: Any

    def _joined(self, tile: Tile, block: Callable[[Tile], Tensor], front: Any):
        """Returns a tile's block: what `block` returns for a tile of the sequence, and
        `front` in the columns of the learned keys."""
        if tile.whole:
            inner = tile._replace(columns=self.length)
            return _behind(front, self.count, block(inner), self.length)
        if tile.is_static:
            inner = self._part_of_sequence(tile)
            if inner is None:
                return _filled(front, (1, 1, 1, tile.columns))
            missing = tile.columns - inner.columns
            return _behind(front, missing, block(inner), inner.columns)
        # Wherever the tile lies, something of one size is built, all learned keys and
        # a tile's columns of the sequence, and cut where the tile begins.
        width = shorter(tile.columns, self.length)
        start = larger(tile.column - self.count, 0)
        found = block(tile._replace(column=start, columns=width))
        found = _behind(front, self.count, found, width)
        first = smaller(tile.column, self.count)
        sizes = (*ops.shape(found)[:3], tile.columns)
        return ops.slice(found, (0, 0, 0, first), sizes)

    def _part_of_sequence(self, tile: Tile) -> Tile | None:
        """Returns the tile of the sequence that a tile holds, if it holds any; only of
        tiles whose numbers are known now."""
        end = tile.column + tile.columns - self.count
        if end <= 0:
            return None
        start = max(tile.column - self.count, 0)
        return tile._replace(column=start, columns=end - start)

    def _of_sequence(self, scores_shape: Shape) -> Shape:
        *lead, columns = scores_shape
        return (*lead, None if columns is None else columns - self.count)


@dataclass(frozen=True, eq=False)
class MaskBesideMemory(_BesideMemory, Mask):
    """A mask of a sequence that has learned keys before it, which all queries see.

    Args:
        mask: Says who of the sequence may attend to whom.
        scores_shape: `(B, N, T, S)` of the sequence alone.
    """

    mask: Mask
    scores_shape: Shape

    def block(self, tile):
        def block(tile):
            return mask_block(self.mask, tile, *self.scores_shape[:2])

        return self._joined(tile, block, True)

    def status(self, tile):
        if not tile.is_static:
            return "mixed"
        part = self._part_of_sequence(tile)
        if part is None:
            return "full"
        status = self.mask.status(part)
        has_learned = part.columns < tile.columns
        return "mixed" if has_learned and status == "empty" else status

    def check(self, scores_shape):
        self.mask.check(self._of_sequence(scores_shape))


@dataclass(frozen=True, eq=False)
class BiasBesideMemory(_BesideMemory, Bias):
    """A bias of a sequence that has learned keys before it, to which nothing is added.

    Args:
        bias: What is added to the scores of the sequence.
    """

    bias: Bias

    @property
    def is_finite(self) -> bool:
        return self.bias.is_finite

    def block(self, tile):
        return self._joined(tile, self.bias.block, 0.0)

    def check(self, scores_shape):
        self.bias.check(self._of_sequence(scores_shape))


def _behind(front: Any, count: int, block: Any, width: Any) -> Tensor:
    """Returns a block, of four axes and broadcast to `width` columns, behind `count`
    columns of `front`."""
    block = ops.convert_to_tensor(block)
    shape = (1,) * (4 - len(block.shape)) + tuple(ops.shape(block))
    block = ops.reshape(block, shape)
    if not (isinstance(width, int) and shape[3] == width):
        block = ops.broadcast_to(block, (*shape[:3], width))
    if count == 0:
        return block
    front = _filled(front, (*shape[:3], count), dtype_name(block))
    return ops.concatenate([front, block], axis=3)


def _filled(number: Any, shape: tuple, dtype: str | None = None) -> Tensor:
    return ops.broadcast_to(ops.convert_to_tensor(number, dtype=dtype), shape)
