"""Masks: which pairs may attend, and what kernels make of the tiles."""

from typing import TYPE_CHECKING, Any

import numpy as np

from keras_mha import _checks
from keras_mha._keras import Tensor
from keras_mha.kernels import tiling
from keras_mha.kernels.tiling import Pieces
from keras_mha.masks import Mask, Tile, as_mask
from keras_mha.plotting import style, text
from keras_mha.plotting.scores import allowed_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

FINEST = 1024  # cells of the picture along an axis
AT_ONCE = 2**22  # pairs that the mask is asked about at once
# Of tiles of each kind: pairs that may not attend, and pairs that may.
COLOURS = {
    "empty": ("#eeeeee", "#eeeeee"),
    "mixed": ("#fde3c3", "#e0811c"),
    "full": ("#2b6cb0", "#2b6cb0"),
}
KINDS = list(COLOURS)


def plot_mask(
    mask: Mask | Tensor,
    query_length: int,
    key_length: int | None = None,
    *,
    tile: int | tuple[int, int] | None = None,
    sample: int = 0,
    head: int = 0,
    title: str | None = None,
    figure: "FigureBase | None" = None,
) -> "FigureBase":
    """Draws which queries may attend to which keys, and how kernels class the tiles.

    A kernel that works tile by tile skips the tiles that the mask calls empty, does not
    mask those it calls full, and has the mask's booleans computed for the rest, the
    mixed ones. The legend says how many there are of each. A mask that holds data
    (`Padding`, `Segments`, `Dense`) or is a plain function (`Where`) calls every tile
    mixed. Needs matplotlib (`pip install "keras-mha[viz]"`).

    Args:
        mask: A `keras_mha.masks.Mask`, or booleans of shape `(T, S)`, `(B, T, S)` or
            `(B, N, T, S)`. `True` means may attend.
        query_length: Number of queries, `T`.
        key_length: Number of keys, `S`. Defaults to `query_length`.
        tile: Size of a tile, an int or `(rows, columns)`. Defaults to how the kernels
            cut the scores, into tiles of about 512 x 512, and below 1024 positions, of
            which kernels make too few tiles to show anything, to about an eighth of the
            longer axis. The last row and column of tiles, where the size does not
            divide the length, overlap those before, and so are never full, as in the
            kernels.
        sample: Which row of the batch to draw, where the mask tells them apart.
        head: Which head to draw, where the mask tells them apart.
        title: What to write above.
        figure: A matplotlib `Figure` or `SubFigure` to draw into. Defaults to a new
            figure.

    Returns:
        The figure, not shown, and unknown to pyplot. A mask with more than 1024
        positions is drawn coarser: a cell of the picture then stands for several pairs
        and has a colour in between. The mask is never built whole.

    Raises:
        MissingExtra: If matplotlib is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If the mask does not go with the lengths, or `sample` or `head` is
            beyond it.

    Example:

    >>> window = keras_mha.masks.Causal() & keras_mha.masks.SlidingWindow(12)
    >>> figure = keras_mha.plot_mask(window, 64, tile=8)
    """
    style.check_figure("plot_mask", figure)
    mask = _checked_mask(mask)
    rows = _checks.positive_integer("query_length", query_length)
    columns = rows
    if key_length is not None:
        columns = _checks.positive_integer("key_length", key_length)
    sample, head = _checks.integer("sample", sample), _checks.integer("head", head)
    mask.check((None, None, rows, columns))
    pieces = _pieces(tile, rows, columns)
    kinds = tile_kinds(mask, *pieces)
    shares, edges = _shares(mask, rows, columns, sample, head)
    return _draw(shares, edges, kinds, pieces, title, figure)


def _checked_mask(mask: Any) -> Mask:
    if mask is None or isinstance(mask, type):
        raise TypeError(
            "`mask` must be a keras_mha.masks.Mask (an object, not its class) or an "
            f"array of booleans. Received: mask={mask!r}"
        )
    return as_mask(mask)


def _pieces(tile: Any, rows: int, columns: int) -> tuple[Pieces, Pieces]:
    longer = max(rows, columns)
    if tile is None and longer >= 2 * tiling.USUAL:
        return (
            tiling.cut_in_pieces(rows, tiling.USUAL),
            tiling.cut_in_pieces(columns, tiling.USUAL),
        )
    if tile is None:
        tile = _small_tile(rows, columns)
    pair = (tile, tile) if hasattr(tile, "__index__") else tile
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            "`tile` must be an integer or (rows, columns). "
            f"Received: tile={tile!r} (of type {type(tile).__name__})"
        )
    sizes = [_checks.positive_integer("tile", size) for size in pair]
    return _cut(rows, sizes[0]), _cut(columns, sizes[1])


def _small_tile(rows: int, columns: int) -> int:
    eighth = -(-max(rows, columns) // 8)
    dividing = (
        size
        for size in range(eighth, 2 * eighth)
        if rows % size == 0 and columns % size == 0
    )
    return next(dividing, eighth)


def _cut(length: int, size: int) -> Pieces:
    # Of just this size: `cut_in_pieces` rounds it to what suits a processor.
    size = min(size, length)
    return Pieces(length, size, -(-length // size))


def tile_kinds(mask: Mask, rows: Pieces, columns: Pieces) -> np.ndarray:
    """Returns each tile's index into `KINDS`, `(row pieces, column pieces)`."""
    plan = tiling.schedule(mask, rows, columns)
    kinds = np.zeros((rows.count, columns.count), "int32")
    for i, order in enumerate(plan.columns):
        kinds[i, order[: plan.live[i]]] = KINDS.index("mixed")
        kinds[i, order[: plan.full[i]]] = KINDS.index("full")
    return kinds


def _shares(
    mask: Mask, rows: int, columns: int, sample: int, head: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns what share of the pairs in each cell may attend, and where cells begin.

    The mask is asked about some rows at a time.
    """
    step = -(-max(rows, columns) // FINEST)
    starts = np.arange(0, rows, step), np.arange(0, columns, step)
    stripe = max(AT_ONCE // columns // step, 1) * step
    shares = []
    for first in range(0, rows, stripe):
        tile = Tile(first, min(stripe, rows - first), 0, columns)
        pairs = allowed_pairs(mask, tile, sample, head).astype("float32")
        sums = np.add.reduceat(pairs, np.arange(0, tile.rows, step), axis=0)
        shares.append(np.add.reduceat(sums, starts[1], axis=1))
    sizes = [
        np.diff(start, append=length)
        for start, length in zip(starts, (rows, columns), strict=True)
    ]
    return np.concatenate(shares) / np.outer(*sizes), starts


def _draw(
    shares: np.ndarray,
    starts: tuple[np.ndarray, np.ndarray],
    kinds: np.ndarray,
    pieces: tuple[Pieces, Pieces],
    title: str | None,
    figure: "FigureBase | None",
) -> "FigureBase":
    rows, columns = (piece.length for piece in pieces)
    longer = max(rows, columns)
    size = [max(4.2 * length / longer, 1.2) for length in (rows, columns)]
    figure = style.figure_of_size(figure, max(size[1] + 0.6, 4.2), size[0] + 1.9)
    axes = figure.subplots()
    axes.imshow(
        _coloured(shares, starts, kinds, pieces),
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        aspect="equal" if 1 / 4 <= rows / columns <= 4 else "auto",
        interpolation="nearest",
    )
    _draw_borders(axes, pieces)
    axes.set(xlabel="key", ylabel="query")
    for axis in (axes.xaxis, axes.yaxis):
        style.whole_numbers(axis)
    style.head_line(figure, title, text.font_options([str(title or "")]))
    style.legend(figure, _entries(kinds))
    return figure


def _coloured(
    shares: np.ndarray,
    starts: tuple[np.ndarray, np.ndarray],
    kinds: np.ndarray,
    pieces: tuple[Pieces, Pieces],
) -> np.ndarray:
    """Returns the picture's cells as colours, `(rows, columns, 3)`."""
    from matplotlib.colors import to_rgb

    at = [s // piece.size for s, piece in zip(starts, pieces, strict=True)]
    kind = kinds[np.ix_(*at)]
    table = np.array([[to_rgb(colour) for colour in COLOURS[name]] for name in KINDS])
    without, within = table[kind, 0], table[kind, 1]
    return without + (within - without) * shares[..., None]


def _draw_borders(axes: "Axes", pieces: tuple[Pieces, Pieces]) -> None:
    for piece, line in zip(pieces, (axes.axhline, axes.axvline), strict=True):
        if piece.count <= 64:  # more would hide what is between them
            for index in range(1, piece.count):
                line(piece.first_new(index) - 0.5, color="white", linewidth=0.8)


def _entries(kinds: np.ndarray) -> list[Any]:
    counts = np.bincount(kinds.ravel(), minlength=len(KINDS))
    empty, mixed, full = (f"{n} of {kinds.size} ({n / kinds.size:.0%})" for n in counts)
    return [
        style.patch(f"full tiles: {full}", color=COLOURS["full"][1]),
        style.patch(f"mixed tiles: {mixed}: may attend", color=COLOURS["mixed"][1]),
        style.patch("mixed tiles: may not attend", color=COLOURS["mixed"][0]),
        style.patch(f"empty tiles: {empty}", color=COLOURS["empty"][0]),
    ]
