"""Folding several attention axes into one, and back."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mha.layers.axes import AttentionAxes
from tests.helpers import to_numpy, to_tensor


@st.composite
def layouts(draw):
    """Sizes of batch and positions, and some of the positions to attend over."""
    rank = draw(st.integers(3, 5))
    sizes = tuple(draw(st.integers(1, 4)) for _ in range(rank - 1))
    axes = draw(st.permutations(range(1, rank - 1)))
    return sizes, tuple(axes[: draw(st.integers(1, rank - 2))])


@given(layouts())
def test_unfolding_undoes_folding(layout):
    sizes, attended = layout
    axes = AttentionAxes(len(sizes) + 1, attended)
    x = np.random.default_rng(0).normal(size=(*sizes, 2, 3)).astype("float32")
    folded = axes.fold(to_tensor(x))
    length = int(np.prod([sizes[axis] for axis in attended]))
    assert tuple(folded.shape)[1:] == (length, 2, 3)
    np.testing.assert_array_equal(to_numpy(axes.unfold(folded, to_tensor(x))), x)


@given(layouts())
def test_positions_fold_as_their_heads_do(layout):
    sizes, attended = layout
    axes = AttentionAxes(len(sizes) + 1, attended)
    positions = np.arange(np.prod(sizes)).reshape(sizes).astype("float32")
    heads = np.broadcast_to(positions[..., None, None], (*sizes, 2, 3))
    folded = to_numpy(axes.fold(to_tensor(heads)))[:, :, 0, 0]
    np.testing.assert_array_equal(
        to_numpy(axes.fold_positions(to_tensor(positions))), folded
    )


@given(layouts(), st.data())
def test_what_broadcasts_to_the_scores_still_does_when_folded(layout, data):
    """Folding first and broadcasting later gives what broadcasting first gives."""
    sizes, attended = layout
    axes = AttentionAxes(len(sizes) + 1, attended)
    query, key = to_tensor(np.zeros((*sizes, 1))), to_tensor(np.zeros((*sizes, 1)))
    full = axes.scores_shape((*sizes, 1), (*sizes, 1), 2)
    shape = tuple(data.draw(st.sampled_from((1, size))) for size in full)
    shape = shape[data.draw(st.integers(0, len(shape) - 1)) :]
    values = np.arange(np.prod(shape)).reshape(shape).astype("float32")

    folded = to_numpy(axes.fold_scores(to_tensor(values), query, key))
    batch = int(np.prod([sizes[axis] for axis in axes.batch]))
    length = int(np.prod([sizes[axis] for axis in attended]))
    np.testing.assert_array_equal(
        np.broadcast_to(folded, (batch, 2, length, length)),
        np.broadcast_to(values, full).reshape(batch, 2, length, length),
    )


@pytest.mark.parametrize(
    ("rank", "axes", "mask", "expanded"),
    [
        (3, None, (5, 7), (1, 1, 5, 7)),
        (3, None, (2, 5, 7), (2, 1, 5, 7)),
        (3, None, (2, 4, 5, 7), (2, 4, 5, 7)),
        (4, (2,), (2, 3, 5, 7), (2, 3, 1, 5, 7)),
        (4, (2,), (2, 5, 7), (2, 1, 1, 5, 7)),
        (4, (1, 2), (2, 3, 5, 3, 5), (2, 1, 3, 5, 3, 5)),
    ],
)
def test_a_mask_leaves_out_the_heads_first_and_then_the_batch(
    rank, axes, mask, expanded
):
    assert AttentionAxes(rank, axes).expand_mask(mask) == expanded


def test_negative_axes_count_from_the_end():
    assert AttentionAxes(5, (-2, -3)).attended == (3, 2)


def test_all_positions_are_attended_by_default():
    for rank in (3, 4, 5):
        assert AttentionAxes(rank).attended == tuple(range(1, rank - 1))


def test_the_order_of_the_axes_is_the_order_of_the_folded_length():
    x = np.arange(6).reshape(1, 2, 3, 1, 1).astype("float32")
    for order in itertools.permutations((1, 2)):
        folded = to_numpy(AttentionAxes(4, order).fold(to_tensor(x)))[0, :, 0, 0]
        image = x[0, :, :, 0, 0]
        expected = image if order == (1, 2) else image.T
        np.testing.assert_array_equal(folded, expected.ravel())
