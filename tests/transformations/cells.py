"""The cells of the table that do not hold numbers; all others must.

A cell is a feature of `FEATURES` and a transformation of its backend's.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """What cannot work, and says so.

    Args:
        error: A part of the error's text, which docs/guide.md lists.
        note: What the README's table says of it.
        note_in_chinese: The same.
    """

    error: str
    note: str
    note_in_chinese: str


class Fault(NamedTuple):
    """What should work and does not yet; the test fails once it does."""

    reason: str
    note: str
    note_in_chinese: str


IMPOSSIBLE: dict[tuple[str, str], Refusal] = {}
NOT_YET: dict[tuple[str, str], Fault] = {}
