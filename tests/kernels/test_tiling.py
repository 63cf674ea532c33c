"""How the score matrix is cut, and which tiles a mask leaves alive."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mha import masks
from keras_mha.kernels import backends, tiling
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import prepared
from keras_mha.kernels.tiling import cut_in_pieces, schedule
from tests.helpers import to_numpy, to_tensor


@given(length=st.integers(1, 3000), size=st.integers(1, 600))
def test_pieces_cover_an_axis_and_stay_within_it(length, size):
    pieces = cut_in_pieces(length, size)
    assert pieces.size <= max(size + 15, 16)
    starts = [pieces.start(index) for index in range(pieces.count)]
    assert all(0 <= start <= length - pieces.size for start in starts)
    new = [
        np.arange(pieces.first_new(index), start + pieces.size)
        for index, start in enumerate(starts)
    ]
    np.testing.assert_array_equal(np.concatenate(new), np.arange(length))


@given(length=st.integers(1, 300), size=st.integers(1, 60))
def test_joined_pieces_are_the_axis_again(length, size):
    pieces = cut_in_pieces(length, size)
    axis = np.arange(length)
    cut = [axis[s : s + pieces.size] for s in map(pieces.start, range(pieces.count))]
    joined = pieces.joined(to_tensor(np.stack(cut)[None]))
    np.testing.assert_array_equal(to_numpy(joined), axis[None])


POSITION_MASKS = st.recursive(
    st.one_of(
        st.integers(-20, 20).map(masks.Causal),
        st.integers(1, 30).map(masks.SlidingWindow),
        st.integers(0, 60).map(masks.Prefix),
    ),
    lambda inner: st.one_of(
        st.builds(masks.And, inner, inner),
        st.builds(masks.Or, inner, inner),
        inner.map(masks.Not),
    ),
    max_leaves=3,
)


@given(mask=POSITION_MASKS, rows=st.integers(1, 70), columns=st.integers(1, 70))
def test_the_schedule_has_every_tile_with_work_and_names_the_full_ones(
    mask, rows, columns
):
    booleans = np.broadcast_to(
        to_numpy(mask.block(masks.whole_tile(rows, columns))), (1, 1, rows, columns)
    )[0, 0]
    row_pieces, column_pieces = cut_in_pieces(rows, 16), cut_in_pieces(columns, 16)
    plan = schedule(mask, row_pieces, column_pieces)
    for index in range(row_pieces.count):
        start = row_pieces.start(index)
        slab = booleans[start : start + row_pieces.size]
        listed = plan.columns[index, : plan.live[index]].tolist()
        assert len(set(listed)) == len(listed)
        for number in range(column_pieces.count):
            start = column_pieces.start(number)
            tile = slab[:, start : start + column_pieces.size]
            if number in listed[: plan.full[index]]:
                assert tile.all()
            elif number not in listed:
                assert not tile.any()


def test_a_window_leaves_a_band_of_tiles():
    pieces = cut_in_pieces(4096, 512)
    window = masks.Causal() & masks.SlidingWindow(512)
    plan = schedule(window, pieces, pieces)
    np.testing.assert_array_equal(plan.live, [1, *[2] * 7])


def test_a_causal_mask_leaves_a_triangle_of_tiles_mixed_on_the_diagonal():
    pieces = cut_in_pieces(4096, 512)
    plan = schedule(masks.Causal(), pieces, pieces)
    np.testing.assert_array_equal(plan.live, np.arange(1, 9))
    np.testing.assert_array_equal(plan.full, np.arange(8))


@pytest.mark.parametrize("device", ["gpu", "tpu", "other"])
def test_devices_that_have_measured_none_get_tiles_of_the_usual_size(device):
    x = to_tensor(np.zeros((1, 4, 2, 4)))
    problem, _ = prepared(AttentionCall(x, x, x))
    problem = dataclasses.replace(problem, device=None, tile=tiling.TILE)
    assert problem.lowered_for(device).tile == tiling.USUAL
    assert problem.lowered_for("cpu").tile == backends.current().LARGEST_TILE
