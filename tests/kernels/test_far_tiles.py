"""Tiles that ALiBi puts so low that they are left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mha
from keras_mha import masks
from keras_mha.biases import Positions, Slopes
from keras_mha.kernels import backends, tiling
from tests import oracle
from tests.helpers import (
    backend_jit,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

STEEP = 3.0, 2.0, 1.0, 0.01
STEEPER = 9.0, 8.0, 7.0, 6.0
B, N, K, H = 2, 4, 2, 8
LENGTHS = {"as many keys": (90, 90), "more keys": (60, 120), "fewer": (90, 60)}


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "TILE", 16)
        patch.setattr(tiling, "_MULTIPLE", 4)
        patch.setattr(backends.current(), "FEW_SCORES", 0)
        yield


def drawn(lengths, size=1.0, seed=0):
    """Query, key and value."""
    rows, columns = lengths
    rng = np.random.default_rng(seed)
    shapes = (B, rows, N, H), (B, columns, K, H), (B, columns, K, H)
    query, key, value = (rng.normal(size=shape) for shape in shapes)
    return [size * query, size * key, value]


def distances(lengths):
    return np.arange(lengths[1]) - np.arange(lengths[0])[:, None]


def attention(slopes=STEEP, **given):
    def function(*tensors):
        return keras_mha.dot_product_attention(
            *tensors,
            **{name: make() for name, make in given.items()},
            position_bias=Slopes(slopes),
            implementation="blockwise",
        )

    return function


def causal(lengths):
    return distances(lengths) <= 0


def padded(lengths):
    return (
        np.arange(lengths[1])[None, None, None]
        >= np.array([5, 20])[:, None, None, None]
    )


def valid(lengths):
    return to_tensor(padded(lengths)[:, 0, 0])


# What a call is given, for lengths, and the mask's booleans for the definition.
GIVEN = {
    "plain": (lambda lengths: {}, None),
    "causal": (lambda lengths: {"mask": masks.Causal}, causal),
    "window": (
        lambda lengths: {"mask": lambda: masks.SlidingWindow(40)},
        lambda lengths: abs(distances(lengths)) < 40,
    ),
    "padding": (
        lambda lengths: {"mask": lambda: masks.Padding(valid(lengths))},
        padded,
    ),
    "near keys hidden": (
        lambda lengths: {"mask": lambda: ~masks.SlidingWindow(40)},
        lambda lengths: abs(distances(lengths)) >= 40,
    ),
    "soft cap": (lambda lengths: {"logit_soft_cap": lambda: 0.5}, None),
    "sink": (lambda lengths: {"sink": lambda: to_tensor(np.full(N, 3.0))}, None),
}


def check(case, lengths, compile=lambda function: function, dtype="float32"):
    given, booleans = case
    given = given(lengths)
    arrays = [rounded(x, dtype) for x in drawn(lengths)]
    cotangent = rounded(np.random.default_rng(1).normal(size=arrays[0].shape), dtype)
    (output,), gradients = outputs_and_gradients(
        compile(attention(**given)), arrays, [cotangent], dtype
    )
    everything = {
        "mask": None if booleans is None else booleans(lengths),
        "bias": -np.array(STEEP)[:, None, None] * abs(distances(lengths)),
        "sink": 3.0 if "sink" in given else None,
        "logit_soft_cap": 0.5 if "logit_soft_cap" in given else None,
    }
    expected, _ = oracle.dot_product_attention(*arrays, **everything)
    expected_gradients = oracle.dot_product_attention_gradients(
        *arrays, **everything, output_cotangent=cotangent
    )
    tolerance = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance)
    for name, found in zip(("query", "key", "value"), gradients, strict=True):
        np.testing.assert_allclose(
            *(found, expected_gradients[f"d{name}"]),
            rtol=tolerance,
            atol=tolerance * max(1, np.abs(found).max()),
            err_msg=name,
        )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("case", GIVEN.values(), ids=GIVEN.keys())
def test_numbers_are_those_of_the_definition(case, lengths):
    check(case, lengths)


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_numbers_are_those_of_the_definition_compiled(case):
    check(GIVEN[case], LENGTHS["as many keys"], backend_jit)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "causal"])
def test_numbers_of_a_half_type(case, dtype):
    check(GIVEN[case], LENGTHS["as many keys"], dtype=dtype)


# Of 204 the last rows are of two tiles.
@pytest.mark.parametrize("length", [200, 204])
@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["plain", "causal"])
def test_far_tiles_are_not_looked_at(mask, length):
    lengths = length, length
    arrays = drawn(lengths)
    arrays[2][:, :20] = np.nan
    cotangent = np.ones(arrays[0].shape)
    cotangent[:, :150] = 0
    function = attention((2.0, 1.0, 2.0, 1.0), mask=lambda: mask)
    (output,), (d_query, *_) = outputs_and_gradients(function, arrays, [cotangent])
    for found in (output, d_query):
        assert np.isfinite(found[:, 150:]).all()
        assert np.isnan(found[:, :20]).all()


def left_out(query, key, compute):
    """Which pairs are left out, by tiles of 16 keys, (B, N, T, S)."""
    tile_of_key = np.arange(key.shape[1]) // 16
    value = np.zeros((*key.shape[:3], tile_of_key[-1] + 1))
    # A feature for each tile, which is no number if the tile is looked at.
    value[:, np.arange(key.shape[1]), :, tile_of_key] = np.nan
    output = to_numpy(compute(*map(to_tensor, (query, key, value))))
    return ~np.isnan(output).swapaxes(1, 2)[..., tile_of_key]


@pytest.fixture(scope="module", params=[None, masks.Causal()], ids=["plain", "causal"])
def compute(request):
    mask = request.param
    return mask, attention(STEEPER, mask=lambda: mask)


@given(size=st.sampled_from([0.0, 0.1, 1.0, 3.0, 30.0]), seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_what_is_left_out_weighs_nothing(compute, size, seed):
    mask, function = compute
    lengths = 96, 96
    query, key, _ = drawn(lengths, size, seed)
    # The two that are largest point the same way: no product can be larger.
    rng = np.random.default_rng(seed)
    query[:, rng.integers(96), ::2] *= 3
    key[:, rng.integers(96)] = 2 * query[:, rng.integers(96), ::2]
    _, weights = oracle.dot_product_attention(
        *(query, key, key),
        mask=None if mask is None else causal(lengths),
        bias=-np.array(STEEPER)[:, None, None] * abs(distances(lengths)),
    )
    largest = weights.max(axis=-1, keepdims=True)
    out = left_out(query, key, function)
    assert (weights < 1.01e-30 * largest)[out].all()
    if size <= 0.1:
        assert out.mean() > 0.5


@pytest.mark.parametrize("size", [1e3, 1e30, np.nan, np.inf])
def test_where_numbers_are_large_or_none_nothing_is_left_out(size):
    query, key, value = drawn((90, 90))
    key[:, :3] *= size
    value[:, :3] = np.nan
    output = to_numpy(attention(STEEPER)(*map(to_tensor, (query, key, value))))
    assert np.isnan(output).all()


@pytest.mark.parametrize("size", [np.nan, np.inf])
def test_nor_is_it_with_a_soft_cap(size):
    query, key, value = drawn((90, 90))
    key[:, :3] *= size
    function = attention(STEEPER, logit_soft_cap=lambda: 5.0)
    output = to_numpy(function(*map(to_tensor, (query, key, value))))
    if np.isnan(size):
        assert np.isnan(output).all()
    value[:, :3] = np.nan
    output = to_numpy(function(*map(to_tensor, (query, key, value))))
    assert np.isnan(output).all()


class Rising(Slopes):
    """A bias of a user's own, whose numbers are others."""

    def block(self, tile):
        return -super().block(tile)


@pytest.mark.parametrize(
    "bias",
    [
        Rising(STEEPER),
        Slopes((-10.0,) * N),
        Slopes(STEEPER, Positions(*2 * [to_tensor(np.zeros((1, 90)), "int32")])),
    ],
    ids=["of another kind", "a slope that rises", "positions of their own"],
)
def test_of_another_bias_nothing_is_left_out(bias):
    query, key, value = drawn((90, 90))
    value[:, :3] = np.nan
    output = keras_mha.dot_product_attention(
        *map(to_tensor, (query, key, value)),
        position_bias=bias,
        implementation="blockwise",
    )
    assert np.isnan(to_numpy(output)).all()
