"""Masks: what they allow, what they say of tiles, how they compose and are saved."""

import dataclasses
import functools
import json

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mha import masks
from tests.helpers import to_numpy

T, S = 7, 9


def whole(mask, batch=1, heads=1, rows=T, columns=S):
    """The mask's booleans for all pairs, shape (batch, heads, rows, columns)."""
    block = to_numpy(mask.block(masks.whole_tile(rows, columns)))
    return np.broadcast_to(block, (batch, heads, rows, columns))


def by_definition(allowed, rows=T, columns=S):
    return np.array([[allowed(i, j) for j in range(columns)] for i in range(rows)])


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (masks.Causal(), lambda i, j: j <= i),
        (masks.Causal(2), lambda i, j: j <= i + 2),
        (masks.Causal(offset=-1), lambda i, j: j <= i - 1),
        (masks.SlidingWindow(1), lambda i, j: i == j),
        (masks.SlidingWindow(3), lambda i, j: abs(i - j) < 3),
        (masks.Prefix(0), lambda i, j: False),
        (masks.Prefix(4), lambda i, j: j < 4),
        (masks.Causal() & masks.SlidingWindow(2), lambda i, j: 0 <= i - j < 2),
        (masks.Causal() | masks.Prefix(3), lambda i, j: j <= i or j < 3),
        (~masks.Causal(), lambda i, j: j > i),
        (~(masks.Causal() & ~masks.Prefix(2)), lambda i, j: j > i or j < 2),
        (masks.Where(lambda i, j: (i - j) % 3 == 0), lambda i, j: (i - j) % 3 == 0),
    ],
    ids=lambda value: str(value).split("<")[0] if isinstance(value, masks.Mask) else "",
)
@pytest.mark.parametrize(("rows", "columns"), [(T, S), (70, 80)])
def test_position_masks_allow_what_their_definition_says(mask, allowed, rows, columns):
    np.testing.assert_array_equal(
        whole(mask, rows=rows, columns=columns)[0, 0],
        by_definition(allowed, rows, columns),
    )


def test_offsets_and_prefixes_may_differ_from_row_to_row_of_the_batch():
    for mask, allowed in (
        (masks.Causal(np.array([0, 3])), lambda n, i, j: j <= i + n),
        (masks.Prefix(np.array([0, 3])), lambda n, i, j: j < n),
    ):
        block = whole(mask, batch=2)
        for row, n in enumerate((0, 3)):
            expected = by_definition(functools.partial(allowed, n))
            np.testing.assert_array_equal(block[row, 0], expected)


def test_padding_hides_a_key_from_every_query():
    valid = np.array([[True] * 5 + [False] * 4, [True] * 9])
    block = whole(masks.Padding(valid), batch=2)
    np.testing.assert_array_equal(
        block, np.broadcast_to(valid[:, None, None], (2, 1, T, S))
    )


def test_segments_attend_within_themselves_and_no_id_is_special():
    query_ids, key_ids = np.array([[0, 0, 1, 1, 2, -1, 0]]), np.arange(9)[None] // 3
    block = whole(masks.Segments(query_ids, key_ids))
    np.testing.assert_array_equal(block[0, 0], query_ids[0][:, None] == key_ids[0])


def test_one_array_of_segments_serves_both_sides():
    ids = np.array([[0, 0, 1]])
    block = whole(masks.Segments(ids), rows=3, columns=3)
    np.testing.assert_array_equal(block[0, 0], ids[0][:, None] == ids[0])


@pytest.mark.parametrize(
    "shape", [(T, S), (2, T, S), (2, 3, T, S), (2, 1, 1, S), (1, S)]
)
def test_a_dense_mask_is_batch_first_and_broadcasts(shape):
    values = np.random.default_rng(0).random(shape) < 0.5
    full = values[:, None] if len(shape) == 3 else values
    np.testing.assert_array_equal(
        whole(masks.Dense(values), 2, 3), np.broadcast_to(full, (2, 3, T, S))
    )


def test_whole_numbers_count_as_booleans():
    values = np.array([[0, 1, 2, -1]])
    block = whole(masks.Dense(values), rows=1, columns=4)
    np.testing.assert_array_equal(block[0, 0], [[False, True, True, True]])


def test_floats_count_as_booleans_with_a_warning_that_names_the_bias():
    with pytest.warns(UserWarning, match="attention_bias"):
        mask = masks.Dense(np.array([[0.0, 0.25, 1.0]], "float32"))
    block = whole(mask, rows=1, columns=3)
    np.testing.assert_array_equal(block[0, 0], [[False, True, True]])


def test_padding_may_be_floats_of_0_and_1():
    block = whole(masks.Padding(np.array([[0.0, 1.0]], "float32")), rows=1, columns=2)
    np.testing.assert_array_equal(block[0, 0], [[False, True]])


def test_arrays_compose_with_masks_from_either_side():
    values = np.random.default_rng(0).random((T, S)) < 0.5
    causal = by_definition(lambda i, j: j <= i)
    for mask, expected in (
        (masks.Causal() & values, causal & values),
        (values & masks.Causal(), causal & values),
        (masks.Causal() | values, causal | values),
        (values | masks.Causal(), causal | values),
    ):
        np.testing.assert_array_equal(whole(mask)[0, 0], expected)


# ---------------------------------------------------------------------- tiles


def position_masks():
    leaves = st.one_of(
        st.builds(masks.Causal, st.integers(-12, 12)),
        st.builds(masks.SlidingWindow, st.integers(1, 12)),
        st.builds(masks.Prefix, st.integers(0, 12)),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(masks.And, inner, inner),
            st.builds(masks.Or, inner, inner),
            st.builds(masks.Not, inner),
        ),
        max_leaves=4,
    )


@st.composite
def tiles(draw, rows=12, columns=12):
    row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    return masks.Tile(
        row,
        draw(st.integers(1, rows - row)),
        column,
        draw(st.integers(1, columns - column)),
    )


@given(mask=position_masks(), tile=tiles())
def test_what_a_mask_says_of_a_tile_is_true(mask, tile):
    block = np.broadcast_to(to_numpy(mask.block(tile)), (1, 1, tile.rows, tile.columns))
    if mask.status(tile) == "empty":
        assert not block.any()
    if mask.status(tile) == "full":
        assert block.all()


@given(
    mask=st.one_of(
        st.builds(masks.Causal, st.integers(-12, 12)),
        st.builds(masks.SlidingWindow, st.integers(1, 12)),
        st.builds(masks.Prefix, st.integers(0, 12)),
    ),
    tile=tiles(),
)
def test_a_single_position_mask_knows_every_empty_and_full_tile(mask, tile):
    block = to_numpy(mask.block(tile))
    block = np.broadcast_to(block, (1, 1, tile.rows, tile.columns))
    expected = "full" if block.all() else "mixed" if block.any() else "empty"
    assert mask.status(tile) == expected


def certain_masks():
    leaves = st.one_of(
        st.builds(masks.Causal, st.integers(-12, 12)),
        st.builds(masks.SlidingWindow, st.integers(1, 12)),
        st.builds(masks.Prefix, st.integers(0, 12)),
        st.builds(lambda n: masks.Causal() & masks.SlidingWindow(n), st.integers(1, 9)),
        st.builds(lambda n: masks.SlidingWindow(n) & masks.Causal(), st.integers(1, 9)),
    )
    return st.one_of(leaves, st.builds(masks.Or, leaves, leaves))


@given(mask=certain_masks(), tile=tiles())
def test_where_a_certain_mask_is_mixed_somebody_may_attend(mask, tile):
    assert masks.is_certain(mask)
    if mask.status(tile) == "mixed":
        assert to_numpy(mask.block(tile)).any()


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(np.array([1, 2])),
        masks.Prefix(np.array([1, 2])),
        masks.Padding(np.ones((2, S), bool)),
        masks.Where(lambda i, j: i == j),
        ~masks.Causal(),
        masks.Causal(-5) & masks.SlidingWindow(2),
        masks.Causal() & masks.Prefix(2),
        masks.Causal() | masks.Where(lambda i, j: i == j),
    ],
    ids=[
        "offsets",
        "prefixes",
        "padding",
        "function",
        "not",
        "window behind",
        "prefix and causal",
        "function or causal",
    ],
)
def test_of_other_masks_it_has_to_turn_out(mask):
    assert not masks.is_certain(mask)


@given(tile=tiles(T, S))
def test_a_tile_is_cut_out_of_the_whole(tile):
    generator = np.random.default_rng(0)
    ids = (generator.integers(0, 3, (2, T)), generator.integers(0, 3, (2, S)))
    for mask in (
        masks.Padding(generator.random((2, S)) < 0.5),
        masks.Segments(*ids),
        masks.Dense(generator.random((T, S)) < 0.5),
        masks.Dense(generator.random((2, 1, T, 1)) < 0.5),
        masks.Causal(np.array([1, 4])) & masks.Dense(generator.random((2, T, S)) < 0.5),
    ):
        rows, columns = (
            slice(tile.row, tile.row + tile.rows),
            slice(tile.column, tile.column + tile.columns),
        )
        block = np.broadcast_to(
            to_numpy(mask.block(tile)), (2, 1, tile.rows, tile.columns)
        )
        np.testing.assert_array_equal(block, whole(mask, batch=2)[:, :, rows, columns])


def test_masks_of_data_do_not_claim_to_know_a_tile():
    tile = masks.Tile(0, 2, 0, 2)
    for mask in (
        masks.Padding(np.ones((1, 2), "bool")),
        masks.Segments(np.zeros((1, 2), "int32")),
        masks.Dense(np.ones((2, 2), "bool")),
        masks.Causal(np.array([0])),
        masks.Prefix(np.array([0])),
    ):
        assert mask.status(tile) == "mixed"


def test_a_mask_of_ones_own_needs_one_method():
    class Dilated(masks.Mask):
        def allowed(self, rows, columns):
            return (rows - columns) % 2 == 0

    block = whole(Dilated() & masks.Causal())
    expected = by_definition(lambda i, j: (i - j) % 2 == 0 and j <= i)
    np.testing.assert_array_equal(block[0, 0], expected)


# ---------------------------------------------------------------------- saving


@keras.saving.register_keras_serializable(package="tests")
def every_second(rows, columns):
    return (rows + columns) % 2 == 0


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(3),
        masks.SlidingWindow(4) & masks.Causal(),
        ~(masks.Prefix(2) | masks.Causal()),
        masks.Padding(np.array([[True] * 5 + [False] * 4])),
        masks.Segments(
            np.array([[0, 0, 1, 1, 2, 2, 2]]), np.array([[0] * 5 + [1] * 4])
        ),
        masks.Dense(np.random.default_rng(0).random((T, S)) < 0.5),
        masks.Causal(np.array([2])),
        masks.Where(every_second),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_mask_comes_back_from_json(mask):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(mask)))
    revived = keras.saving.deserialize_keras_object(config)
    assert type(revived) is type(mask)
    np.testing.assert_array_equal(whole(revived), whole(mask))


def test_a_mask_that_cannot_be_saved_says_what_it_lacks():
    class Own(masks.Mask):
        pass

    with pytest.raises(NotImplementedError, match=r"Own must implement `get_config"):
        Own().get_config()


def test_masks_are_values_that_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.Causal().offset = 1
