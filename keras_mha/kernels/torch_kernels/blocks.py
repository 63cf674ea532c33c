"""Which blocks of the scores PyTorch's flex_attention has to look at: its `BlockMask`,
made of what masks say of tiles."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import flex_attention as flex

from keras_mha.kernels.backends.torch_operators import made, number_of
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.kernels.static_parts import as_constants
from keras_mha.kernels.torch_kernels.index_functions import mask_function
from keras_mha.kernels.torch_kernels.kept import kept
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
    Where,
)
from keras_mha.memory_columns import MaskBesideMemory

_SIZE = 128  # of a block: the kernel's own tiles must divide it
_MOST = 64**2  # blocks that masks are asked about; of longer sequences they are larger

# What these say of a tile follows from what they are, not from the tensors they hold.
_LEAVES = (Causal, Dense, Padding, Prefix, Segments, SlidingWindow, Where)


def block_mask(mask: Mask, rows: int, columns: int, device: Any) -> flex.BlockMask:
    """Returns a mask of scores `(B, N, rows, columns)` as flex_attention takes it."""
    parts, tensors = split_tensors(mask)
    is_fixed = _says_the_same(mask)
    if torch.compiler.is_compiling():
        number = number_of(_Blocks, as_constants((parts, is_fixed)))
        held = [x.detach() for x in tensors]
        blocks = _blocks_of(torch.empty(0, device=device), held, number, rows, columns)
        found = _joined(blocks, rows, columns)
    elif is_fixed:
        found = copy.copy(_kept_mask(parts, rows, columns, device))
    else:
        found = _joined(_blocks(mask, rows, columns, device), rows, columns)
    found.mask_mod = mask_function(mask)
    return found


@kept(most=64)
def _kept_mask(parts, rows, columns, device):
    return _joined(_kept(parts, rows, columns, device), rows, columns)


def _joined(blocks, rows, columns):
    size = _block_size(rows, columns)
    lengths = rows, columns
    return flex.BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, seq_lengths=lengths)


def _block_size(rows, columns):
    size = _SIZE
    while -(-rows // size) * -(-columns // size) > _MOST:
        size *= 2
    return size


def _says_the_same(mask: Mask) -> bool:
    if type(mask) in (And, Or):
        return _says_the_same(mask.left) and _says_the_same(mask.right)
    if type(mask) in (Not, MaskBesideMemory):
        return _says_the_same(mask.mask)
    return type(mask) in _LEAVES


class _Blocks:
    """The blocks of a mask, for scores of any lengths."""

    def __init__(self, parts: Any, says_the_same: bool):
        self._parts, self._says_the_same = parts, says_the_same

    def of(self, tensors, rows, columns, device):
        """Returns how many blocks of each row are mixed and which, and those full."""
        if self._says_the_same:
            return _kept(self._parts, rows, columns, device)
        return _blocks(join_tensors(self._parts, tensors), rows, columns, device)


@kept(most=64)
def _kept(parts, rows, columns, device):
    # The tensors themselves would be kept too.
    mask = join_tensors(parts, itertools.repeat(torch.empty(0)))
    return _blocks(mask, rows, columns, device)


def _blocks(mask, rows, columns, device):
    size = _block_size(rows, columns)
    status = np.array(
        [
            [
                mask.status(Tile(i, min(size, rows - i), j, min(size, columns - j)))
                for j in range(0, columns, size)
            ]
            for i in range(0, rows, size)
        ]
    )
    return (*_ordered(status == "mixed", device), *_ordered(status == "full", device))


@torch.library.custom_op(
    "keras_mha::blocks", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _blocks_of(
    like: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    number: int,
    rows: int,
    columns: int,
) -> list[torch.Tensor]:
    """In a program that is compiled: masks are asked when it runs."""
    found = made(number).of(tuple(tensors), rows, columns, like.device)
    return [x.clone() for x in found]  # a program may write over what it is given


@_blocks_of.register_fake
def _(like, tensors, number, rows, columns):
    size = _block_size(rows, columns)
    shape = (1, 1, -(-rows // size), -(-columns // size))
    shapes = (shape[:3], shape) * 2
    return [like.new_empty(x, dtype=torch.int32) for x in shapes]


def _ordered(chosen: np.ndarray, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns for each row of blocks how many are chosen, and all, these first."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    return tuple(
        torch.as_tensor(x.astype("int32"), device=device)[None, None]
        for x in (chosen.sum(axis=1), order)
    )
