"""Where tokens stand along several axes: the coordinates of a call, given or counted.

A token of an image or a video has a whole number for each axis. Coordinates are tensors
whose last axis holds these numbers, in the order in which attention names its axes.
"""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor
from keras_mha.layers.axes import AttentionAxes
from keras_mha.layers.position_ids import check_countable, pair_of_ids, whole_numbers


def checked_coordinates(
    name: str, ids: Any, shape: Shape, attended: Sequence[int], axes: int
) -> Tensor:
    """Returns coordinates as a tensor, or raises.

    Args:
        name: Of the argument, for the message.
        ids: Whole numbers with `axes` coordinates along the last axis; before it the
            axes of `shape`, of which the first may be 1, or the attended ones alone, in
            the order of `shape`.
        shape: The batch and position axes of what they are for, such as `(B, T)`.
        attended: Which of these attention runs over.
        axes: How many coordinates a token has.
    """
    ids = whole_numbers(name, ids)
    received = tuple(ids.shape)
    of_all_rows = (*(shape[axis] for axis in sorted(attended)), axes)
    of_each = (*shape, axes)
    if len(received) == len(of_each) and received[0] == 1:
        fits = _same(received[1:], of_each[1:])
    else:
        fits = _same(received, of_all_rows) or _same(received, of_each)
    if not fits:
        raise ValueError(
            f"`{name}` must have the shape {of_all_rows} or {of_each}, with a "
            f"coordinate for each of the {axes} axes of `position`. Where the query's "
            "side and the key's differ, give a pair (query's, key's). "
            f"Received: {name} of shape {received}"
        )
    return ids


def checked_pair_of_coordinates(
    position_ids: Any, axes: AttentionAxes, query: Shape, value: Shape, count: int
) -> tuple[Tensor, Tensor]:
    """Returns the coordinates of the query's side and the key's side, or raises.

    Args:
        position_ids: What a call was given: for both sides, or a pair.
        axes: Of the inputs.
        query: The query's shape.
        value: The value's shape, at least its batch and position axes.
        count: How many coordinates a token has.
    """
    query_ids, key_ids = pair_of_ids(position_ids)
    rank = axes.rank - 1
    rest = axes.attended, count
    return (
        checked_coordinates("position_ids", query_ids, tuple(query[:rank]), *rest),
        checked_coordinates("position_ids", key_ids, tuple(value[:rank]), *rest),
    )


def check_can_be_counted(
    axes: AttentionAxes,
    query: Shape,
    value: Shape,
    count: int,
    window: tuple[int, ...] | None = None,
) -> None:
    """Raises unless tokens can be counted along as many axes as they have coordinates.

    Args:
        axes: Of the inputs.
        query: The query's shape.
        value: The value's shape, at least its batch and position axes.
        count: How many coordinates a token has.
        window: The sizes of the grid that they must not leave, if there is one.
    """
    if len(axes.attended) == count:
        if window is not None:
            _check_within(window, axes, {"query": query, "value": value})
        return
    if window is not None and len(axes.attended) == 1:
        lengths = [x[axes.attended[0]] for x in (query, value)]
        if lengths == [math.prod(window)] * 2:
            return  # the whole of it, row by row
    sizes = (query[axis] for axis in sorted(axes.attended))
    raise ValueError(
        f"`position_ids` must be given, such as of shape {(*sizes, count)}: `position` "
        f"has {count} axes and attention runs over {len(axes.attended)}, along which "
        "alone it can count. (Or name the axes with `attention_axes`.) "
        f"Received: position_ids=None, query of shape {tuple(query)}"
    )


def _same(received: Shape, expected: Shape) -> bool:
    return len(received) == len(expected) and all(map(_checks.same, received, expected))


def _check_within(
    window: tuple[int, ...], axes: AttentionAxes, shapes: dict[str, Shape]
) -> None:
    for name, shape in shapes.items():
        sizes = tuple(shape[axis] for axis in axes.attended)
        if any(
            size is not None and size > most
            for size, most in zip(sizes, window, strict=True)
        ):
            raise ValueError(
                f"`{name}` must have at most the sizes of the `window` of `position`, "
                f"{window}, along the attended axes {axes.attended}, unless "
                f"`position_ids` say otherwise. Received: {name} of shape "
                f"{tuple(shape)}, {sizes} along them"
            )


def counted_coordinates(
    axes: AttentionAxes,
    query: Tensor,
    value: Tensor,
    window: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns where queries and keys stand in grids that begin at 0, `(1, T, axes)`.

    Args:
        axes: Of the inputs, the attended ones being those of the grids.
        query: The query.
        value: The value.
        window: The grid that lies, row by row, on the attended axis if it is but one.
    """
    check_countable()
    if len(axes.attended) == 1:
        ids = grid_coordinates(window)
        return ids, ids
    known = [tuple(x.shape[axis] for axis in axes.attended) for x in (query, value)]
    sizes = [[ops.shape(x)[axis] for axis in axes.attended] for x in (query, value)]
    query_ids = grid_coordinates(sizes[0])
    if value is query or (None not in known[0] and known[0] == known[1]):
        return query_ids, query_ids  # one object: rotations are worked out once
    return query_ids, grid_coordinates(sizes[1])


def grid_coordinates(sizes: Sequence[Any]) -> Tensor:
    """Counts from 0 along each axis of a grid.

    Args:
        sizes: Of the grid's axes: integers, or what the backend has for lengths that
            are not known yet.

    Returns:
        int32, shape `(1, T, axes)`, the grid's points in row-major order.
    """
    along = []
    for axis, size in enumerate(sizes):
        shape = [size if i == axis else 1 for i in range(len(sizes))]
        counted = ops.reshape(ops.arange(0, size, dtype="int32"), shape)
        along.append(ops.broadcast_to(counted, tuple(sizes)))
    return ops.reshape(ops.stack(along, axis=-1), (1, math.prod(sizes), len(sizes)))
