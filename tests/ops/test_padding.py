"""What masks hide may be NaN, in the function as in the layer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mha
from keras_mha import masks
from keras_mha.ops import padding
from tests.helpers import outputs_and_gradients, to_numpy, to_tensor

RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(2, 5, 4, 8))
KEY, VALUE = RNG.normal(size=(2, 2, 7, 2, 8))
COTANGENT = RNG.normal(size=(2, 5, 4, 8))
VALID = np.arange(7) < np.array([[4], [6]])


def attend(mask, implementation):
    return lambda *tensors: keras_mha.dot_product_attention(
        *tensors, mask=mask, implementation=implementation
    )


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["padding", "segments"])
def test_hidden_keys_do_not_matter(implementation, bad, kind):
    mask = masks.Padding(to_tensor(VALID)) & masks.SlidingWindow(6)
    if kind == "segments":
        ids = to_tensor(np.zeros((2, 5), "int32")), to_tensor(np.where(VALID, 0, 9))
        mask = masks.SlidingWindow(6) & masks.Segments(*ids)
    function = attend(mask, implementation)
    shown = VALID[..., None, None]
    arrays = [QUERY, *(np.where(shown, x, bad) for x in (KEY, VALUE))]
    expected = outputs_and_gradients(function, [QUERY, KEY, VALUE], [COTANGENT])
    found = outputs_and_gradients(function, arrays, [COTANGENT])
    for one, other in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_padding_that_another_mask_opens_is_not_hidden():
    key = KEY.copy()
    key[0, 4] = np.nan  # padding, which the last query sees all the same
    mask = masks.Padding(to_tensor(VALID)) | masks.Causal()
    tensors = map(to_tensor, (QUERY, key, VALUE))
    function = attend(mask, "reference")
    output = to_numpy(function(*tensors))
    assert np.isnan(output[0, 4]).any()
    assert np.isfinite(output[1]).all()


@given(st.data())
def test_spoilt_queries_are_those_with_a_bad_key_in_their_segment(data):
    def ids(length):
        numbers = st.lists(st.integers(-2, 3), min_size=length, max_size=length)
        return np.array(data.draw(numbers), "int32")

    def booleans(length):
        numbers = st.lists(st.booleans(), min_size=length, max_size=length)
        return np.array(data.draw(numbers))

    query_ids, key_ids = ids(4), ids(6)
    good_query, good_key = booleans(4), booleans(6)
    same = query_ids[:, None] == key_ids
    expected = ~good_query | (same & ~good_key).any(axis=1)
    segments = masks.Segments(to_tensor(query_ids[None]), to_tensor(key_ids[None]))
    found = padding.spoilt_queries(
        to_tensor(good_query[None]), to_tensor(good_key[None]), [segments]
    )
    np.testing.assert_array_equal(to_numpy(found)[0], expected)
