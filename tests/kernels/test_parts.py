"""Masks are taken apart into what can be hashed and their tensors, and put together."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from keras_mha import masks
from keras_mha.kernels.parts import join_tensors, split_tensors
from tests.helpers import to_numpy, to_tensor

T, S = 7, 9


def whole(mask, rows=T, columns=S):
    block = to_numpy(
        keras.ops.convert_to_tensor(mask.block(masks.whole_tile(rows, columns)))
    )
    return np.broadcast_to(block, (1, 1, rows, columns))


class Own(masks.Mask):
    """A user's mask that is no dataclass."""

    def __init__(self, ids, *others):
        self.ids = ids
        self.others = others

    def block(self, tile):
        rows, columns = tile.cut_rows(self.ids, 0), tile.cut_columns(self.ids, 0)
        return rows[:, None] == columns[None, :]


class Sub(masks.Causal):
    """A subclass of a dataclass, with an attribute that is no field."""

    def __init__(self, offset):
        super().__init__(offset)
        object.__setattr__(self, "step", 2)

    def block(self, tile):
        return super().block(tile) & (tile.row_indices % self.step == 0)


@dataclasses.dataclass(frozen=True, eq=False)
class WithHalf(masks.Mask):
    size: int

    def __post_init__(self):
        object.__setattr__(self, "half", self.size // 2)

    def allowed(self, rows, columns):
        return rows - columns < self.half


def every_second(rows, columns):
    return (rows + columns) % 2 == 0


def divided_by(n):
    return lambda rows, columns, offset=n: (rows + columns + offset) % n == 0


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.Causal(3),
        masks.Padding(np.array([[True] * 5 + [False] * 4])) & ~masks.SlidingWindow(2),
        masks.Causal(np.array([2])) | masks.Dense(np.eye(T, S) > 0),
        masks.Where(every_second),
        masks.Where(divided_by(3)),
        Sub(1),
        WithHalf(6),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_mask_is_the_same_once_its_tensors_are_put_back(mask):
    joined = join_tensors(*split_tensors(mask))
    assert type(joined) is type(mask)
    if mask is not None:
        np.testing.assert_array_equal(whole(joined), whole(mask))


def parts(mask):
    return split_tensors(mask)[0]


def test_masks_that_differ_in_their_tensors_only_are_alike_without_them():
    def window(size, *values):
        return parts(masks.SlidingWindow(size) & masks.Padding(np.array([values])))

    assert window(3, True, False) == window(3, False, False)
    assert hash(window(3, True, False)) == hash(window(3, False, False))
    assert window(3, True) != window(4, True)
    assert parts(masks.Causal(1)) != parts(None)
    assert parts(masks.Causal(1)) != parts(masks.Prefix(1))


def test_functions_are_alike_if_their_code_is_and_what_they_hold():
    assert parts(masks.Where(divided_by(3))) == parts(masks.Where(divided_by(3)))
    assert parts(masks.Where(divided_by(3))) != parts(masks.Where(divided_by(4)))
    defaults = [masks.Where(lambda i, j, n=n: i - j < n) for n in (2, 3)]
    assert parts(defaults[0]) != parts(defaults[1])
    assert parts(masks.Where(every_second)) != parts(masks.Where(divided_by(2)))


def test_the_tensors_of_a_mask_of_ones_own_are_found_in_its_attributes():
    own = Own(to_tensor(np.array([0, 0, 1])))
    kept, (ids,) = split_tensors(own & masks.Causal())
    assert ids is own.ids
    other = join_tensors(kept, (to_tensor(np.array([0, 1, 1])),))
    expected = [[True, False, False], [False, True, False], [False, True, True]]
    np.testing.assert_array_equal(whole(other, 3, 3)[0, 0], expected)
    assert own.ids is ids


def test_tensors_are_found_in_containers_functions_and_variables():
    x = to_tensor(np.zeros(2))
    variable = keras.Variable(np.ones(3))
    own = Own(np.zeros(1), [x], {"x": (x, 2)}, lambda i, j: x, variable)
    kept, tensors = split_tensors(own)
    assert [tuple(each.shape) for each in tensors] == [(2,), (2,), (2,), (3,)]
    other = join_tensors(kept, tuple(tensors))
    assert type(other.others[1]["x"]) is tuple
    assert other.others[2](0, 0) is x


def test_an_attribute_that_changes_makes_another_mask():
    own = Own(np.array([0, 1]), [3])
    before = parts(own)
    assert before == parts(own)
    own.ids[0] = 5
    assert before != parts(own)
    own.ids[0] = 0
    own.others[0].append(4)
    assert before != parts(own)


def test_arrays_of_numpy_stay_arrays():
    own = join_tensors(*split_tensors(Own(np.array([0, 1]))))
    assert isinstance(own.ids, np.ndarray)


def test_a_function_that_calls_itself_is_kept_whole():
    def allowed(rows, columns, depth=1):
        return rows < columns if depth == 0 else allowed(rows, columns, depth - 1)

    mask = masks.Where(allowed)
    assert parts(mask) == parts(mask)
    assert join_tensors(*split_tensors(mask)).function is allowed
