"""From how many scores on our tiles are better than whole scores.

python -m benchmarks.grid.thresholds    # prints it, from what is kept

What the planner's `FEW_SCORES` are to be, for the calls that have no fused kernel. It
is measured at the attention function alone.
"""

import importlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

import keras_mha
from benchmarks.contestants.common import random
from benchmarks.grid import kept
from benchmarks.grid.cells import HEADS_OF_A_GROUP, KINDS, MIDDLE, PASSES, RATE
from benchmarks.grid.rounds import compare
from benchmarks.tables import NONE, TITLES, table

PART = "thresholds"
TILES, WHOLE = "blockwise", "reference"
LENGTHS = {1: (128, 256, 384, 512, 768, 1024, 1536, 2048), 8: (128, 256, 384, 512, 768)}
SOFT_CAP = 30.0


@dataclass(frozen=True)
class Point:
    """A call of our function.

    Args:
        kind: String, one of the grid's kinds, or `"soft cap"`.
        batch: Integer.
        length: Integer, of queries and of keys.
    """

    kind: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        """Names the point in a file."""
        return f"{self.kind} {self.batch}x{self.length}"

    @property
    def cost(self) -> float:
        """About how many seconds it takes, to tell the time that is left."""
        return 4.0 + 1e-6 * self.batch * self.length**2

    @property
    def config(self) -> dict[str, Any]:
        """The point as JSON holds it."""
        return asdict(self)


def kinds(backend: str) -> tuple[str, ...]:
    """Returns the kinds of calls that have no fused kernel on a CPU."""
    return ("dropout", "soft cap") if backend == "torch" else KINDS


def points(backend: str) -> list[Point]:
    """Returns all that is measured under a backend."""
    return [
        Point(kind, batch, length)
        for kind in kinds(backend)
        for batch, lengths in LENGTHS.items()
        for length in lengths
    ]


def measure_point(point: Point) -> dict[str, Any]:
    """Times tiles and whole scores, forward and in training."""
    backend = keras.backend.backend()
    module = importlib.import_module(f"benchmarks.contestants.{backend}")
    heads = MIDDLE[0]
    shape = (point.batch, point.length)
    groups = heads // HEADS_OF_A_GROUP if point.kind == "grouped" else heads
    arrays = [random(*shape, n, MIDDLE[1]) for n in (heads, groups, groups)]
    pairs = {
        name: module.of_function(_function(point, name), arrays)
        for name in (TILES, WHOLE)
    }
    times = {
        name: compare({who: [pair[i]] for who, pair in pairs.items()})
        for i, name in enumerate(PASSES)
    }
    return {"name": point.name, "point": point.config, "times": times}


def _function(point: Point, implementation: str) -> Any:
    given = options(point)

    def function(query: Any, key: Any, value: Any) -> Any:
        return keras_mha.dot_product_attention(
            query, key, value, implementation=implementation, **given
        )

    return function


def options(point: Point) -> dict[str, Any]:
    """Returns the keyword arguments of our function."""
    masks = keras_mha.masks
    if point.kind == "causal":
        return {"mask": masks.Causal()}
    if point.kind == "padding":
        valid = np.arange(point.length) < point.length * 3 // 4
        valid = np.broadcast_to(valid, (point.batch, point.length))
        return {"mask": masks.Padding(keras.ops.convert_to_tensor(valid))}
    if point.kind == "dropout":
        return {"dropout": RATE, "seed": 0}
    return {"logit_soft_cap": SOFT_CAP} if point.kind == "soft cap" else {}


def threshold(found: Iterable[dict[str, Any]], run: str) -> int | None:
    """Returns the smallest T x S from which on tiles were the faster at every length.

    Args:
        found: The results of one kind and batch.
        run: String, `"forward"` or `"training"`.

    Returns:
        The number of scores, `None` if tiles were not the faster at the longest.
    """
    least = None
    for each in sorted(found, key=lambda x: x["point"]["length"], reverse=True):
        if each["times"][run]["ratio"]["median"] <= 1:
            break
        least = each["point"]["length"] ** 2
    return least


def section(found: dict[str, kept.Kept]) -> str:
    """Returns the table of the thresholds."""
    head = ["from T x S scores on tiles are the faster"]
    head += [f"batch of {batch}, {run}" for batch in LENGTHS for run in PASSES]
    rows = []
    for backend, each in found.items():
        for kind in kinds(backend):
            row = [f"{TITLES[backend]}, {kind}"]
            for batch in LENGTHS:
                of = [
                    x
                    for x in each.found.values()
                    if (x["point"]["kind"], x["point"]["batch"]) == (kind, batch)
                ]
                row += [_number(threshold(of, run)) for run in PASSES]
            rows.append(row)
    return table(head, rows)


def _number(scores: int | None) -> str:
    return NONE if scores is None else f"{round(scores**0.5)}²"


if __name__ == "__main__":
    print(section(kept.load(PART)))
