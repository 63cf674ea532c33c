"""What the pictures have in common: figures, colours and legends."""

from typing import TYPE_CHECKING, Any

from keras_mha.info import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import FigureBase
    from matplotlib.patches import Patch

# What nobody may attend to: no colour of the scale looks like it, 0 least of all.
MASKED = {"facecolor": "0.92", "edgecolor": "0.65", "hatch": "////", "linewidth": 0.0}


def check_figure(what: str, figure: Any) -> None:
    """Raises if there is no matplotlib, or `figure` is nothing to draw into."""
    require(what, {"matplotlib": "matplotlib"}, "viz")
    from matplotlib.figure import FigureBase

    if figure is not None and not isinstance(figure, FigureBase):
        raise TypeError(
            "`figure` must be a matplotlib Figure or SubFigure. "
            f"Received: figure={figure!r} (of type {type(figure).__name__})"
        )


def figure_of_size(
    figure: "FigureBase | None", width: float, height: float
) -> "FigureBase":
    """Returns the given figure, arranged by matplotlib, or a new one of this size."""
    if figure is None:
        from keras_mha.plotting.notebook_figure import NotebookFigure

        return NotebookFigure(figsize=(width, height), layout="compressed")
    # A part of a figure is arranged with the whole, which is its owner's business.
    if hasattr(figure, "set_layout_engine") and figure.get_layout_engine() is None:
        figure.set_layout_engine("compressed")
    return figure


def highlight() -> "Colormap":
    """Returns colours to lay over an image, whose low end lets it show through."""
    from matplotlib.colors import LinearSegmentedColormap

    # From nothing at all, soon to orange, to a strong red.
    stops = [
        (0.0, (1.0, 0.7, 0.0, 0.0)),
        (0.3, (1.0, 0.6, 0.0, 0.6)),
        (1.0, (0.85, 0.1, 0.0, 0.9)),
    ]
    return LinearSegmentedColormap.from_list("highlight", stops)


def panels(
    figure: "FigureBase", count: int, columns: int, **options: Any
) -> list["Axes"]:
    """Returns `count` axes in rows of `columns`."""
    rows = -(-count // columns)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.remove()
    return list(grid.flat[:count])


def colour_bar(
    figure: "FigureBase",
    picture: Any,
    all_axes: list["Axes"],
    label: str = "attention weight",
) -> None:
    """Says what the colours mean, once for all panels."""
    from matplotlib.ticker import MaxNLocator

    figure.colorbar(
        picture,
        ax=all_axes,
        label=label,
        ticks=MaxNLocator(5, steps=[1, 2, 5, 10]),
        aspect=30,
        pad=0.015,
    )


def whole_numbers(axis: "Axis") -> None:
    """Writes positions at an axis, which are whole also where there is only one."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def head_line(figure: "FigureBase", title: Any, fonts: dict[str, Any]) -> None:
    """Writes a title above, if there is one."""
    if title is not None:
        figure.suptitle(str(title), wrap=True, **fonts)


def patch(label: str, **style: Any) -> "Patch":
    """Returns an entry for a legend."""
    from matplotlib.patches import Patch

    return Patch(label=label, **style)


def legend(figure: "FigureBase", entries: list["Patch"], columns: int = 1) -> None:
    """Puts a legend at the figure's lower edge."""
    # Without such an engine "outside" is not known.
    arranged = figure.get_layout_engine() is not None
    where = "outside lower center" if arranged else "lower center"
    figure.legend(
        handles=entries, loc=where, ncols=columns, frameon=False, fontsize="small"
    )
