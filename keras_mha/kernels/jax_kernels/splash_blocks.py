"""Into which blocks splash attention cuts the scores, and which of them it visits."""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keras_mha.kernels.jax_kernels.layout import multiple
from keras_mha.kernels.jax_kernels.splash_masks import PositionFunction
from keras_mha.masks import Tile

LANES = 128  # blocks are multiples of what a TPU's registers hold side by side
# At most so many queries and keys: what MaxText trains with, and what fits a core's
# memory where heads are wider than 128 features.
BLOCK, BLOCK_OF_WIDE_HEADS = 512, 256
# So many pairs of positions are worked out to find empty blocks of users' functions;
# in a longer sequence all blocks are visited of which `status` does not say better.
MOST_PAIRS = 2**30


class Blocks(NamedTuple):
    """How the scores are cut.

    Args:
        rows: Queries of a block.
        columns: Keys of a block.
    """

    rows: int
    columns: int


def blocks(rows: int, columns: int, width: int) -> Blocks:
    """Returns the blocks for so many queries and keys, with heads of a width."""
    most = BLOCK if width <= LANES else min(BLOCK, BLOCK_OF_WIDE_HEADS)
    return Blocks(_block(rows, most), _block(columns, most))


def _block(length, most):
    # As even as they can be: what the last one lacks is computed too.
    return multiple(LANES, math.ceil(length / math.ceil(length / most)))


def padded_width(width: int) -> int:
    """Returns how many features the kernel is given for heads of a width."""
    # It takes any, but others than these (64, 128, 192 ...) are hardly ever used.
    return multiple(LANES // 2, width)


class Visits(NamedTuple):
    """Which blocks are visited, as the kernel's tables want it.

    Args:
        forward: Of each row of blocks, `(1, row blocks, most visits)`: whether a step
            visits a block, and the number of that block among the row's.
        backward: The same of each column, `(1, most visits, column blocks)`.
    """

    forward: tuple[np.ndarray, np.ndarray]
    backward: tuple[np.ndarray, np.ndarray]


@lru_cache(maxsize=64)
def visits(function: PositionFunction, rows: int, columns: int, cut: Blocks) -> Visits:
    """Returns which blocks of the scores are to be visited.

    Args:
        function: Which pairs are allowed.
        rows: Number of queries.
        columns: Number of keys.
        cut: The blocks.
    """
    seen = visited(function, rows, columns, cut)
    backward = tuple(table.transpose(0, 2, 1) for table in _tables(seen.T))
    return Visits(_tables(seen), backward)


def _tables(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    most = max(int(seen.sum(1).max()), 1)
    runs = np.zeros((len(seen), most), np.int8)
    numbers = np.zeros((len(seen), most), np.int32)
    for row, each in enumerate(seen):
        (found,) = np.nonzero(each)
        if len(found):
            first = most - len(found)
            runs[row, first:] = 1
            # Steps that visit nothing come first and name the block that follows them:
            # it is fetched while the row before is still computed.
            numbers[row, :first] = found[0]
            numbers[row, first:] = found
    smallest = np.min_scalar_type(-1 - int(numbers.max()))
    return runs[None], numbers[None].astype(smallest)


def visited(
    function: PositionFunction, rows: int, columns: int, cut: Blocks
) -> np.ndarray:
    """Returns where any pair may be allowed, `(row blocks, column blocks)`."""
    shape = math.ceil(rows / cut.rows), math.ceil(columns / cut.columns)
    mask = function.mask
    if mask is None:
        return np.ones(shape, bool)
    status = np.empty(shape, object)
    for i, j in np.ndindex(shape):
        row, column = i * cut.rows, j * cut.columns
        height = min(cut.rows, rows - row)
        width = min(cut.columns, columns - column)
        status[i, j] = mask.status(Tile(row, height, column, width))
    seen = status != "empty"
    if function.says_what_is_empty or rows * columns > MOST_PAIRS:
        return seen
    return _without_empty(function, seen, status == "mixed", rows, columns, cut)


def _without_empty(function, seen, mixed, rows, columns, cut):
    """Looks into the blocks that are not known to be full, a row of blocks at a time,
    and strikes those out that turn out to be empty."""
    with jax.ensure_compile_time_eval():
        for i in np.nonzero(mixed.any(1))[0]:
            start = int(i) * cut.rows
            any_seen = _any_seen(function, start, rows, columns, cut)
            seen[i] &= np.asarray(any_seen) | ~mixed[i]
    return seen


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _any_seen(function: Any, start: Any, rows: int, columns: int, cut: Blocks) -> Any:
    """Returns booleans, `(column blocks,)`, for the row of blocks from `start` on."""
    shape = cut.rows, multiple(cut.columns, columns)
    row = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    allowed = function(row, column) & (row < rows) & (column < columns)
    return allowed.reshape(cut.rows, -1, cut.columns).any((0, 2))
