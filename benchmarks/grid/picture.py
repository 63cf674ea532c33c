"""Draws the grid as a heat map of ratios."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle

from benchmarks.grid.cells import CROSS, CROSS_SHAPE, KEYS, KINDS, PASSES, SHAPES
from benchmarks.grid.found import LEAST, cut, ratios
from benchmarks.grid.kept import Kept
from benchmarks.tables import TITLES

# Panels, row by row; the last place holds the colours.
PANELS = (
    (("tensorflow", "eager"), ("jax", "eager"), ("torch", "eager")),
    (
        ("tensorflow", "compiled"),
        ("jax", "compiled"),
        ("torch", "compiled"),
        ("tensorflow", "xla"),
    ),
)
NAMES = {
    ("tensorflow", "compiled"): "tf.function",
    ("tensorflow", "xla"): "XLA",
    ("jax", "compiled"): "jax.jit",
    ("torch", "compiled"): "torch.compile",
}
COLUMNS = [(kind, run) for kind in KINDS for run in PASSES]
ROWS = [*SHAPES, CROSS]
# Colours for ratios from half to 8: by factors, white at 1.
COLOURS = TwoSlopeNorm(0, -1, 3)


def lowest(found: Kept, program: str) -> np.ndarray:
    """Returns `(rows, columns)`: the lowest ratio of all widths, NaN where none is."""
    grid = np.full((len(ROWS), len(COLUMNS)), np.nan)
    for ratio in ratios(found):
        cell = ratio.cell
        if cell.program != program:
            continue
        if cell.kind == CROSS:  # a shape of its own: a row, in the plain call's columns
            row, column = ROWS.index(CROSS), PASSES.index(ratio.run)
        else:
            row = ROWS.index((cell.batch, cell.length))
            column = COLUMNS.index((cell.kind, ratio.run))
        grid[row, column] = np.fmin(grid[row, column], ratio.median)
    return grid


def heat_map(found: dict[str, Kept]) -> plt.Figure:
    """Draws a panel for each backend and program; what is under 0.97 is framed."""
    figure, axes = plt.subplots(2, 4, figsize=(19, 10.5), layout="constrained")
    for row, panels in enumerate(PANELS):
        for column, (backend, program) in enumerate(panels):
            axis = axes[row, column]
            if backend in found:
                grid = lowest(found[backend], program)
                image = _panel(axis, grid, with_rows=column == 0)
                title = NAMES.get((backend, program), program)
                axis.set_title(f"{TITLES[backend]}, {title}")
            else:
                axis.axis("off")
    _colours(figure, axes[0, 3], image)
    return figure


def _panel(axis, grid, with_rows):
    axis.set_facecolor("0.9")
    image = axis.imshow(
        np.log2(grid), cmap="RdBu", norm=COLOURS, aspect="auto", interpolation="none"
    )
    for (row, column), ratio in np.ndenumerate(grid):
        if np.isnan(ratio):
            continue
        dark = not 0.65 < ratio < 4
        low = ratio < LEAST
        axis.text(
            column,
            row,
            cut(ratio) if ratio < 10 else f"{ratio:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
            weight="bold" if low else "normal",
        )
        if low:
            corner = column - 0.45, row - 0.45
            axis.add_patch(
                Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="black", linewidth=2)
            )
    axis.set_xticks(range(len(COLUMNS)), [f"{k}, {r}" for k, r in COLUMNS])
    axis.tick_params(axis="x", rotation=90, length=0, labelsize=8)
    names = [f"{batch} x {length}" for batch, length in SHAPES]
    names.append(f"cross {CROSS_SHAPE[0]} x {CROSS_SHAPE[1]} to {KEYS}")
    axis.set_yticks(range(len(ROWS)), names if with_rows else [])
    axis.tick_params(axis="y", length=0)
    return image


def _colours(figure, axis, image):
    axis.axis("off")
    bar = figure.colorbar(image, ax=axis, location="left", fraction=0.08, pad=0)
    ticks = (0.5, 1, 2, 4, 8)
    bar.set_ticks(np.log2(ticks), labels=[str(tick) for tick in ticks])
    bar.set_label("times faster than Keras's layer, the lowest of three widths")
