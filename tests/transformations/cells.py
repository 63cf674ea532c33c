"""The cells of the table that do not hold numbers; all others must.

A cell is a feature of `FEATURES` and a transformation of its backend's.
"""

# ruff: noqa: RUF001 (full-width punctuation is what Chinese has)

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
EXPORT_OF_GATHERS = Fault(
    "torch.take_along_dim, which Keras's take_along_axis calls, makes a constant of "
    "the batch under torch.export",
    "`segment_ids` and caches are exported for one batch size only.",
    "使用 `segment_ids` 或缓存时，只能按一个固定的批大小导出。",
)
NOT_YET: dict[tuple[str, str], Fault] = {
    (feature, "torch.export"): EXPORT_OF_GATHERS
    for feature in ("segment_ids", "cache", "cache, positions", "all together")
}
