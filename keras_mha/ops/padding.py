"""Keeps what padding holds from what is computed of real tokens.

A masked key gets a weight of 0, but 0 times NaN or infinity is NaN, in the output and
in every gradient. Buffers that nobody wrote to hold such numbers. So

- tokens that a mask hides from everybody are set to zero before anything is computed;
- tokens of another segment may be what is attended to elsewhere. Those that hold NaN or
  infinity are set to zero, and what may attend to them is set to NaN in the end.
"""

import dataclasses
import math
from typing import Any

from keras import ops

from keras_mha._keras import Tensor
from keras_mha._lengths import shape_of
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import And, Mask, Padding, Segments
from keras_mha.ops.tensors import known_numbers, take_along_axis


def without_padding(call: AttentionCall) -> tuple[AttentionCall, Tensor | None]:
    """Returns a call without numbers that its masks hide.

    Returns:
        The call, and which queries, `(B, T)`, are to be NaN; `None` for none.
    """
    visible, segments = visible_keys(call.mask), parts(call.mask, Segments)
    query, key, value = call.query, call.key, call.value
    if visible is not None:
        key, value = zero_unless(visible, key), zero_unless(visible, value)
    spoilt = None
    if segments:
        good_query = finite_tokens(query, 2)
        good_key = ops.logical_and(finite_tokens(key, 2), finite_tokens(value, 2))
        if are_all(good_query, good_key):
            segments = []
    if segments:
        spoilt = spoilt_queries(good_query, good_key, segments)
        query = zero_unless(good_query, query)
        key, value = zero_unless(good_key, key), zero_unless(good_key, value)
    return dataclasses.replace(call, query=query, key=key, value=value), spoilt


def parts(mask: Mask | None, kind: type) -> list[Any]:
    """Returns the masks of one kind among those that all must allow a pair."""
    if type(mask) is And:
        return parts(mask.left, kind) + parts(mask.right, kind)
    return [mask] if type(mask) is kind else []


def visible_keys(mask: Mask | None) -> Tensor | None:
    """Returns the keys, `(B, S)`, that padding does not hide; `None` for all."""
    return all_of(*(padding.valid for padding in parts(mask, Padding)))


def all_of(*masks: Tensor | None) -> Tensor | None:
    """Returns where all masks are `True`; `None` stands for everywhere."""
    result = None
    for mask in masks:
        if result is None or mask is result:  # Keras gives the same one for each input
            result = mask
        elif mask is not None:
            pair = ops.cast(result, "bool"), ops.cast(mask, "bool")
            result = ops.logical_and(*pair)
    return result


def are_all(*booleans: Tensor) -> bool:
    """Whether all are known to be `True`, which in a compiled program none are."""
    return all(bool(known_numbers(ops.all(x))) for x in booleans)


def zero_unless(visible: Tensor | None, x: Tensor) -> Tensor:
    """Returns `x` with zeros for the tokens that are not visible.

    Args:
        visible: Booleans of the leading axes of `x`; `None` for all tokens.
        x: Numbers of tokens, `(B, T, ...)`.
    """
    if visible is None:
        return x
    visible = with_rank(len(x.shape), ops.cast(visible, "bool"))
    return ops.where(visible, x, ops.cast(0.0, x.dtype))


def with_rank(rank: int, mask: Tensor | None) -> Tensor | None:
    """Returns a mask of the leading axes with axes of length 1 behind them."""
    if mask is None or len(mask.shape) == rank:
        return mask
    return ops.reshape(mask, (*shape_of(mask), *(1,) * (rank - len(mask.shape))))


def finite_tokens(x: Tensor, axes: int) -> Tensor:
    """Returns which tokens hold finite numbers only.

    Args:
        x: Numbers of tokens.
        axes: How many of its last axes belong to one token.
    """
    return ops.all(ops.isfinite(x), axis=tuple(range(-axes, 0)))


def nan_where(spoilt: Tensor, x: Tensor) -> Tensor:
    """Returns `x` with NaN where booleans of its leading axes say so."""
    spoilt = with_rank(len(x.shape), spoilt)
    return ops.where(spoilt, ops.cast(math.nan, x.dtype), x)


def spoilt_queries(
    good_query: Tensor, good_key: Tensor, segments: list[Segments]
) -> Tensor:
    """Returns which queries are not good, or have a key that is not in all of
    their segments.

    Args:
        good_query: Booleans, shape `(B, T)`.
        good_key: Booleans, shape `(B, S)`.
        segments: Masks, all of which must allow a pair.

    Returns:
        Booleans, shape `(B, T)`.
    """
    reached = [
        _has_equal(
            ops.broadcast_to(mask.query_ids, shape_of(good_query)),
            ops.broadcast_to(mask.key_ids, shape_of(good_key)),
            ops.logical_not(good_key),
        )
        for mask in segments
    ]
    bad_query = ops.logical_not(good_query)
    return ops.logical_or(bad_query, all_of(*reached)) if reached else bad_query


def _has_equal(ids: Tensor, others: Tensor, wanted: Tensor) -> Tensor:
    """Whether each of `ids` is equal to one of the `others` that is wanted; by sorting,
    since comparing all with all would take T x S booleans."""
    count = shape_of(others)[1]
    ids = ops.concatenate([others, ops.cast(ids, others.dtype)], axis=1)
    wanted = ops.pad(ops.cast(wanted, "int32"), ((0, 0), (0, shape_of(ids)[1] - count)))
    order = ops.argsort(ids, axis=1)
    ids = take_along_axis(ids, order, axis=1)
    wanted = take_along_axis(wanted, order, axis=1)
    # Equal ids stand side by side now: counted up to the last and before the first.
    length = shape_of(ids)[1]
    index = ops.broadcast_to(ops.arange(length, dtype="int32")[None], shape_of(ids))
    edge = ops.ones_like(ids[:, :1], dtype="bool")
    changes = ops.not_equal(ids[:, 1:], ids[:, :-1])
    is_first = ops.concatenate([edge, changes], axis=1)
    run = ops.cumsum(ops.cast(is_first, "int32"), axis=1) - 1
    firsts = ops.sort(ops.where(is_first, index, length), axis=1)
    end = ops.zeros_like(firsts[:, :1]) + length
    nexts = ops.concatenate([firsts[:, 1:], end], axis=1)
    total = ops.pad(ops.cumsum(wanted, axis=1), ((0, 0), (1, 0)))
    until, before = (
        take_along_axis(total, take_along_axis(bounds, run, axis=1), axis=1)
        for bounds in (nexts, firsts)
    )
    back = ops.argsort(order, axis=1)
    return take_along_axis(until > before, back, axis=1)[:, count:]
