"""What the grid found, as numbers to be told."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.grid.cells import PASSES, Cell
from benchmarks.grid.kept import Kept
from benchmarks.results import KERAS, OURS

LEAST = 0.97  # under this a ratio is not what the noise makes of 1.0


class Ratio(NamedTuple):
    """How many times faster than Keras's layer a cell is.

    Args:
        cell: The cell.
        run: String, `"forward"` or `"training"`.
        median: Float.
        low: Float, the first quartile.
        high: Float, the third quartile.
        ours: Seconds of our layer.
        theirs: Seconds of Keras's layer.
    """

    cell: Cell
    run: str
    median: float
    low: float
    high: float
    ours: float
    theirs: float


def ratios(found: Kept) -> Iterator[Ratio]:
    """Yields all ratios of a backend."""
    for record in found.found.values():
        for run in PASSES:
            times = record["times"][run]
            ratio = (times["ratio"][key] for key in ("median", "low", "high"))
            seconds = times[OURS]["median"], times[KERAS]["median"]
            yield Ratio(Cell(**record["cell"]), run, *ratio, *seconds)


def cut(ratio: float) -> str:
    """Writes a ratio with two digits behind the point, never as more than it is."""
    return f"{math.floor(100 * ratio + 1e-9) / 100:.2f}"


def compile_seconds(
    found: Kept, program: str, run: str, longest: int
) -> Iterator[tuple[Cell, float, float]]:
    """Yields what our layer's first call takes beyond a later one, and Keras's, where
    it is more than what the quartiles of later ones are apart.

    Args:
        found: What is kept of a backend.
        program: String, how the cells are run.
        run: String, `"forward"` or `"training"`.
        longest: Integer, the most tokens.
    """
    for record in found.found.values():
        cell = Cell(**record["cell"])
        if cell.program == program and cell.length <= longest:
            both = [record["times"][run][who] for who in (OURS, KERAS)]
            ours, theirs = (times["first"] - times["median"] for times in both)
            noise = max(times["high"] - times["low"] for times in both)
            if min(ours, theirs) > noise:
                yield cell, ours, theirs
