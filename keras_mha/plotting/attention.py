"""Heads as a grid of maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

SMALLEST, LARGEST = 5.0, 9.0  # points, of the tokens


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
            booleans that broadcast to the scores (three axes are `(B, T, S)` beside
            scores with a batch, and `(N, T, S)` otherwise). By default a cell counts as
            masked where its weight is exactly 0. (The softmax gives no such weight to
            what may be attended to, unless it rounds a tiny one to 0; tell those apart
            by giving the mask.)
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
    size = _panel_size(rows, keys, count)
    high = -(-count // columns)
    figure = style.figure_of_size(
        figure, columns * (size[0] + 0.15) + 1.6, high * (size[1] + 0.3) + 1.2
    )
    top, bottom = float(maps.max() or 0), float(maps.min() or 0)
    fonts = text.font_families([*(labels[0] or []), *(labels[1] or []), title or ""])
    all_axes = style.panels(figure, count, columns)
    for index, (axes, weights, name) in enumerate(
        zip(all_axes, maps, names, strict=True)
    ):
        picture = _draw_map(axes, weights, min(bottom, 0), top if top > 0 else 1)
        if name:
            axes.set_title(name, fontsize="medium")
        _label_axis(axes.yaxis, labels[0], size[1] / rows, index % columns == 0, fonts)
        lowest = index + columns >= count
        _label_axis(axes.xaxis, labels[1], size[0] / keys, lowest, fonts)
    figure.colorbar(picture, ax=all_axes, label="attention weight", shrink=0.8)
    figure.supylabel("query", fontsize="medium")
    figure.supxlabel("key", fontsize="medium")
    if title:
        figure.suptitle(title, **text.PLAIN, **({"family": fonts} if fonts else {}))
    if maps.mask.any():
        style.legend(figure, [style.patch("masked", **style.MASKED)])
    return figure


def _panel_size(rows: int, keys: int, count: int) -> tuple[float, float]:
    """Returns a map's width and height in inches."""
    longer = max(rows, keys)
    side = min(max(0.11 * longer, 1.8), 3.3 if count > 1 else 5.0)
    return max(side * keys / longer, 0.8), max(side * rows / longer, 0.8)


def _draw_map(axes: "Axes", weights: np.ndarray, low: float, high: float) -> Any:
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


def _label_axis(
    axis: Any, labels: list[str] | None, room: float, shown: bool, fonts: list | None
) -> None:
    """Writes tokens, or numbers, where a token has `room` inches."""
    axis.set_tick_params(length=2, labelsize=7)
    if labels is None:
        axis.get_major_locator().set_params(integer=True)
        axis.set_tick_params(labelleft=shown, labelbottom=shown)
        return
    size = min(max(0.85 * 72 * room, SMALLEST), LARGEST)
    step = int(np.ceil(1.1 * size / (72 * room)))
    places = range(0, len(labels), step)
    kept = [labels[place] if shown else "" for place in places]
    options: dict[str, Any] = {"fontsize": size, **text.PLAIN}
    if fonts:
        options["family"] = fonts
    if axis.axis_name == "x":
        fits = max(map(text.width, kept)) * size <= 72 * room * step
        options["rotation"] = 0 if fits else 90
    axis.set_ticks(list(places), kept, **options)
