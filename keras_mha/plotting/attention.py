"""Heads as a grid of maps."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_mha import _checks
from keras_mha._keras import Tensor
from keras_mha.masks import Mask, as_mask, whole_tile
from keras_mha.plotting import style, text
from keras_mha.plotting.scores import (
    allowed_pairs,
    chosen_heads,
    one_sample,
    scores_array,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

SMALLEST, LARGEST = 6.0, 8.5  # points, of the tokens


def plot_attention(
    scores: Tensor,
    query_tokens: Sequence[Any] | None = None,
    key_tokens: Sequence[Any] | None = None,
    heads: int | Sequence[int] | None = None,
    *,
    mask: Mask | Tensor | None = None,
    sample: int = 0,
    title: str | None = None,
    columns: int = 4,
    figure: "FigureBase | None" = None,
) -> "FigureBase":
    """Draws what each head attends to: a map for each, queries down and keys across.

    All heads share one scale of colours, from 0 to the largest weight drawn. Masked
    cells are hatched. Needs matplotlib (`pip install "keras-mha[viz]"`).

    Args:
        scores: Attention weights of shape `(T, S)`, `(N, T, S)` or `(B, N, T, S)`, an
            array or a tensor of any floating-point type.
        query_tokens: The `T` tokens of the queries, which label the vertical axis.
            Spaces at their ends, line breaks and the like are made visible, and long
            tokens are cut. Defaults to the positions' numbers. Where there is no room
            for all, every second, third or so is written.
        key_tokens: The `S` tokens of the keys, along the horizontal axis.
        heads: The heads to draw, in this order: an int or several. Negative numbers
            count from the last one. Defaults to all.
        mask: Who may attend, where `True` means may: a `keras_mha.masks.Mask`, or
            booleans of two axes or more that broadcast to the scores. (Three axes are
            `(B, T, S)` beside scores with a batch, and `(N, T, S)` beside others.) By
            default a cell counts as masked where its weight is exactly 0. The softmax
            gives no such weight to what may be attended to, unless it rounds a tiny one
            to 0, as in float16; give the mask to tell those apart.
        sample: Which row of the batch to draw, of scores and mask.
        title: What to write above.
        columns: How many maps stand in a row.
        figure: A matplotlib `Figure` or `SubFigure` to draw into. Defaults to a new
            figure, of a size that suits the scores.

    Returns:
        The figure. It is not shown (a notebook shows what a cell ends with) and pyplot
        does not know of it, so that there is nothing to close.

    Raises:
        MissingExtra: If matplotlib is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If shapes, numbers of tokens or indices do not go with the scores,
            or the scores are not finite.

    Example:

    >>> tokens = ["the", "cat", "sat"]
    >>> output, scores = layer(x, x, use_causal_mask=True, return_attention_scores=True)
    >>> figure = keras_mha.plot_attention(scores, tokens, tokens)
    >>> figure.savefig("attention.png")
    """
    style.check_figure("plot_attention", figure)
    array = scores_array(scores)
    maps = one_sample(array, sample)
    count, rows, keys = maps.shape
    numbers = chosen_heads(heads, count)
    columns = min(_checks.positive_integer("columns", columns), len(numbers))
    labels = (
        text.labels("query_tokens", query_tokens, rows),
        text.labels("key_tokens", key_tokens, keys),
    )
    masked = _masked(array, maps, mask, sample, numbers)
    drawn = np.ma.array(maps[numbers], mask=masked)
    names = [f"head {number}" for number in numbers] if array.ndim > 2 else [None]
    return _draw(drawn, names, labels, title, columns, figure)


def _masked(
    array: np.ndarray,
    maps: np.ndarray,
    mask: Mask | Tensor | None,
    sample: int,
    numbers: list[int],
) -> np.ndarray:
    """Returns which cells are masked, `(heads, T, S)`."""
    if mask is None:
        return maps[numbers] == 0
    if not isinstance(mask, Mask):
        mask = np.asarray(mask) if not hasattr(mask, "shape") else mask
        if len(mask.shape) == 3 and array.ndim == 3:
            mask = mask[None]
    mask = as_mask(mask)
    rows, keys = maps.shape[1:]
    mask.check((len(array) if array.ndim == 4 else None, *maps.shape))
    tile = whole_tile(rows, keys)
    return np.stack([~allowed_pairs(mask, tile, sample, head) for head in numbers])


def _draw(
    maps: np.ma.MaskedArray,
    names: list[str | None],
    labels: tuple[list[str] | None, list[str] | None],
    title: str | None,
    columns: int,
    figure: "FigureBase | None",
) -> "FigureBase":
    count, rows, keys = maps.shape
    height, width = _map_size(rows, keys, count)
    fonts = text.font_options(
        [*(labels[0] or []), *(labels[1] or []), str(title or "")]
    )
    ticks = _ticks(labels[0], height / rows), _ticks(labels[1], width / keys)
    any_masked = bool(maps.mask.any())
    edges = 0.3 + 0.35 * bool(title) + 0.3 * any_masked
    figure = style.figure_of_size(
        figure,
        columns * (width + 0.15) + ticks[0].longest + 1.25,
        -(-count // columns) * (height + 0.35) + ticks[1].longest + edges,
    )
    low, high = min(float(maps.min() or 0), 0), float(maps.max() or 0)
    all_axes = style.panels(figure, count, columns)
    for index, axes in enumerate(all_axes):
        picture = _draw_map(axes, maps[index], low, high if high > low else low + 1)
        axes.set_title(names[index] or "", fontsize="medium")
        first, lowest = index % columns == 0, index + columns >= count
        _label_axis(axes.yaxis, "query", ticks[0], first, fonts)
        _label_axis(axes.xaxis, "key", ticks[1], lowest, fonts)
    style.colour_bar(figure, picture, all_axes)
    style.head_line(figure, title, fonts)
    if any_masked:
        style.legend(figure, [style.patch("masked", **style.MASKED)])
    return figure


def _map_size(rows: int, keys: int, count: int) -> tuple[float, float]:
    """Returns a map's height and width in inches."""
    longer = max(rows, keys)
    side = min(max(0.17 * longer, 1.8), 3.3 if count > 1 else 5.0)
    return max(side * rows / longer, 0.8), max(side * keys / longer, 0.8)


def _draw_map(axes: "Axes", weights: np.ma.MaskedArray, low: float, high: float) -> Any:
    if weights.mask.any():
        # Masked cells are transparent: what shows through is the background.
        axes.patch.set(**style.MASKED)
    nearly_square = 1 / 4 <= weights.shape[0] / weights.shape[1] <= 4
    return axes.imshow(
        weights,
        cmap="Blues",
        vmin=low,
        vmax=high,
        aspect="equal" if nearly_square else "auto",
        interpolation="nearest",
    )


class _Ticks(NamedTuple):
    """Where tokens are written along an axis, and how.

    Args:
        places: Their positions; `None` for the positions' numbers.
        labels: What is written there.
        size: Of the font, in points.
        upright: Whether each fits beside the next without being turned.
        longest: Inches that the longest takes, turned where it must be.
    """

    places: list[int] | None
    labels: list[str]
    size: float
    upright: bool
    longest: float


def _ticks(labels: list[str] | None, room: float) -> _Ticks:
    """Finds a font's size, and if need be which labels to leave out.

    Args:
        labels: All labels.
        room: Inches from one to the next.
    """
    if labels is None:
        return _Ticks(None, [], 7, True, 0.2)
    points = 72 * room
    size = min(max(0.85 * points, SMALLEST), LARGEST)
    step = math.ceil(1.1 * size / points)
    kept = labels[::step]
    longest = size * max(map(text.width, kept))
    upright = longest <= points * step
    return _Ticks(list(range(0, len(labels), step)), kept, size, upright, longest / 72)


def _label_axis(
    axis: Any, name: str, ticks: _Ticks, shown: bool, fonts: dict[str, Any]
) -> None:
    """Names an axis and writes its ticks, where they are `shown`."""
    axis.set_tick_params(
        length=2, labelsize=ticks.size, labelleft=shown, labelbottom=shown
    )
    if shown:
        axis.set_label_text(name)
    if ticks.places is None:
        style.whole_numbers(axis)
    elif shown:
        turned = axis.axis_name == "x" and not ticks.upright
        axis.set_ticks(ticks.places, ticks.labels, rotation=90 * turned, **fonts)
    else:
        axis.set_ticks(ticks.places)
