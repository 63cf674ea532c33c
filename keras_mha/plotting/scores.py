"""What is checked of scores, and of masks beside them, before anything is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_mha import _checks
from keras_mha._keras import Tensor, is_symbolic
from keras_mha.masks import Mask, Tile


def as_numpy(name: str, value: Tensor) -> np.ndarray:
    """Returns an array or tensor of numbers as NumPy; half types become float32."""
    try:
        if value is None:  # which some backends take for a NaN
            raise TypeError("no array")
        array = keras.ops.convert_to_numpy(value)
        numbers = array if array.dtype.kind in "biu" else array.astype("float32")
    except Exception as error:  # each backend raises errors of its own kind
        raise TypeError(
            f"`{name}` must be an array or a tensor of numbers. "
            f"Received: {name} of type {type(value).__name__}"
        ) from error
    return numbers


def scores_array(scores: Tensor) -> np.ndarray:
    """Returns scores as float32 NumPy, or raises if they are not such."""
    if is_symbolic(scores):
        raise TypeError(
            "`scores` must hold numbers, and a KerasTensor holds none yet: "
            "`keras_mha.attention_maps` gets them out of a model. "
            f"Received: scores={scores!r}"
        )
    if isinstance(scores, Mapping):
        raise TypeError(
            "`scores` must be those of one layer: take one by its path. "
            f"Received: a mapping from {', '.join(map(repr, scores))}"
        )
    array = as_numpy("scores", scores).astype("float32")
    shape = array.shape
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(
            "`scores` must have the shape (T, S), (N, T, S) or (B, N, T, S), and no "
            f"axis of length 0. Received: scores of shape {shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            "`scores` must be finite: attention weights are. Received: "
            f"{np.isnan(array).sum()} NaN and {np.isinf(array).sum()} infinite numbers "
            f"in scores of shape {shape}"
        )
    return array


def index_in(name: str, value: Any, length: int, axis: str) -> int:
    """Returns `value` as an index from 0 on; below 0 it counts from the end."""
    index = _checks.integer(name, value)
    if not -length <= index < length:
        raise ValueError(
            f"`{name}` must be from {-length} to {length - 1}: there are {length} "
            f"{axis}. Received: {name}={index}"
        )
    return index % length


def chosen_heads(heads: int | Sequence[int] | None, count: int) -> list[int]:
    """Returns the numbers of the heads to draw."""
    if heads is None:
        return list(range(count))
    several = [heads] if np.ndim(heads) == 0 else list(heads)
    if not several:
        raise ValueError(
            "`heads` must name at least one head, or be None for all. "
            f"Received: heads={heads!r}"
        )
    return [index_in("heads", head, count, "heads") for head in several]


def one_sample(array: np.ndarray, sample: int) -> np.ndarray:
    """Returns the scores `(N, T, S)` of one row of the batch, where there is one."""
    if array.ndim == 4:
        return array[index_in("sample", sample, len(array), "rows in the batch")]
    _checks.integer("sample", sample)
    return array if array.ndim == 3 else array[None]


def batch_and_heads(mask: Mask) -> tuple[int, int]:
    """Returns how many rows of a batch, and heads, a mask tells apart."""
    shape = tuple(mask.block(Tile(0, 1, 0, 1)).shape)
    return (1, 1, *shape)[-4:-2]


def allowed_pairs(mask: Mask, tile: Tile, sample: int, head: int) -> np.ndarray:
    """Returns a tile's booleans for one row of the batch and one head.

    Args:
        mask: The mask, whose `check` the lengths have passed.
        tile: The tile.
        sample: Which row of the batch, where the mask tells them apart.
        head: Which head, where the mask tells them apart.

    Returns:
        Booleans, shape `(rows, columns)`.
    """
    batch, heads = batch_and_heads(mask)
    if heads > 1:
        head = index_in("head", head, heads, "heads")
    if batch > 1:
        sample = index_in("sample", sample, batch, "rows in the batch")
        tile = tile._replace(batch=sample)
    values = keras.ops.convert_to_numpy(keras.ops.cast(mask.block(tile), "bool"))
    values = values[(None,) * (4 - values.ndim)]
    # A mask of one's own may ignore which row of the batch was asked for.
    row = values[sample if len(values) > 1 else 0]
    pairs = row[head if len(row) > 1 else 0]
    return np.broadcast_to(pairs, (tile.rows, tile.columns))
