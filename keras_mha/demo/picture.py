"""The demo's picture: what the model looked at."""

from os import PathLike

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from keras_mha import attention_maps
from keras_mha.demo.model import GRID, TOKENS

COLUMNS = 5
EXTENT = (0, 8, 8, 0)  # pixels: images and patches cover the same square
# From nothing at all, so that the digit shows through, to a strong orange.
HIGHLIGHT = LinearSegmentedColormap.from_list(
    "highlight", [(1.0, 0.6, 0.0, 0.0), (1.0, 0.45, 0.0, 0.55), (0.85, 0.1, 0.0, 0.8)]
)


def rollout(scores: list[np.ndarray]) -> np.ndarray:
    """Follows the attention from the answer back to the patches.

    Attention rollout (Abnar and Zuidema, 2020): a block passes on half of its input
    through the residual and half through its attention, the mean over its heads. The
    answer is read from the mean of the tokens, and so is the rollout.

    Args:
        scores: List of arrays `(images, heads, tokens, tokens)`, first block first.

    Returns:
        Array of shape `(images, tokens)`, each row summing to 1.
    """
    identity = np.eye(scores[0].shape[-1])
    total = identity
    for block in scores:
        total = (0.5 * block.mean(axis=1) + 0.5 * identity) @ total
    return total.mean(axis=1)


def draw(
    model: keras.Model, images: np.ndarray, classes: np.ndarray, path: str | PathLike
) -> None:
    """Draws a digit of each class, and some mistakes, under the attention to them.

    Args:
        model: The trained classifier.
        images: Array of shape `(digits, 8, 8)`, the test digits.
        classes: Array of shape `(digits,)`, what they are.
        path: Where to write the picture, a PNG.
    """
    answers = model.predict(images, batch_size=len(images), verbose=0).argmax(-1)
    chosen = choose(answers, classes)
    maps = attention_maps(model, images[chosen])
    attention = rollout(list(maps.values()))
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 2.1 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Patches behind each answer (attention rollout), mistakes in red")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, index, shares in zip(grid.flat, chosen, attention, strict=False):
        overlay = _draw_digit(axes, images[index], shares, attention.max())
        _label(axes, answers[index], classes[index])
    figure.colorbar(
        overlay,
        ax=grid,
        shrink=0.6,
        format="{x:.0%}",
        label=f"share of the attention, from an even share of {1 / TOKENS:.2%}",
    )
    figure.savefig(path, dpi=120)


def choose(answers: np.ndarray, classes: np.ndarray) -> list[int]:
    """Picks the first digit of each class, then the first few that went wrong."""
    first = [int(np.argmax(classes == digit)) for digit in range(10)]
    wrong = [int(i) for i in np.flatnonzero(answers != classes) if i not in first]
    return first + wrong[:COLUMNS]


def _draw_digit(
    axes: Axes, image: np.ndarray, shares: np.ndarray, largest: float
) -> AxesImage:
    axes.imshow(image, cmap="gray_r", vmax=1.15, extent=EXTENT, interpolation="bicubic")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("lightgray")
    return axes.imshow(
        shares.reshape(GRID, GRID),
        cmap=HIGHLIGHT,
        vmin=1 / TOKENS,
        vmax=largest,
        extent=EXTENT,
    )


def _label(axes: Axes, answer: int, true: int) -> None:
    if answer == true:
        axes.set_title(f"read as {answer}")
    else:
        axes.set_title(f"read as {answer}, is {true}", color="firebrick")
