"""Heads laid over the image, or the frames, that they look at."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_mha import _checks
from keras_mha._keras import Tensor
from keras_mha.plotting import style, text
from keras_mha.plotting.scores import (
    as_numpy,
    chosen_heads,
    index_in,
    one_sample,
    scores_array,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def plot_heads_over_image(
    scores: Tensor,
    image: Tensor,
    *,
    query: int | None = None,
    grid: Sequence[int] | None = None,
    prefix_tokens: int = 0,
    heads: int | Sequence[int] | None = None,
    sample: int = 0,
    title: str | None = None,
    columns: int = 4,
    figure: "FigureBase | None" = None,
) -> "FigureBase":
    """Draws which patches of an image each head attends to, over the image itself.

    A panel a head, or for frames a row of panels a head. All share one scale of
    colours. It starts at an even share, what a patch would get if all patches were
    looked at alike: there, and below, the image stays bare, so that the colours show
    what is looked at more than others. It ends at the largest weight drawn, but not
    before twice the even share, so that attention that is nearly even looks so. The
    colour bar says what the even share is: 1 / the number of patches, or less where
    tokens before the patches take a part. Needs matplotlib
    (`pip install "keras-mha[viz]"`).

    Args:
        scores: Attention weights of shape `(T, S)`, `(N, T, S)` or `(B, N, T, S)`. The
            keys are `prefix_tokens` and then the patches, row by row (and frame by
            frame).
        image: The image, `(H, W)` or `(H, W, C)` with 1, 3 or 4 channels, or the
            frames, `(F, H, W)` or `(F, H, W, C)`. Three axes are frames if `grid` has
            three numbers; without a grid, if the last axis is not of 1, 3 or 4. Whole
            numbers are colours from 0 to 255; others from 0 to 1, or, if they go
            beyond, from their smallest to their largest.
        query: Index of the query whose attention is drawn, tokens before the patches
            counted; negative ones count from the end. If there are as many queries as
            keys and it is one of the patches, that patch is framed. Defaults to the
            mean over all queries.
        grid: The patches, as `(rows, columns)`, or `(frames, rows, columns)`, where the
            image's frames are a multiple of the grid's. Defaults to a square, for
            frames to a square each.
        prefix_tokens: How many keys stand before the patches, such as a class token.
            They are not drawn.
        heads: The heads to draw, in this order: an int or several. Negative numbers
            count from the last one. Defaults to all.
        sample: Which row of the batch to draw. (`image` is one image, not a batch.)
        title: What to write above.
        columns: How many panels stand in a row, of an image. Frames stand in one row.
        figure: A matplotlib `Figure` or `SubFigure` to draw into. Defaults to a new
            figure.

    Returns:
        The figure, not shown, and unknown to pyplot.

    Raises:
        MissingExtra: If matplotlib is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If the grid does not hold the keys, or another argument does not go
            with the scores or the image.

    Example:

    >>> maps = keras_mha.attention_maps(model, image[None])
    >>> keras_mha.plot_heads_over_image(maps["attention"], image, query=0)

    References:
        Dosovitskiy et al., 2021, An Image is Worth 16x16 Words:
            https://arxiv.org/abs/2010.11929
    """
    style.check_figure("plot_heads_over_image", figure)
    array = scores_array(scores)
    maps = one_sample(array, sample)
    numbers = chosen_heads(heads, len(maps))
    prefix = _checks.integer("prefix_tokens", prefix_tokens, minimum=0)
    columns = _checks.positive_integer("columns", columns)
    frames, is_video = _frames(image, grid)
    grid = _grid(grid, maps.shape[2] - prefix, len(frames), is_video, prefix)
    weights, place = _rows_to_draw(maps[numbers], query, prefix)
    weights = weights[:, prefix:].reshape(len(numbers), *grid)
    patch = None if place is None else tuple(map(int, np.unravel_index(place, grid)))
    names = [f"head {number}" for number in numbers] if array.ndim > 2 else [None]
    if is_video:
        columns = len(frames)
    return _draw(weights, frames, patch, names, title, columns, figure)


def _frames(image: Tensor, grid: Any) -> tuple[np.ndarray, bool]:
    """Returns `(F, H, W, C)` with numbers from 0 to 1, and whether they are frames."""
    pixels = as_numpy("image", image)
    shape = pixels.shape
    channels = bool(shape) and shape[-1] in (1, 3, 4)
    if grid is not None and hasattr(grid, "__len__"):
        is_video = len(grid) == 3
    else:
        is_video = pixels.ndim == 4 or (pixels.ndim == 3 and not channels)
    if pixels.ndim - is_video == 2:
        pixels = pixels[..., None]
    if not is_video:
        pixels = pixels[None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
        expected = "(F, H, W) or (F, H, W, C)" if is_video else "(H, W) or (H, W, C)"
        raise ValueError(
            f"`image` must have the shape {expected} with 1, 3 or 4 channels"
            f"{'' if grid is None else f' to go with grid={grid}'}. "
            f"Received: image of shape {shape}"
        )
    return _from_0_to_1(pixels), is_video


def _from_0_to_1(pixels: np.ndarray) -> np.ndarray:
    whole = pixels.dtype.kind in "iu"
    pixels = pixels.astype("float32")
    if not np.isfinite(pixels).all():
        raise ValueError("`image` must be finite. Received: NaN or infinite numbers")
    low, high = pixels.min(), pixels.max()
    if whole and low >= 0 and high <= 255:
        return pixels / 255
    if low >= 0 and high <= 1:
        return pixels
    return (pixels - low) / max(high - low, np.finfo("float32").tiny)


def _grid(
    grid: Any, patches: int, frames: int, is_video: bool, prefix: int
) -> tuple[int, int, int]:
    """Returns the grid as `(frames, rows, columns)`."""
    if grid is None:
        side = math.isqrt(max(patches // frames, 0))
        if side == 0 or side * side * frames != patches:
            squares = f"{frames} squares, one a frame" if is_video else "a square"
            raise ValueError(
                f"`grid` must be given where the patches do not make {squares}. "
                f"Received: grid=None, and scores with {patches} keys after "
                f"prefix_tokens={prefix}"
            )
        return frames, side, side
    if not isinstance(grid, Sequence | np.ndarray) or len(grid) not in (2, 3):
        raise ValueError(
            "`grid` must be (rows, columns) or (frames, rows, columns). "
            f"Received: grid={grid!r}"
        )
    sizes = [_checks.positive_integer("grid", size) for size in grid]
    sizes = [1] * (3 - len(sizes)) + sizes
    if math.prod(sizes) != patches:
        raise ValueError(
            "`grid` must hold as many patches as there are keys after the prefix, "
            f"{patches}. Received: grid={tuple(grid)}, that is {math.prod(sizes)}, "
            f"and prefix_tokens={prefix}"
        )
    if frames % sizes[0]:
        raise ValueError(
            f"`grid` must have a number of frames that divides the image's, {frames}. "
            f"Received: grid={tuple(grid)}"
        )
    return sizes[0], sizes[1], sizes[2]


def _rows_to_draw(
    maps: np.ndarray, query: int | None, prefix: int
) -> tuple[np.ndarray, int | None]:
    """Returns the weights `(heads, S)`, and which patch asks, if one does."""
    if query is None:
        return maps.mean(axis=1), None
    rows, keys = maps.shape[1:]
    query = index_in("query", query, rows, "queries")
    place = query - prefix if rows == keys and query >= prefix else None
    return maps[:, query], place


def _draw(
    weights: np.ndarray,
    frames: np.ndarray,
    patch: tuple[int, int, int] | None,
    names: list[str | None],
    title: str | None,
    columns: int,
    figure: "FigureBase | None",
) -> "FigureBase":
    count = len(weights) * len(frames)
    columns = min(columns, count)
    height, width = frames.shape[1:3]
    wide = min(max(2.0 * width / height, 1.0), 4.0)
    tall = min(max(wide * height / width, 0.6), 8.0)
    figure = style.figure_of_size(
        figure, columns * (wide + 0.1) + 1.2, -(-count // columns) * (tall + 0.35) + 0.4
    )
    repeats = len(frames) // weights.shape[1]
    even = float(weights.mean())  # at and below it, the image stays bare
    options = {"vmin": even, "vmax": max(float(weights.max()), 2 * even) or 1}
    all_axes = style.panels(figure, count, columns)
    for index, axes in enumerate(all_axes):
        head, frame = divmod(index, len(frames))
        here = frame // repeats
        picture = _draw_panel(axes, frames[frame], weights[head, here], options)
        if not 1 / 4 <= height / width <= 4:  # a spectrogram, say
            axes.set_aspect("auto")
        if patch is not None and patch[0] == here:
            _frame_patch(axes, patch[1:], weights.shape[2:], (height, width))
        _name_panel(axes, names[head], frame, len(frames))
    label = f"attention weight,\nfrom an even share of {even:.3g}"
    style.colour_bar(figure, picture, all_axes, label)
    style.head_line(figure, title, text.font_options([str(title or "")]))
    return figure


def _draw_panel(
    axes: "Axes", image: np.ndarray, weights: np.ndarray, options: dict[str, float]
) -> Any:
    height, width = image.shape[:2]
    extent = (0, width, height, 0)  # image and patches cover the same pixels
    axes.imshow(_faded(image), extent=extent)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("lightgray")
    return axes.imshow(
        weights,
        cmap=style.highlight(),
        extent=extent,
        interpolation="nearest",
        **options,
    )


def _faded(image: np.ndarray) -> np.ndarray:
    """Returns the image `(H, W, 3)` in colours that leave the strong ones free."""
    colours, opacity = image[..., :3], image[..., 3:]
    if opacity.size:
        colours = colours * opacity + 1 - opacity
    grey = colours.mean(axis=-1, keepdims=True)
    faded = 0.15 + 0.7 * (0.4 * colours + 0.6 * grey)
    return np.broadcast_to(faded, (*image.shape[:2], 3))


def _frame_patch(
    axes: "Axes", patch: Sequence[int], grid: Sequence[int], size: Sequence[int]
) -> None:
    from matplotlib.patches import Rectangle

    tall, wide = size[0] / grid[0], size[1] / grid[1]
    axes.add_patch(
        Rectangle(
            (patch[1] * wide, patch[0] * tall),
            wide,
            tall,
            fill=False,
            edgecolor="deepskyblue",
            linewidth=2,
            label="query",
        )
    )


def _name_panel(axes: "Axes", name: str | None, frame: int, frames: int) -> None:
    if frames == 1:
        axes.set_title(name or "", fontsize="medium")
        return
    axes.set_title(f"frame {frame}", fontsize="medium")
    if frame == 0:
        axes.set_ylabel(name or "")
