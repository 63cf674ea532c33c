"""What a transformation is, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SHORT, LONG = "short", "long"


class Transformation(NamedTuple):
    """A column of tests, which is a row of the README's table.

    Args:
        run: Takes a `Program`, transforms it, and returns what came out, as arrays.
        gives: What that is: `"outputs"`, `"gradients"` (the outputs, and the gradients
            of their total), `"tangents"` or `"second"` derivatives.
        halves: Whether each half of the batch is a call of its own.
        lengths: As what the calls are run: short ones, at once, and long ones, in
            tiles. Where programs take long to compile, one of them.
    """

    run: Callable[[Any], list]
    gives: str
    halves: bool = False
    lengths: tuple[str, ...] = (SHORT, LONG)
