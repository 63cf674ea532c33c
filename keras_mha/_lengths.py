"""Lengths that may be 1 to broadcast, which a graph may learn only when it runs."""

from typing import Any

from keras import ops


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
