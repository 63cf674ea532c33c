"""Measures under one backend, in a process of its own; prints a JSON line a result.

python -m benchmarks.grid.worker grid        # cells as JSON on standard input
python -m benchmarks.grid.worker thresholds  # points, likewise
"""

import gc
import json
import sys
from typing import Any

import keras

from benchmarks.grid import layers, thresholds
from benchmarks.grid.cells import PASSES, Cell
from benchmarks.grid.rounds import compare
from keras_mha.bench import machine


def measure_cell(cell: Cell) -> dict[str, Any]:
    """Times both layers of a cell, forward and in training."""
    pairs = layers.contestants(cell)
    # `torch.compile` may compile again in the second call, and in no later one.
    is_torch = keras.backend.backend() == "torch"
    warm_ups = 2 if is_torch and cell.program == "compiled" else 1
    times = {
        name: compare({who: pair[i] for who, pair in pairs.items()}, warm_ups)
        for i, name in enumerate(PASSES)
    }
    return {"name": cell.name, "cell": cell.config, "times": times}


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
