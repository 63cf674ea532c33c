"""Masks and biases of all heads, for one of several processes that share the heads."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from keras_mha._keras import Shape, Tensor
from keras_mha.biases import Bias
from keras_mha.masks import (
    And,
    Causal,
    Dense,
    Mask,
    Not,
    Or,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
    Tile,
)

_ALIKE_FOR_ALL = (Causal, Padding, Prefix, Segments, SlidingWindow)


class Heads(NamedTuple):
    """Some of a layer's heads.

    Args:
        first: The first of them.
        count: How many they are, from this one on.
        total: How many the layer has.
    """

    first: int
    count: int
    total: int

    def cut(self, x: Any, axis: int) -> Any:
        """Returns their part of a tensor or an array; an axis of length 1 stays."""
        if x.shape[axis] == 1:
            return x
        index = [slice(None)] * len(x.shape)
        index[axis] = slice(self.first, self.first + self.count)
        return x[tuple(index)]


def mask_of(mask: Mask, heads: Heads) -> Mask:
    """Returns what a mask of all heads says of some of them."""
    kind = type(mask)  # a user's subclass may allow something else
    if kind in _ALIKE_FOR_ALL:
        return mask
    if kind in (And, Or):
        return kind(mask_of(mask.left, heads), mask_of(mask.right, heads))
    if kind is Not:
        return Not(mask_of(mask.mask, heads))
    if kind is Dense:
        has_heads = len(mask.values.shape) == 4
        return Dense(heads.cut(mask.values, 1)) if has_heads else mask
    return _MaskOf(mask, heads)


@dataclass(frozen=True, eq=False)
class _MaskOf(Mask):
    mask: Mask
    heads: Heads

    def block(self, tile: Tile) -> Tensor:
        # A mask gives the booleans of all heads, of which a kernel takes the tile's.
        block = self.mask.block(tile._replace(head=None, heads=None))
        return self.heads.cut(block, -3) if len(block.shape) > 2 else block

    def status(self, tile: Tile) -> str:
        return self.mask.status(tile._replace(head=None, heads=None))

    def check(self, scores_shape: Shape) -> None:
        self.mask.check(_of_all(scores_shape, self.heads))


@dataclass(frozen=True, eq=False)
class BiasOf(Bias):
    """What a bias of all heads adds to the scores of some of them."""

    bias: Bias
    heads: Heads

    @property
    def is_finite(self) -> bool:
        return self.bias.is_finite

    def block(self, tile: Tile) -> Tensor:
        first = self.heads.first
        if tile.head is None:
            return self.bias.block(tile._replace(head=first, heads=self.heads.count))
        return self.bias.block(tile._replace(head=first + tile.head))

    def check(self, scores_shape: Shape) -> None:
        self.bias.check(_of_all(scores_shape, self.heads))


def _of_all(scores_shape, heads):
    batch, _, rows, columns = scores_shape
    return batch, heads.total, rows, columns
