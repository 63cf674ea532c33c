"""What a mask is made of, as kernels that take no booleans ask for it."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

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
    is_plain_causal,
    whole_tile,
)


@dataclass(frozen=True, eq=False)
class MaskParts:
    """The masks that all must allow a pair, by what they are to a kernel.

    Args:
        causal: Whether query `i` sees the keys `j <= i` only.
        window: Query `i` sees the keys `j > i - window` only; `None` for all.
        keys: Masks that hide the same keys from all queries and heads of a sequence.
        queries: Masks that hide all keys from some queries.
        dense: Booleans for every query and key.
        segments: Masks of packed sequences.
        rest: All others.
    """

    causal: bool = False
    window: int | None = None
    keys: tuple[Mask, ...] = ()
    queries: tuple[Dense, ...] = ()
    dense: tuple[Dense, ...] = ()
    segments: tuple[Segments, ...] = ()
    rest: tuple[Mask, ...] = ()


def parted(mask: Mask | None, rows: int, columns: int) -> MaskParts:
    """Parts a mask.

    Args:
        mask: The mask, `None` for one that allows all.
        rows: Number of queries.
        columns: Number of keys.
    """
    every = _conjuncts(mask)
    causal = any(is_plain_causal(each) for each in every)
    parts = MaskParts(causal=causal)
    for each in every:
        if is_plain_causal(each):
            continue
        if type(each) is SlidingWindow:
            parts = _with_window(parts, each, rows, columns)
        else:
            name = _kind(each, rows, columns)
            parts = replace(parts, **{name: (*getattr(parts, name), each)})
    return parts


def _conjuncts(mask):
    if mask is None:
        return ()
    if type(mask) is And:
        return _conjuncts(mask.left) + _conjuncts(mask.right)
    return (mask,)


def _with_window(parts, mask, rows, columns):
    if parts.causal:
        # Keys after the query are hidden anyway, and the farthest before it is key 0.
        if mask.size >= rows:
            return parts
        return replace(parts, window=min(mask.size, parts.window or mask.size))
    if mask.size >= max(rows, columns):
        return parts
    return replace(parts, rest=(*parts.rest, mask))


def _kind(mask, rows, columns):
    if type(mask) is Segments:
        return "segments"
    if _hides_keys_from_all(mask):
        return "keys"
    if type(mask) is Dense:
        _, _, length, width = dense_shape(mask)
        if width == 1 != columns:
            return "queries"
        if (length, width) == (rows, columns):
            return "dense"
    return "rest"


def _hides_keys_from_all(mask):
    if type(mask) in (And, Or):
        return _hides_keys_from_all(mask.left) and _hides_keys_from_all(mask.right)
    if type(mask) is Not:
        return _hides_keys_from_all(mask.mask)
    if type(mask) is Dense:
        _, heads, length, width = dense_shape(mask)
        return heads == length == 1 != width
    return type(mask) in (Padding, Prefix)


def dense_shape(mask: Dense) -> tuple[int, int, int, int]:
    """Returns the shape of a mask's booleans with all four axes, `(B, N, T, S)`."""
    shape = tuple(mask.values.shape)
    if len(shape) == 3:
        return (shape[0], 1, *shape[1:])
    return (1,) * (4 - len(shape)) + shape


def named(mask: Mask) -> str:
    """Returns what to call a mask in a sentence."""
    if type(mask) is Causal:
        return "a causal mask with an offset"
    if type(mask) is SlidingWindow:
        return "a window on both sides"
    return f"a mask of the kind {type(mask).__name__}"


def both(left: Any, right: Any) -> Any:
    """Returns where both booleans are `True`; `None` stands for everywhere."""
    if left is None or right is None:
        return right if left is None else left
    return jnp.logical_and(left, right)


def visible_keys(masks: tuple[Mask, ...], batch: int, rows: int, columns: int) -> Any:
    """Returns the keys that none of these masks hides, `(B, S)`; `None` for all."""
    if not masks:
        return None
    tile = whole_tile(rows, columns)
    found = True
    for mask in masks:
        found = jnp.logical_and(found, mask.block(tile))
    found = jnp.broadcast_to(found, (batch, 1, 1, columns))
    return found.reshape(batch, columns)


def rows_that_see(visible: Any, causal: bool, window: int | None, rows: int) -> Any:
    """Returns which queries, `(B, T)`, see one of the visible keys, `(B, S)`."""
    if not causal:
        return jnp.any(visible, axis=1, keepdims=True)
    columns = visible.shape[1]
    counts = jnp.pad(jnp.cumsum(visible, axis=1, dtype="int32"), ((0, 0), (1, 0)))
    row = jnp.arange(rows)
    first = jnp.zeros_like(row) if window is None else row - window + 1
    first, after = jnp.clip(first, 0, columns), jnp.clip(row + 1, 0, columns)
    return counts[:, after] > counts[:, first]


def seeing_queries(masks: tuple[Dense, ...]) -> Any:
    """Returns which queries none of these masks hides all keys from, booleans that
    broadcast to `(B, N, T)`; `None` for all."""
    found = None
    for mask in masks:
        values = jnp.asarray(mask.values).astype(bool).reshape(dense_shape(mask))
        found = both(found, values[..., 0])
    return found


def dense_booleans(masks: tuple[Dense, ...]) -> Any:
    """Returns where all of these masks allow a pair, four axes; `None` for all."""
    found = None
    for mask in masks:
        values = jnp.asarray(mask.values).astype(bool).reshape(dense_shape(mask))
        found = both(found, values)
    return found
