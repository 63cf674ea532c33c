"""Learned keys in front of a sequence's: what masks and biases say of their columns."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mha
from keras_mha import masks
from keras_mha.kernels.tiling import cut_in_pieces, schedule
from keras_mha.masks import Tile, whole_tile
from keras_mha.memory_columns import (
    BiasBesideMemory,
    bias_beside_memory,
    mask_beside_memory,
)
from tests.helpers import to_numpy, to_tensor

B, N, T, S = 2, 3, 7, 9
RNG = np.random.default_rng(0)


class Dilated(masks.Mask):
    """Of one's own; it knows no tile that is all or nothing."""

    def allowed(self, rows, columns):
        return (rows - columns) % 3 == 0


class Backwards(masks.Causal):
    """A kind that is like another and allows something else."""

    def block(self, tile):
        return ~(super().block(tile))

    def status(self, tile):
        return "mixed"


VALID = RNG.uniform(size=(B, S)) < 0.6
MASKS = {
    "causal": masks.Causal(),
    "causal from an offset": masks.Causal(2),
    "causal from before": masks.Causal(-3),
    "causal by row": masks.Causal(np.array([0, 3])),
    "window": masks.SlidingWindow(2),
    "prefix": masks.Prefix(4),
    "prefix by row": masks.Prefix(np.array([0, 3])),
    "prefix below 0": masks.Prefix(np.array([-3, 2])),
    "prefix in small integers": masks.Prefix(np.array([255, 2], "uint8")),
    "padding": masks.Padding(VALID),
    "padding of all rows": masks.Padding(VALID[:1]),
    "padding of all keys": masks.Padding(np.array([[True], [False]])),
    "segments": masks.Segments(RNG.integers(0, 3, (B, T)), RNG.integers(0, 3, (B, S))),
    "dense": masks.Dense(RNG.uniform(size=(B, N, T, S)) < 0.6),
    "dense of queries": masks.Dense(RNG.uniform(size=(B, 1, T, 1)) < 0.6),
    "one's own": Dilated(),
    "a subclass": Backwards(),
    "and": masks.Causal() & masks.Padding(VALID),
    "and a window": masks.Causal() & masks.SlidingWindow(2),
    "or": masks.Causal() | masks.Prefix(3),
    "not": ~masks.Causal(),
    "not in and": masks.Causal() & ~masks.SlidingWindow(2),
    "nothing": ~masks.Prefix(100),
}
BIASES = {
    "ALiBi": lambda: keras_mha.ALiBi(N).bias(),
    "ALiBi at places": lambda: keras_mha.ALiBi(N).bias(
        to_tensor(RNG.integers(0, 9, (B, T)), "int32"),
        to_tensor(RNG.integers(0, 9, (1, S)), "int32"),
    ),
}


def block_of(kind, tile):
    """What a mask or a bias gives for a tile, for all rows of the batch and heads."""
    block = to_numpy(kind.block(tile))
    return np.broadcast_to(block, (B, N, tile.rows, tile.columns))


def behind(front, x, count):
    """`x`, shape `(B, N, T, S)`, behind `count` columns, as `front` fills them."""
    return np.concatenate([np.full((B, N, T, count), front), x], axis=-1)


@st.composite
def tiles(draw):
    """How many learned keys there are, and a tile of all scores."""
    # Of few sizes, since JAX compiles a program for each.
    count, rows = draw(st.sampled_from([2, 12])), draw(st.sampled_from([2, T]))
    columns = draw(st.sampled_from([1, 4, count + S]))
    row = draw(st.integers(0, T - rows))
    column = draw(st.integers(0, count + S - columns))
    return count, Tile(row, rows, column, columns)


def as_in_a_loop(tile):
    """The same tile, with its place in a tensor."""
    row, column = (to_tensor(x, "int32") for x in (tile.row, tile.column))
    return tile._replace(row=row, column=column)


def cut(x, tile):
    rows = slice(tile.row, tile.row + tile.rows)
    return x[:, :, rows, tile.column : tile.column + tile.columns]


@pytest.mark.parametrize("name", MASKS)
@given(tiles())
def test_a_mask_says_of_every_tile_what_it_said_and_hides_no_learned_key(name, drawn):
    count, tile = drawn
    old = MASKS[name]
    expected = behind(True, block_of(old, whole_tile(T, S)), count)
    mask = mask_beside_memory(old, count, S, (B, N, T, S))
    mask.check((B, N, T, count + S))
    found = block_of(mask, whole_tile(T, count + S))
    np.testing.assert_array_equal(found, expected)
    expected = cut(expected, tile)
    possible = {"mixed"} | ({"full"} if expected.all() else set())
    possible |= set() if expected.any() else {"empty"}
    for each in (tile, as_in_a_loop(tile)):
        np.testing.assert_array_equal(block_of(mask, each), expected)
        assert mask.status(each) in possible


@pytest.mark.parametrize("name", BIASES)
@given(tiles())
def test_a_bias_adds_to_every_tile_what_it_added_and_nothing_to_learned_keys(
    name, drawn
):
    count, tile = drawn
    old = BIASES[name]()
    expected = behind(0.0, block_of(old, whole_tile(T, S)), count)
    bias = BiasBesideMemory(count, S, old)
    assert bias.is_finite
    bias.check((B, N, T, count + S))
    found = block_of(bias, whole_tile(T, count + S))
    np.testing.assert_allclose(found, expected)
    for each in (tile, as_in_a_loop(tile)):
        found, wanted = block_of(bias, each), cut(expected, tile)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (S,), (T, 1), (N, 1, S), (B, N, T, S)])
def test_numbers_that_broadcast_are_not_added_to_learned_keys(shape):
    bias = RNG.normal(size=shape)
    expected = behind(0.0, np.broadcast_to(bias, (B, N, T, S)), 2)
    found = to_numpy(bias_beside_memory(to_tensor(bias), 2, S))
    np.testing.assert_allclose(
        np.broadcast_to(found, expected.shape), expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("causal", masks.Causal),
        ("causal from an offset", masks.Causal),
        ("padding", masks.Padding),
        ("and", masks.And),
    ],
)
def test_masks_that_kernels_know_stay_what_they_are(name, kind):
    assert type(mask_beside_memory(MASKS[name], 2, S, (B, N, T, S))) is kind


def test_the_tiles_that_a_mask_empties_are_still_skipped():
    rows, columns = cut_in_pieces(4096, 512), cut_in_pieces(4096 + 16, 512)
    window = masks.Causal() & masks.SlidingWindow(512)
    for mask, most in ((masks.Causal(), rows.count + 1), (window, 4)):
        mask = mask_beside_memory(mask, 16, 4096, (1, 1, 4096, 4096))
        live = schedule(mask, rows, columns).live
        assert live.max() <= most
    # Those of a window, and the first, in which the learned keys are.
    assert live.sum() < rows.count * columns.count / 2


def test_a_tile_of_learned_keys_alone_is_full_whatever_hides_the_others():
    mask = mask_beside_memory(MASKS["nothing"], 12, S, (B, N, T, S))
    assert mask.status(Tile(0, T, 0, 12)) == "full"
    assert mask.status(Tile(0, T, 0, 13)) == "mixed"


def test_a_mask_that_errs_is_named_by_its_own_kind():
    class Wrong(masks.Mask):
        def block(self, tile):
            return keras.ops.ones((5, 1, 1, 1), dtype="bool")

    mask = mask_beside_memory(Wrong(), 2, S, (B, N, T, S))
    with pytest.raises(ValueError, match=r"Wrong must give booleans.*\(2, 3, 7, 9\)"):
        mask.block(whole_tile(T, 2 + S))


def test_a_mask_of_another_size_is_told_of_the_sequence_alone():
    mask = mask_beside_memory(MASKS["dense"], 2, S, (B, N, T, S))
    with pytest.raises(ValueError, match=r"\(2, 3, 7, 8\)"):
        mask.check((B, N, T, 10))
