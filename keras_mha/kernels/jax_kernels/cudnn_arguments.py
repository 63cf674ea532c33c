"""What cuDNN's kernel is given for a problem: tensors, and what it is to compute."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels.jax_kernels import cudnn_machine
from keras_mha.kernels.jax_kernels.cudnn_primitives import Kernel
from keras_mha.kernels.jax_kernels.layout import (
    hiding_exponent,
    keys_first,
    multiple,
    padded,
    positions_first,
    with_hiding_feature,
    zero_unless,
)
from keras_mha.kernels.jax_kernels.mask_parts import (
    MaskParts,
    both,
    dense_booleans,
    parted,
    rows_that_see,
    seeing_queries,
    visible_keys,
)
from keras_mha.kernels.masking import LOWEST
from keras_mha.kernels.parts import join_tensors
from keras_mha.kernels.problem import Problem
from keras_mha.masks import whole_tile

# What is added to scores that a bias or booleans mask. Of bfloat16 a power of two:
# whatever is added to it is rounded away, and its multiples are exact, so that the
# difference of two such scores is 0. Of float16 the least that it has.
MASKED = {"bfloat16": -(2.0**100), "float16": -65504.0}


class Hiding(Enum):
    """How the kernel is told of keys that are hidden from all queries alike."""

    BY_LENGTH = "those that are seen are put first, and counted"
    BY_FEATURE = "one more feature takes their scores far below all others"
    BY_LENGTH_IF_LAST = "those that are seen are counted, if they are the first"
    BY_BIAS = "the bias masks them too"


@dataclass(frozen=True, eq=False)
class Arguments:
    """What the kernel is to be given.

    Args:
        kernel: What it is to compute.
        arrange: Of query, key and value, in `blockwise.forward`'s layout, makes the
            kernel's; linear in them.
        arrange_bias: Of the bias, or `None`, makes the kernel's; linear where the bias
            does not mask.
        lengths: As of `cudnn_primitives.attend`.
        seen: Which queries see anything; booleans that broadcast to `(B, N, T)`,
            `None` for all.
        holds: Whether this is so, a boolean that is known when the program runs; `None`
            if it is known to be.
    """

    kernel: Kernel
    arrange: Callable
    arrange_bias: Callable
    lengths: Tensor | None
    seen: Tensor | None
    holds: Tensor | None


def arguments_of(problem: Problem, tensors: dict[str, Any]) -> Arguments:
    """Returns what the kernel is to be given for a problem that is not refused."""
    batch, _, _, _, rows = tensors["query"].shape
    columns = tensors["key"].shape[3]
    mask = join_tensors(problem.mask, tensors["mask"])
    parts = parted(mask, rows, columns)
    # No query sees the keys behind the last one's.
    kept = min(rows, columns) if parts.causal else columns
    has_bias = "bias" in tensors or bool(parts.dense)
    visible = visible_keys(parts.keys, batch, rows, columns)
    way = lengths = holds = None
    if parts.keys:
        width = tensors["query"].shape[2]
        way = way_to_hide(parts, "bias" in tensors, width, problem.scale)
    if way in (Hiding.BY_LENGTH, Hiding.BY_LENGTH_IF_LAST):
        # Where no key is visible cuDNN is to see one. What comes of it is not looked
        # at.
        lengths = jnp.maximum(jnp.sum(visible[:, :kept], axis=1, dtype="int32"), 1)
    if way is Hiding.BY_LENGTH_IF_LAST:
        # Of those that are counted, one that is not visible stands where none is.
        holds = ~jnp.any(visible[:, 1:] & ~visible[:, :-1])
    dense = dense_booleans(parts.dense)
    if way is Hiding.BY_BIAS:
        dense = both(dense, visible[:, None, None])
    pad = 2 if has_bias else 1
    arrange = partial(
        _arrange,
        exponent=hiding_exponent(problem.scale),
        visible=visible,
        way=way,
        kept=kept,
        pad=pad,
    )
    arrange_bias = partial(
        _arrange_bias,
        dense=dense,
        dtype=dtype_name(tensors["query"]),
        kept=kept,
        pad=pad,
    )
    causal = parts.causal and kept > 1
    kernel = Kernel(problem.scale, causal, parts.window if causal else None)
    seen = _seen(parts, visible, mask, tensors)
    return Arguments(kernel, arrange, arrange_bias, lengths, seen, holds)


def _arrange(query, key, value, *, exponent, visible, way, kept, pad):
    query = positions_first(query)
    key, value = (keys_first(x)[:, :kept] for x in (key, value))
    if visible is not None:
        # Whatever they hold, the scores of keys that are not are known then, and their
        # gradients are zeros too.
        key, value = (zero_unless(visible[:, :kept], x) for x in (key, value))
    if way is Hiding.BY_FEATURE:
        query, key = with_hiding_feature(query, key, visible[:, :kept], exponent)
    if way is Hiding.BY_LENGTH:
        key, value = _visible_first(key, visible), _visible_first(value, visible)
    width = multiple(8, max(query.shape[3], value.shape[3]))
    return tuple(
        padded(padded(x, 3, width), 1, multiple(pad, x.shape[1]))
        for x in (query, key, value)
    )


def _visible_first(x, visible):
    order = jnp.argsort(~visible, axis=1, stable=True)
    return jax.vmap(
        lambda x, order: x.at[order].get(mode="promise_in_bounds", unique_indices=True)
    )(x, order)


def _arrange_bias(bias, *, dense, dtype, kept, pad):
    if bias is None and dense is None:
        return None
    masked = jnp.asarray(MASKED[dtype], dtype)
    if bias is None:
        bias = jnp.where(dense, jnp.zeros((), dtype), masked)
    else:
        batch, groups, shared, *lengths = bias.shape
        bias = bias.reshape(batch, groups * shared, *lengths)
        allowed = bias > LOWEST
        allowed = allowed if dense is None else allowed & dense
        bias = jnp.where(allowed, bias, masked)
    bias = bias[..., :kept]
    rows, columns = (multiple(pad, length) for length in bias.shape[2:])
    return padded(padded(bias, 3, columns, masked), 2, rows)


def _seen(parts, visible, mask, tensors):
    """Returns which queries see anything, as of `Arguments`."""
    rows, columns = tensors["query"].shape[4], tensors["key"].shape[3]
    if "bias" in tensors or parts.dense:
        # Reduced as it is made: these booleans are held nowhere.
        allowed = True if mask is None else mask.block(whole_tile(rows, columns))
        if "bias" in tensors:
            bias = tensors["bias"]
            bias = bias.reshape(bias.shape[0], -1, *bias.shape[3:])
            allowed = jnp.logical_and(allowed, bias > LOWEST)
        return jnp.any(allowed, axis=3)
    seen = None
    if visible is not None:
        seen = rows_that_see(visible, parts.causal, parts.window, rows)[:, None]
    return both(seen, seeing_queries(parts.queries))


def way_to_hide(
    parts: MaskParts, has_bias: bool, width: int, scale: float
) -> Hiding | None:
    """Returns how the kernel is told of keys that are hidden from all queries alike.

    Args:
        parts: The mask's parts, with such keys.
        has_bias: Whether the call has a bias.
        width: How wide the query's heads are.
        scale: Factor of the dot products.

    Returns:
        The way; `None` where there is none.
    """
    if has_bias:
        return Hiding.BY_BIAS
    beside = parts.window or parts.dense
    if not (parts.causal or beside):
        return Hiding.BY_LENGTH
    if width + 1 <= cudnn_machine.widest() and hiding_exponent(scale):
        return Hiding.BY_FEATURE
    return None if beside else Hiding.BY_LENGTH_IF_LAST
