"""`plot_mask`: pairs, and what kernels make of the tiles."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from keras_mha import info, masks, plot_mask
from keras_mha.kernels import tiling
from keras_mha.masks import Mask, Tile
from keras_mha.plotting.mask import COLOURS
from tests.helpers import to_tensor

pytestmark = pytest.mark.once


def cells(figure):
    """Each cell of the picture as what it shows: tile's kind, and may attend or not."""
    (axes,) = figure.axes
    picture = np.asarray(axes.images[0].get_array())
    names = {
        "F": COLOURS["full"][1],
        "E": COLOURS["empty"][0],
        "x": COLOURS["mixed"][1],
        ".": COLOURS["mixed"][0],
    }
    found = np.full(picture.shape[:2], "?")
    for name, colour in names.items():
        found[np.abs(picture - to_rgb(colour)).max(axis=-1) < 1e-6] = name
    return ["".join(row) for row in found]


def entries(figure):
    return [entry.get_text() for entry in figure.legends[0].get_texts()]


def test_pairs_and_tiles_of_a_causal_mask():
    figure = plot_mask(masks.Causal(), 6, tile=2)
    assert cells(figure) == [
        "x.EEEE",
        "xxEEEE",
        "FFx.EE",
        "FFxxEE",
        "FFFFx.",
        "FFFFxx",
    ]
    assert entries(figure) == [
        "full tiles: 3 of 9 (33%)",
        "mixed tiles: 3 of 9 (33%): may attend",
        "mixed tiles: may not attend",
        "empty tiles: 3 of 9 (33%)",
    ]


def test_tiles_of_two_sizes_and_of_other_numbers_of_keys():
    figure = plot_mask(masks.Prefix(2), 2, 6, tile=(1, 3))
    assert cells(figure) == ["xx.EEE", "xx.EEE"]
    assert entries(figure)[1].startswith("mixed tiles: 2 of 4 ")


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.Causal(3),
        masks.Causal() & masks.SlidingWindow(5),
        masks.Prefix(4) | masks.Causal(),
        ~masks.SlidingWindow(7),
        masks.Where(lambda i, j: (i - j) % 2 == 0),
        masks.Segments(np.repeat([[0, 1, 2]], 7, axis=1)),
    ],
    ids=lambda mask: type(mask).__name__,
)
@pytest.mark.parametrize("tile", [4, 7])
def test_tiles_are_classed_as_the_kernels_class_them(mask, tile):
    """Of 21 positions: tiles of 4 overlap at the end, tiles of 7 do not."""
    figure = plot_mask(mask, 21, tile=tile)
    pieces = tiling.Pieces(21, tile, -(-21 // tile))
    plan = tiling.schedule(mask, pieces, pieces)
    total, full, live = pieces.count**2, plan.full.sum(), plan.live.sum()
    counts = [int(entry.split()[2]) for entry in np.delete(entries(figure), 2)]
    assert counts == [full, live - full, total - live]
    may = np.broadcast_to(np.asarray(mask.block(Tile(0, 21, 0, 21))), (1, 1, 21, 21))
    shown = np.array([[cell in "xF" for cell in row] for row in cells(figure)])
    np.testing.assert_array_equal(shown, may[0, 0])


def test_long_masks_are_cut_as_the_kernels_cut_them():
    pieces = tiling.cut_in_pieces(1100, tiling.USUAL)
    plan = tiling.schedule(masks.Causal(), pieces, pieces)
    figure = plot_mask(masks.Causal(), 1100)
    total = pieces.count**2
    assert entries(figure)[3].startswith(
        f"empty tiles: {total - plan.live.sum()} of {total} "
    )


@pytest.mark.parametrize(
    "rows, columns, tiles",
    [(64, 64, 64), (30, 30, 36), (20, 100, 5), (31, 31, 64), (3, 3, 9), (1, 1, 1)],
)
def test_short_masks_are_cut_into_a_few_tiles(rows, columns, tiles):
    figure = plot_mask(masks.Causal(), rows, columns)
    assert entries(figure)[0].split()[4] == str(tiles)


def borders(figure):
    """Where lines run along rows, and where along columns."""
    (axes,) = figure.axes
    lines = [tuple(map(tuple, line.get_xydata())) for line in axes.lines]
    rows = [y for (x, y), (_, other) in lines if y == other]
    columns = [x for (x, y), (other, _) in lines if x == other]
    return rows, columns


def test_tiles_have_borders_between_them():
    rows, columns = borders(plot_mask(masks.Causal(), 7, 9, tile=(3, 4)))
    assert rows == [2.5, 5.5]
    assert columns == [3.5, 7.5]


@pytest.mark.parametrize(("tiles", "lines"), [(64, 63), (65, 0)])
def test_more_tiles_than_lines_leave_room_for_have_no_borders(tiles, lines):
    rows, columns = borders(plot_mask(masks.Causal(), tiles, 2, tile=(1, 1)))
    assert len(rows) == lines
    assert columns == [0.5]


def test_a_tile_larger_than_the_mask_is_all_of_it():
    assert cells(plot_mask(masks.Prefix(5), 2, tile=64)) == ["FF", "FF"]


def test_long_masks_are_drawn_coarser():
    figure = plot_mask(masks.Prefix(1500), 3000, tile=3000)
    picture = figure.axes[0].images[0]
    assert picture.get_array().shape == (1000, 1000, 3)
    assert tuple(picture.get_extent()) == (-0.5, 2999.5, 2999.5, -0.5)
    assert set(cells(figure)) == {"x" * 500 + "." * 500}
    # Half of the pairs of each cell: a colour in between.
    figure = plot_mask(masks.Where(lambda i, j: j % 2 == 0), 8, 2048, tile=2048)
    found = np.asarray(figure.axes[0].images[0].get_array())
    between = np.mean([to_rgb(colour) for colour in COLOURS["mixed"]], axis=0)
    np.testing.assert_allclose(found, np.broadcast_to(between, found.shape), atol=1e-6)


def test_a_long_mask_is_never_built_whole():
    largest = 0

    class Watched(Mask):
        def allowed(self, rows, columns):
            nonlocal largest
            largest = max(largest, rows.shape[0] * columns.shape[1])
            return columns <= rows

    plot_mask(Watched(), 4096, tile=4096)
    assert 0 < largest <= 4096**2 / 4


VALID = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)


@pytest.mark.parametrize("sample", [0, 1, -1])
def test_data_of_one_row_of_the_batch_is_drawn(sample):
    mask = masks.Padding(VALID) & masks.Causal()
    expected = VALID[sample] & np.tri(4, dtype=bool)
    shown = cells(plot_mask(mask, 4, tile=4, sample=sample))
    assert shown == ["".join(".x"[int(may)] for may in row) for row in expected]


def test_a_head_of_a_mask_by_head_is_drawn():
    values = np.stack([np.tri(3, dtype=bool), np.eye(3, dtype=bool)])[None]
    for mask in (values, to_tensor(values), masks.Dense(values)):
        assert cells(plot_mask(mask, 3, tile=3, head=1)) == ["x..", ".x.", "..x"]


def test_any_sample_and_head_will_do_where_all_are_alike():
    figures = [plot_mask(masks.Causal(), 4, sample=n, head=n) for n in (0, 7)]
    assert cells(figures[0]) == cells(figures[1])


def test_offsets_by_row_of_the_batch_are_drawn():
    mask = masks.Causal(np.array([0, 2]))
    assert cells(plot_mask(mask, 1, 3, tile=3, sample=0)) == ["x.."]
    assert cells(plot_mask(mask, 1, 3, tile=3, sample=1)) == ["xxx"]


def test_a_mask_of_ones_own_is_drawn():
    class ByHead(Mask):
        def block(self, tile):
            return np.ones((2, 3, tile.rows, tile.columns), bool)

    assert cells(plot_mask(ByHead(), 2, tile=2, sample=1, head=2)) == ["xx", "xx"]


def test_axes_are_named_and_a_picture_is_made():
    figure = plot_mask(masks.Causal(), 40, title="$_causal")
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query", "key")
    assert figure.get_suptitle() == "$_causal"
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_given_figure_is_drawn_into():
    figure = Figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    assert plot_mask(masks.Causal(), 8, figure=left) is left
    plot_mask(masks.Prefix(3), 8, figure=right)
    figure.savefig(io.BytesIO(), format="png")
    assert len(left.axes) == len(right.axes) == 1


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(info.MissingExtra, match=r"matplotlib.*keras-mha\[viz\]"):
        plot_mask(masks.Causal(), 4)


@pytest.mark.parametrize(
    "mask, kwargs, named",
    [
        (masks.Causal(), {"query_length": 0}, "`query_length`"),
        (masks.Causal(), {"key_length": 0}, "`key_length`"),
        (masks.Causal(), {"tile": 0}, "`tile`"),
        (masks.Padding(VALID), {"key_length": 5}, "`valid` of Padding"),
        (np.ones((3, 4), bool), {}, r"`mask` must have the shape.*\(3, 4\)"),
        (np.ones(4, bool), {}, "mask must have the shape"),
        (masks.Padding(VALID), {"sample": 2}, "`sample` must be from -2 to 1"),
        (np.ones((1, 2, 4, 4), bool), {"head": 2}, "`head` must be from -2 to 1"),
    ],
)
def test_what_does_not_go_with_the_mask_is_refused(mask, kwargs, named):
    with pytest.raises(ValueError, match=named):
        plot_mask(mask, **{"query_length": 4, **kwargs})


@pytest.mark.parametrize(
    "mask, kwargs, named",
    [
        ("causal", {}, "array or a tensor of booleans"),
        (masks.Causal(), {"query_length": 4.0}, "`query_length`"),
        (masks.Causal(), {"tile": (2, 2, 2)}, "`tile` must be an integer or"),
        (masks.Causal(), {"tile": 2.5}, "`tile` must be an integer or"),
        (masks.Causal(), {"sample": 0.5}, "`sample`"),
        (masks.Causal(), {"figure": "new"}, "`figure`"),
    ],
)
def test_arguments_of_another_type_are_refused(mask, kwargs, named):
    with pytest.raises(TypeError, match=named):
        plot_mask(mask, **{"query_length": 4, **kwargs})


@pytest.mark.parametrize("mask", [None, masks.Causal])
def test_what_is_no_mask_is_named(mask):
    with pytest.raises(TypeError, match=r"`mask` must be a keras_mha\.masks\.Mask"):
        plot_mask(mask, 8)


def test_a_single_row_has_a_whole_number():
    figure = plot_mask(masks.Causal(), 1, 100)
    low, high = sorted(figure.axes[0].get_ylim())
    ticks = [tick for tick in figure.axes[0].get_yticks() if low <= tick <= high]
    assert ticks == [0]
