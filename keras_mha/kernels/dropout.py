"""Which attention weights dropout keeps: a function of the seed and of where they are.

Every weight gets a random number of its own, hashed from the seed and from its batch
row, head, row and column. Any tile of the weights can therefore be worked out alone and
again: by every kernel, in tiles of any shape, in the backward pass, on every backend.

Each row of weights is a Weyl sequence with a start and an odd step of its own, hashed
from seed, head and row; a finalizer then mixes the bits of every number.

References:
    Salmon et al., 2011, Parallel random numbers: as easy as 1, 2, 3:
        https://doi.org/10.1145/2063384.2063405
    Steele et al., 2014, Fast splittable pseudorandom number generators:
        https://doi.org/10.1145/2660193.2660195
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from keras import ops

from keras_mha._keras import Tensor, draw_seed
from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import Tile

# Odd multipliers as int32; the first two are those of C. Wellons's "lowbias32".
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)
_HEAD, _ROW, _STEP = 0x5BD1E995, 0x1B873593, 0x2C1B3C6D


@dataclass(frozen=True, eq=False)
class DrawnSeed:
    """What `seed_pair` returned, where it must be drawn before the call is made."""

    pair: Tensor


class OfPart(NamedTuple):
    """A seed for a part of a call, of which weights are dropped as of the whole.

    Args:
        pair: What `seed_of` returns for the call.
        row: Of the call, with which the part's rows begin.
        column: Of the call, with which the part's columns begin.
        batch: Row of the batch with which the part begins.
        head: Query head with which the part begins.
        heads: How many query heads the part has.
        all_heads: How many the call has.
    """

    pair: Tensor
    row: Any
    column: Any
    batch: Any
    head: Any
    heads: Any
    all_heads: Any

    def of_call(self, head_index: Tensor, tile: Tile) -> tuple[Tensor, Tile]:
        """Returns the place of weights in the part as that in the call."""
        batch = head_index // self.heads + self.batch
        head = head_index % self.heads + self.head
        tile = tile._replace(row=tile.row + self.row, column=tile.column + self.column)
        return ops.cast(batch * self.all_heads + head, "int32"), tile


@dataclass(frozen=True, eq=False)
class SeedOfHeads:
    """A seed for some of a layer's heads: they drop what they do among all of them.

    Args:
        seed: Of the layer.
        first: The first of the heads.
        count: How many they are, from this one on.
        total: How many the layer has.
    """

    seed: Any
    first: int
    count: int
    total: int


def seed_pair(seed: Any) -> Tensor:
    """Returns two int32 for one call of attention; a generator goes on to its next.

    For some of a layer's heads three more say which they are, for `kept`.

    Where a gradient computes the call again (gradient checkpointing), they are those of
    the first time: output and gradient must belong to the same weights dropped.
    """
    if isinstance(seed, DrawnSeed):
        return seed.pair
    if isinstance(seed, SeedOfHeads):
        heads = ops.convert_to_tensor((seed.first, seed.count, seed.total), "int32")
        return ops.concatenate([seed_pair(seed.seed), heads])
    if isinstance(seed, int):
        return ops.cast(draw_seed(seed), "int32")
    return ops.cast(backends.current().drawn(seed, draw_seed), "int32")


def seed_of(call: AttentionCall) -> Tensor:
    """Returns the `seed_pair` of a call.

    Where devices run a program of their own each, every one counts its heads from 0.
    With the pair returned they are counted on from device to device, in `kept`: each
    drops other weights, and of a sharded batch those that one device would drop.
    """
    pair = seed_pair(call.seed)
    shard = backends.current().shard_index(call.query, call.key)
    if shard is None:
        return pair
    batch, _, heads, _ = ops.shape(call.query)
    first_head = shard * (batch * heads)
    return ops.stack([pair[0] + first_head * _HEAD, pair[1]])


def kept(seed: Tensor | OfPart, rate: float, head_index: Tensor, tile: Tile) -> Tensor:
    """Says which weights of a tile to keep.

    Args:
        seed: int32, from `seed_of`, or an `OfPart`.
        rate: Share of the weights to drop, less than 1.
        head_index: int32, shape `(..., 1, 1)`: batch row times heads plus head.
        tile: The rows and columns.

    Returns:
        What the backend's `keep` takes, of shape `(..., rows, columns)`: each weight is
        kept with a probability of `1 - rate`, to within 2^-31.
    """
    if isinstance(seed, OfPart):
        head_index, tile = seed.of_call(head_index, tile)
        seed = seed.pair
    rows, columns = tile.row_indices, tile.column_indices
    tensors = seed, head_index, rows, columns
    return backends.current().as_one_program(_kept, tensors, rate)


def _kept(rate, seed, head_index, rows, columns):
    head_index = _among_all_heads(head_index, seed)
    row = _mixed(_mixed(head_index * _HEAD + seed[0]) + seed[1])
    row = _mixed(row + rows * _ROW)
    step = _mixed(row + _STEP) * 2 + 1
    threshold = 2 * min(round(rate * 2**31) - 2**30, 2**30 - 1)
    numbers = _mixed((columns + row) * step)
    return backends.current().at_least(numbers, threshold)


def _among_all_heads(head_index: Tensor, seed: Tensor) -> Tensor:
    if seed.shape[0] == 2:
        return head_index
    first, count, total = seed[2], seed[3], seed[4]
    return head_index // count * total + first + head_index % count


def _mixed(x: Tensor) -> Tensor:
    """Spreads every bit of int32 over the higher ones; `x` may be written over."""
    xor_shifted = backends.current().xor_shifted_times
    return xor_shifted(xor_shifted(x, 16, _MIX[0]), 15, _MIX[1])
