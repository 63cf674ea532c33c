"""Measures under one backend, in a process of its own; prints a JSON line a result.

python -m benchmarks.grid.worker grid        # cells as JSON on standard input
python -m benchmarks.grid.worker thresholds  # points, likewise
"""

import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

import keras

from benchmarks.contestants import Contestant
from benchmarks.grid import layers, thresholds
from benchmarks.grid.cells import PASSES, Cell
from benchmarks.grid.rounds import compare
from keras_mha.bench import machine

# What is under this many times as fast as Keras's layer is timed again, with so many of
# each layer.
EQUAL = 1.0
COPIES = 3


def measure_cell(cell: Cell) -> dict[str, Any]:
    """Times both layers of a cell, forward and in training.

    One layer made twice was seen to differ from itself by up to 0.03. So what comes out
    slower than Keras's is timed again, with each layer made three times.
    """
    made = [layers.contestants(cell)]
    times = _times(cell, made, PASSES)
    slower = [run for run in PASSES if times[run]["ratio"]["median"] < EQUAL]
    if slower:
        made += [layers.contestants(cell) for _ in range(COPIES - 1)]
    for run, again in _times(cell, made, slower).items():
        for who in made[0]:
            again[who]["first"] = times[run][who]["first"]
        times[run] = again
    return {"name": cell.name, "cell": cell.config, "times": times}


def _times(
    cell: Cell, made: list[dict[str, Contestant]], runs: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Times some of `PASSES` of a cell's layers, of all that were made in turns."""
    # `torch.compile` may compile again in the second call, and in no later one.
    is_torch = keras.backend.backend() == "torch"
    warm_ups = 2 if is_torch and cell.program == "compiled" else 1
    found = {}
    for run in runs:
        i = PASSES.index(run)
        functions = {who: [pairs[who][i] for pairs in made] for who in made[0]}
        found[run] = compare(functions, warm_ups)
    return found


def warm_up(cells: list[Cell]) -> None:
    """Runs a tiny cell of each program, so that no other pays for what the process does
    but once."""
    for program in {cell.program for cell in cells}:
        heads, width = cells[0].heads, cells[0].width
        for pair in layers.contestants(
            Cell("plain", 2, 8, heads, width, program)
        ).values():
            for function in pair:
                function()


def main(part: str) -> None:
    """Measures what standard input asks for."""
    kind = {"grid": Cell, "thresholds": thresholds.Point}[part]
    wanted = [kind(**config) for config in json.load(sys.stdin)]
    _print({"machine": machine.description(keras.backend.backend())})
    if part == "grid" and keras.backend.backend() != "torch":  # which compiles nothing
        warm_up(wanted)
    measure = measure_cell if part == "grid" else thresholds.measure_point
    for each in wanted:
        _print({"started": each.name})
        _print(measure(each))
        gc.collect()


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
