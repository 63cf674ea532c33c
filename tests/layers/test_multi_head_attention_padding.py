"""Padding may hold anything: what is hidden does not reach what is seen."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

import keras_mha
from keras_mha import masks
from tests.helpers import (
    backend_jit,
    outputs_and_gradients,
    to_numpy,
    to_tensor,
    with_variables,
)

RNG = np.random.default_rng(0)
B, T, D = 2, 7, 8
X = RNG.normal(size=(B, T, D))
Y = RNG.normal(size=(B, T, D))
COTANGENT = RNG.normal(size=(B, T, D))
VALID = np.arange(T) < np.array([[4], [6]])

bad_numbers = pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
implementations = pytest.mark.parametrize(
    "flash_attention", [False, True, None], ids=["reference", "flash", "auto"]
)


def spoilt(x, valid=VALID, bad=np.nan):
    return np.where(valid[..., None], x, bad)


def layer_with(**arguments):
    keras.utils.set_random_seed(0)
    layer = keras_mha.MultiHeadAttention(2, 4, **arguments)
    layer.build((B, T, D))
    return layer


def results(call, layer, arrays, seen, scores=None):
    """Outputs of `call(layer, *tensors)` where `seen`, and all gradients of those."""
    weights = layer.trainable_variables

    def run(*tensors):
        outputs = call(layer, *tensors)
        output, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        hidden = ops.zeros((), dtype=output.dtype)
        output = ops.where(to_tensor(seen[..., None]), output, hidden)
        return (output, *rest)

    values = [to_numpy(weight) for weight in weights]
    cotangents = [COTANGENT, *([None] if scores else [])]
    return outputs_and_gradients(
        with_variables(run, weights), [*arrays, *values], cotangents
    )


def assert_alike(found, expected):
    for one, other in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ self-attention


@bad_numbers
@implementations
def test_a_masked_query_and_its_keys(flash_attention, bad):
    layer = layer_with(flash_attention=flash_attention)

    def call(layer, x):
        return layer(x, query_mask=to_tensor(VALID))

    expected = results(call, layer, [X], VALID)
    found = results(call, layer, [spoilt(X, bad=bad)], VALID)
    assert_alike(found, expected)
    np.testing.assert_array_equal(found[1][0][~VALID], 0)


@pytest.mark.parametrize("name", ["value_mask", "attention_mask"])
def test_a_hidden_key_that_is_a_query_all_the_same(name):
    layer = layer_with()
    mask = to_tensor(VALID)
    mask = masks.Padding(mask) if name == "attention_mask" else mask

    def call(layer, x):
        return layer(x, **{name: mask})

    expected = results(call, layer, [X], VALID)
    assert_alike(results(call, layer, [spoilt(X)], VALID), expected)
    output = to_numpy(call(layer, to_tensor(spoilt(X))))
    assert np.isnan(output[~VALID]).all()
    output = to_numpy(call(layer, to_tensor(X)))
    assert np.isfinite(output).all()


@pytest.mark.parametrize("name", ["value_mask", "query_mask"])
def test_a_token_that_all_may_see_is_not_hidden(name):
    x = X.copy()
    x[0, 1] = np.nan
    output = to_numpy(layer_with()(to_tensor(x), **{name: to_tensor(VALID)}))
    np.testing.assert_array_equal(np.isnan(output[0, VALID[0]]), True)
    assert np.isfinite(output[1]).all()


def test_a_mask_that_keras_found():
    layer = layer_with()
    inputs = keras.Input((T, D))
    model = keras.Model(inputs, layer(keras.layers.Masking(9.0)(inputs)))
    x = np.where(VALID[..., None], X, 9.0).astype("float32")
    expected = to_numpy(model(x))
    mask = to_tensor(VALID)
    found = to_numpy(layer(to_tensor(spoilt(X)), query_mask=mask))
    np.testing.assert_allclose(found[VALID], expected[VALID], atol=1e-5)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_types(dtype):
    layer = layer_with(dtype=dtype)
    mask = to_tensor(VALID)
    found, expected = (
        to_numpy(layer(to_tensor(x), query_mask=mask)) for x in (spoilt(X), X)
    )
    np.testing.assert_array_equal(found, expected)


def test_compiled():
    layer = layer_with()
    mask = to_tensor(VALID)
    run = backend_jit(lambda x: layer(x, query_mask=mask))
    found, expected = (to_numpy(run(to_tensor(x))) for x in (spoilt(X), X))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_finite_padding_gives_the_numbers_it_gave():
    """Activity regularizers see the projections of all tokens."""
    keras.utils.set_random_seed(0)
    reference = keras.layers.MultiHeadAttention(2, 4, activity_regularizer="l2")
    x, mask = to_tensor(X), to_tensor(VALID)
    reference(x, x, query_mask=mask, value_mask=mask)
    layer = layer_with(activity_regularizer="l2")
    layer.set_weights(reference.get_weights())
    for each in (reference, layer):
        each(x, x, value_mask=mask)
    if not reference.losses:
        pytest.skip("this version of Keras leaves the activity_regularizer out")
    np.testing.assert_allclose(
        sum(map(float, layer.losses)), sum(map(float, reference.losses)), rtol=1e-5
    )
    layer(to_tensor(spoilt(X)), query_mask=mask)
    assert all(np.isfinite(float(loss)) for loss in layer.losses)


# ------------------------------------------------------------------ cross-attention


@implementations
@pytest.mark.parametrize("name", ["value_mask", "key_mask", "attention_mask"])
def test_masked_keys(flash_attention, name):
    layer = layer_with(flash_attention=flash_attention, num_key_value_heads=1)
    mask = to_tensor(VALID)
    if name == "attention_mask":
        mask = masks.Padding(mask) & masks.Causal()

    def call(layer, x, y):
        return layer(x, y, **{name: mask})

    everywhere = np.ones_like(VALID)
    expected = results(call, layer, [X, Y], everywhere)
    assert_alike(results(call, layer, [X, spoilt(Y)], everywhere), expected)


def test_key_and_value_that_differ_and_the_scores():
    layer = layer_with()

    def call(layer, x, y, z):
        mask = to_tensor(VALID)
        return layer(x, y, z, value_mask=mask, return_attention_scores=True)

    everywhere = np.ones_like(VALID)
    expected = results(call, layer, [X, Y, X], everywhere, scores=True)
    found = results(call, layer, [X, spoilt(Y), spoilt(X)], everywhere, scores=True)
    assert_alike(found, expected)


def test_masks_of_several_axes():
    keras.utils.set_random_seed(0)
    layer = keras_mha.MultiHeadAttention(2, 4, attention_axes=2)
    x = RNG.normal(size=(B, 3, T, D))
    valid = np.broadcast_to(VALID[:, None], (B, 3, T)).copy()
    valid[1, 2] = False
    by_row = valid.any(axis=2)
    found, expected = (
        to_numpy(
            layer(
                to_tensor(each),
                value_mask=to_tensor(valid),
                key_mask=to_tensor(by_row),
                query_mask=to_tensor(valid),
            )
        )
        for each in (spoilt(x, valid), x)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_padding_as_an_object_over_one_of_several_axes():
    keras.utils.set_random_seed(0)
    layer = keras_mha.MultiHeadAttention(2, 4, attention_axes=1)
    x = RNG.normal(size=(B, T, 3, D))
    valid = np.broadcast_to(VALID[:, None], (B, 3, T))
    mask = masks.Padding(to_tensor(valid.reshape(B * 3, T)))
    seen = valid.transpose(0, 2, 1)
    found, expected = (
        to_numpy(
            layer(to_tensor(X[:, :, None] + x * 0), to_tensor(y), attention_mask=mask)
        )
        for y in (spoilt(x, seen), x)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_memory_of_segments_has_its_own_length():
    layer = layer_with()
    cache = layer.init_cache(memory=to_tensor(Y))
    ids = np.zeros((B, 3), "int32"), np.where(VALID, 0, 1).astype("int32")
    mask = masks.Segments(*map(to_tensor, ids))
    output, _ = layer(to_tensor(X[:, :3]), cache=cache, attention_mask=mask)
    expected = layer(
        to_tensor(X[:, :3]), to_tensor(Y), segment_ids=tuple(map(to_tensor, ids))
    )
    np.testing.assert_allclose(to_numpy(output), to_numpy(expected), atol=1e-6)


def test_a_memory():
    layer = layer_with()
    mask = to_tensor(VALID)
    found, expected = (
        to_numpy(
            layer(
                to_tensor(X),
                cache=layer.init_cache(memory=to_tensor(y), value_mask=mask),
            )[0]
        )
        for y in (spoilt(Y), Y)
    )
    np.testing.assert_array_equal(found, expected)


def test_new_tokens_of_a_cache():
    layer = layer_with()

    def outputs(x):
        cache = layer.init_cache(B, 2 * T)
        mask = to_tensor(VALID)
        first, cache = layer(
            to_tensor(x), cache=cache, query_mask=mask, use_causal_mask=True
        )
        next_token, cache = layer(to_tensor(Y[:, :1]), cache=cache)
        return [to_numpy(first), to_numpy(next_token), to_numpy(cache["key"])]

    found, expected = outputs(spoilt(X)), outputs(X)
    assert all(np.isfinite(each).all() for each in found)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


# ------------------------------------------------------------------ segments


IDS = np.array([[0, 0, 0, 5, 5, -1, -1], [7, 7, 2, 2, 2, 2, -1]])
REAL = IDS >= 0


@bad_numbers
@implementations
def test_tokens_of_no_segment(flash_attention, bad):
    layer = layer_with(flash_attention=flash_attention)

    def call(layer, x):
        return layer(x, segment_ids=to_tensor(IDS), use_causal_mask=True)

    expected = results(call, layer, [X], REAL)
    found = results(call, layer, [spoilt(X, REAL, bad)], REAL)
    assert_alike(found, expected)


def test_keys_of_a_segment_that_no_query_has():
    layer = layer_with()
    key_ids = np.where(VALID, 0, 3)

    def call(layer, x, y):
        ids = to_tensor(np.zeros((B, T), "int32")), to_tensor(key_ids)
        return layer(x, y, segment_ids=ids)

    everywhere = np.ones_like(VALID)
    expected = results(call, layer, [X, Y], everywhere)
    assert_alike(results(call, layer, [X, spoilt(Y)], everywhere), expected)


def test_a_number_that_a_token_may_see_is_not_hidden():
    layer = layer_with()
    x = X.copy()
    x[0, 4, 0] = np.nan  # in the segment 5 of the first row
    output, scores = layer(
        to_tensor(x), segment_ids=to_tensor(IDS), return_attention_scores=True
    )
    spoilt_rows = np.zeros((B, T), bool)
    spoilt_rows[0, 3:5] = True
    np.testing.assert_array_equal(np.isnan(to_numpy(output)).all(-1), spoilt_rows)
    np.testing.assert_array_equal(np.isnan(to_numpy(output)).any(-1), spoilt_rows)
    rows = np.isnan(to_numpy(scores)).all(axis=(1, 3))
    np.testing.assert_array_equal(rows, spoilt_rows)


def test_segments_over_one_of_several_axes():
    keras.utils.set_random_seed(0)
    layer = keras_mha.MultiHeadAttention(2, 4, attention_axes=2)
    ids = np.broadcast_to(IDS[:, None], (B, 3, T))
    x = RNG.normal(size=(B, 3, T, D))
    found, expected = (
        to_numpy(layer(to_tensor(each), segment_ids=to_tensor(ids)))
        for each in (spoilt(x, ids >= 0), x)
    )
    np.testing.assert_allclose(found[ids >= 0], expected[ids >= 0], atol=1e-6)
