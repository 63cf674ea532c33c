"""Tells what the grid found: in both READMEs and in docs/speed.md, between marks."""

from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import chinese, readme
from benchmarks.grid import kept, picture, thresholds
from benchmarks.grid.cells import (
    LEFT_OUT,
    PASSES,
    PROGRAMS,
    SHAPES,
    Cell,
    cells,
)
from benchmarks.grid.found import LEAST, Ratio, compile_seconds, cut, ratios
from benchmarks.tables import TITLES, table

MARKS = (
    "<!-- grid: begin (written by `python -m benchmarks`) -->",
    "<!-- grid: end -->",
)
LOWEST = 5  # of each backend are listed
LONGEST_COMPILED = 1024  # whose compilation is told
COMPILERS = {
    ("tensorflow", "compiled"): "TensorFlow, `tf.function`",
    ("tensorflow", "xla"): "TensorFlow, XLA",
    ("jax", "compiled"): "JAX, `jax.jit`",
}


def write(root: Path) -> None:
    """Draws the picture and writes the pages, as far as something was measured."""
    found, compared = kept.load("grid"), kept.load(thresholds.PART)
    if found:
        figure = picture.heat_map(found)
        figure.savefig(
            root / "docs" / "benchmarks" / "grid.png", dpi=110, bbox_inches="tight"
        )
        plt.close(figure)
        text = section(found)
        readme.replace(root / "README.md", MARKS, text)
        readme.replace(root / "README.zh-CN.md", MARKS, chinese.translated(text))
    if found or compared:
        readme.replace(root / "docs" / "speed.md", MARKS, page(found, compared))


def section(found: dict[str, kept.Kept]) -> str:
    """Returns what the READMEs say."""
    lines = [
        f"The grid: {len(SHAPES)} shapes, batch x length, of a plain call, a causal "
        "one, padding, dropout=0.1, 4 query heads to a key head (beside Keras's "
        "`GroupQueryAttention`), and cross-attention of 128 to 512 tokens; how many "
        "times faster than Keras's layer, the lowest of 4 heads of 32, 8 of 64 and 12 "
        f"of 64. What is under {LEAST} is framed.",
        "![The grid: how many times faster than Keras's layer]"
        "(docs/benchmarks/grid.png)",
        unfinished(found),
        summary(found),
        lowest(found),
        _machine(found),
    ]
    return "\n\n".join(filter(None, lines))


def unfinished(found: dict[str, kept.Kept]) -> str:
    """Says how much of the grid has been measured, `""` where all has."""
    wanted = {backend: cells(backend) for backend in found}
    count = sum(len(each) for each in wanted.values())
    measured = sum(
        cell.name in found[backend].found
        for backend, each in wanted.items()
        for cell in each
    )
    if measured == count:
        return ""
    return f"Measured so far: {measured} / {count} calls."


def page(found: dict[str, kept.Kept], compared: dict[str, kept.Kept]) -> str:
    """Returns what docs/speed.md says beside the README."""
    lines = []
    if found:
        lines += [
            "## What the grid leaves out, and what compiling takes",
            LEFT_OUT,
            compiling(found),
        ]
    if compared:
        lines += [
            "## From where on tiles are the faster",
            "Our `blockwise` beside our `reference`, at the attention function alone "
            "(8 heads of 64, as many queries as keys), for the calls that have no "
            "fused kernel on a CPU.",
            thresholds.section(compared),
        ]
    return "\n\n".join(filter(None, lines))


def summary(found: dict[str, kept.Kept]) -> str:
    """Returns the table of how many ratios there are, and how low they are."""
    columns = {backend: list(ratios(each)) for backend, each in found.items()}
    rows: dict[str, list[str]] = {
        "calls, forward and training": [],
        f"under {LEAST}": [],
        f"under {LEAST} by the third quartile too": [],
        "lowest": [],
        "median": [],
    }
    for of in columns.values():
        values = sorted(each.median for each in of)
        column = (
            str(len(of)),
            str(sum(each.median < LEAST for each in of)),
            str(sum(max(each.median, each.high) < LEAST for each in of)),
            f"{cut(values[0])}x",
            f"{cut(values[len(values) // 2])}x",
        )
        for row, cell in zip(rows.values(), column, strict=True):
            row.append(cell)
    head = ["the grid", *(TITLES[backend] for backend in columns)]
    return table(head, [[name, *cells] for name, cells in rows.items()])


def lowest(found: dict[str, kept.Kept]) -> str:
    """Returns the table of each backend's lowest ratios."""
    rows = []
    for backend, each in found.items():
        of = sorted(ratios(each), key=lambda ratio: ratio.median)[:LOWEST]
        rows += [[TITLES[backend], *_row(ratio)] for ratio in of]
    head = ["lowest of the grid", "", "", "times faster", "ours, ms", "Keras's, ms"]
    return table(head, rows)


def _row(ratio: Ratio) -> list[str]:
    return [
        call_name(ratio.cell),
        ratio.run,
        f"{cut(ratio.median)}x ({cut(ratio.low)}–{cut(ratio.high)})",
        f"{1e3 * ratio.ours:.3g}",
        f"{1e3 * ratio.theirs:.3g}",
    ]


def call_name(cell: Cell) -> str:
    """Names a call for a reader."""
    return (
        f"{cell.kind} {cell.batch} x {cell.length}, {cell.heads} x {cell.width}, "
        f"{cell.program}"
    )


def compiling(found: dict[str, kept.Kept]) -> str:
    """Returns what compiling takes, `""` where nothing was compiled."""
    rows = []
    for backend, each in found.items():
        for program, run in product(PROGRAMS, PASSES):
            name = COMPILERS.get((backend, program))
            of = list(compile_seconds(each, program, run, LONGEST_COMPILED))
            if name and of:
                rows.append([f"{name}, {run}", *_compiling(of)])
    head = ["compiling", "ours, s", "Keras's, s", "ours / Keras's", "most", "of"]
    if not rows:
        return ""
    return (
        "Compiling: seconds of the first call beyond those of a later one, up to "
        f"{LONGEST_COMPILED} tokens.\n\n{table(head, rows)}"
    )


def _compiling(of: list[tuple[Cell, float, float]]) -> list[str]:
    def median(numbers: Any) -> float:
        return sorted(numbers)[len(of) // 2]

    most = max(of, key=lambda each: each[1] / each[2])
    return [
        f"{median(ours for _, ours, _ in of):.2f}",
        f"{median(theirs for _, _, theirs in of):.2f}",
        f"{median(ours / theirs for _, ours, theirs in of):.2f}",
        f"{most[1] / most[2]:.2f}",
        call_name(most[0]),
    ]


def _machine(found: dict[str, kept.Kept]) -> str:
    machine = next(iter(found.values())).machine
    versions = ", ".join(
        f"{TITLES[backend]} {each.machine[backend]}" for backend, each in found.items()
    )
    return (
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; Keras {machine['keras']}, {versions}. float32; "
        "medians (and quartiles) of the ratios of interleaved rounds. Where this layer "
        "came out slower it was timed again, three of each layer in turns."
    )
