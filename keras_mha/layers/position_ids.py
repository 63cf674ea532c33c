"""Where tokens stand: the position ids of a call, given or counted."""

from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor, as_tensor, dtype_name, is_integer
from keras_mha.layers.axes import AttentionAxes
from keras_mha.ops.tensors import splits_sequences, take_along_axis


def checked_ids(name: str, ids: Any, shape: Shape, axis: int = 1) -> Tensor:
    """Returns position ids as a tensor, or raises.

    Args:
        name: Of the argument, for the message.
        ids: Whole numbers of shape `(T,)`, or of `shape`, whose first axis may be 1.
        shape: The batch and position axes of what they are for, such as `(B, T)`.
        axis: Which of them the positions are counted along.
    """
    ids = whole_numbers(name, ids)
    received = tuple(ids.shape)
    if len(received) == 1:
        fits = _checks.same(received[0], shape[axis])
    else:
        lead = received[:1] == (1,) or _checks.same(received[0], shape[0])
        same = all(map(_checks.same, received[1:], shape[1:]))
        fits = len(received) == len(shape) and lead and same
    if not fits:
        raise ValueError(
            f"`{name}` must have the shape {(shape[axis],)} or {tuple(shape)}. Where "
            "the query's side and the key's differ, give a pair (query's, key's). "
            f"Received: {name} of shape {received}"
        )
    return ids


def whole_numbers(name: str, ids: Any) -> Tensor:
    """Returns whole numbers as a tensor, or raises."""
    if not hasattr(ids, "shape") or not hasattr(ids, "dtype"):
        tensor = as_tensor(ids)
        if tensor is None:
            raise TypeError(
                f"`{name}` must be a tensor of whole numbers. "
                f"Received: {name}={ids!r} (of type {type(ids).__name__})"
            )
        ids = tensor
    if not is_integer(ids):
        raise TypeError(
            f"`{name}` must hold whole numbers. "
            f"Received: {name} of dtype {dtype_name(ids)}"
        )
    return ids


def pair_of_ids(position_ids: Any) -> tuple[Any, Any]:
    """Returns what a call was given for the query's side and the key's, or raises."""
    if isinstance(position_ids, tuple | list):
        if len(position_ids) != 2:
            raise ValueError(
                "`position_ids` must be one tensor or a pair (query's, key's). "
                f"Received: {len(position_ids)} tensors"
            )
        return tuple(position_ids)
    return position_ids, position_ids


def check_countable() -> None:
    """Raises where positions cannot be counted from 0."""
    if splits_sequences():
        raise ValueError(
            "`position_ids` must be given within torch's context_parallel, as one of "
            "its buffers: a process has a part of the sequences and cannot count from "
            "0. Received: position_ids=None"
        )


def checked_position_ids(
    position_ids: Any, axes: AttentionAxes, query: Shape, value: Shape
) -> tuple[Tensor, Tensor]:
    """Returns the position ids of the query's side and the key's side, or raises.

    Args:
        position_ids: What a call was given: for both sides, or a pair.
        axes: Of the inputs.
        query: The query's shape.
        value: The value's shape, at least its batch and position axes.
    """
    query_ids, key_ids = pair_of_ids(position_ids)
    rank, axis = axes.rank - 1, axes.attended[0]
    return (
        checked_ids("position_ids", query_ids, tuple(query[:rank]), axis),
        checked_ids("position_ids", key_ids, tuple(value[:rank]), axis),
    )


def restarted(segment_ids: Tensor) -> Tensor:
    """Counts positions from 0 within each segment.

    Args:
        segment_ids: Whole numbers of shape `(B, T)`; a segment starts wherever the
            number changes.

    Returns:
        int32, shape `(B, T)`.
    """
    length = ops.shape(segment_ids)[1]
    index = ops.broadcast_to(
        ops.arange(length, dtype="int32")[None], ops.shape(segment_ids)
    )
    first = ops.ones_like(segment_ids[:, :1], dtype="bool")
    changes = ops.not_equal(segment_ids[:, 1:], segment_ids[:, :-1])
    is_start = ops.concatenate([first, changes], axis=1)
    # The starts in order, then fillers: the n-th segment's tokens take the n-th.
    starts = ops.sort(ops.where(is_start, index, length), axis=1)
    number = ops.cumsum(ops.cast(is_start, "int32"), axis=1) - 1
    return index - take_along_axis(starts, number, axis=1)
