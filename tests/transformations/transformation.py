"""What a transformation is, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Transformation(NamedTuple):
    """A column of tests, which is a row of the README's table.

    Args:
        run: Takes a `Program`, transforms it, and returns what came out, as arrays.
        gives: What that is: `"outputs"`, `"gradients"` (the outputs, and the gradients
            of their total), `"tangents"` or `"second"` derivatives.
        halves: Whether each half of the batch is a call of its own.
    """

    run: Callable[[Any], list]
    gives: str
    halves: bool = False
