"""Lengths: ints, or tensors where a graph learns them only when it runs."""

from typing import Any

from keras import ops

from keras_mha._keras import Tensor, larger, smaller


def shape_of(x: Tensor) -> tuple[Any, ...]:
    """Returns `ops.shape(x)`, for which TensorFlow runs an operation even where all
    lengths are known."""
    shape = tuple(x.shape)
    return shape if all(type(length) is int for length in shape) else ops.shape(x)


def unless_one(length: Any, other: Any, one: int = 1) -> Any:
    """Returns `other`, or `one` if the length is 1: a tensor if that is not known yet.

    Args:
        length: An int, or a scalar tensor that is worked out when a graph runs.
        other: What is returned for a length other than 1.
        one: What is returned for a length of 1.
    """
    if isinstance(length, int):
        return one if length == 1 else other
    return ops.where(ops.equal(length, 1), one, other)


def shorter(x: Any, y: Any) -> Any:
    """Returns the smaller of two lengths, a number if both are."""
    if isinstance(x, int) and isinstance(y, int):
        return min(x, y)
    return smaller(x, y)


def longer(x: Any, y: Any) -> Any:
    """Returns the larger of two lengths, a number if both are."""
    if isinstance(x, int) and isinstance(y, int):
        return max(x, y)
    return larger(x, y)
