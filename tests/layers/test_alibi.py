"""`keras_mha.ALiBi` by itself, against the float64 definition."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mha
from tests import oracle
from tests.helpers import call_at_once, to_numpy, to_tensor


def bias_of(layer: Any, *positions: Any) -> np.ndarray:
    tensors = [to_tensor(np.asarray(ids), "int32") for ids in positions]
    return to_numpy(call_at_once(lambda *ids: layer(*ids), tensors))


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (
            12,
            [2**-n for n in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
        ),
    ],
)
def test_slopes_of_the_paper(heads, expected):
    slopes = keras_mha.ALiBi(heads).slopes
    assert isinstance(slopes, np.ndarray)
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


@pytest.mark.parametrize("heads", range(1, 34))
def test_slopes_of_any_number_of_heads(heads):
    slopes = keras_mha.ALiBi(num_heads=heads).slopes
    assert slopes.shape == (heads,)
    np.testing.assert_allclose(slopes, oracle.alibi_slopes(heads), rtol=1e-6)


def test_bias_by_hand():
    distance = np.array([[0, 1, 4], [1, 0, 3], [4, 3, 0]])
    found = bias_of(keras_mha.ALiBi(2), [0, 1, 4])
    np.testing.assert_array_equal(found, [-distance / 16, -distance / 256])


@given(
    heads=st.sampled_from([1, 3, 8]),
    query_rows=st.booleans(),
    key_rows=st.sampled_from([None, False, True]),
    furthest=st.sampled_from([10, 5000, 2_000_000]),
    seed=st.integers(0, 2**16),
)
def test_any_positions(heads, query_rows, key_rows, furthest, seed):
    rng = np.random.default_rng(seed)
    sides = [rng.integers(0, furthest, size=(2, 3) if query_rows else (3,))]
    if key_rows is not None:
        sides.append(rng.integers(0, furthest, size=(2, 4) if key_rows else (4,)))
    found = bias_of(keras_mha.ALiBi(heads), *sides)
    expected = oracle.alibi_bias(oracle.alibi_slopes(heads), sides[0], sides[-1])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bias_is_of_floats_and_nothing_is_learned():
    layer = keras_mha.ALiBi(4)
    found = layer(to_tensor(np.arange(3), "int32"))
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert layer.weights == []


def test_config_comes_back():
    layer = keras_mha.ALiBi(num_heads=6, name="slopes")
    config = json.loads(json.dumps(layer.get_config()))
    assert (config["num_heads"], config["name"]) == (6, "slopes")
    revived = keras_mha.ALiBi.from_config(config)
    assert json.loads(json.dumps(revived.get_config())) == config
    np.testing.assert_array_equal(revived.slopes, layer.slopes)


def test_config_of_a_layer_without_a_number_of_heads_comes_back():
    config = json.loads(json.dumps(keras_mha.ALiBi().get_config()))
    assert config["num_heads"] is None
    assert keras_mha.ALiBi.from_config(config).num_heads is None


def test_functional_model_of_any_length_is_saved(tmp_path):
    queries = keras.Input((None,), dtype="int32")
    keys = keras.Input((None,), dtype="int32")
    bias = keras_mha.ALiBi(3)(queries, keys)
    assert bias.shape == (None, 3, None, None)
    model = keras.Model([queries, keys], bias)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    sides = np.array([[3, 1, 4], [1, 5, 9]]), np.array([[2, 6], [5, 3]])
    expected = oracle.alibi_bias(oracle.alibi_slopes(3), *sides)
    inputs = [to_tensor(ids, "int32") for ids in sides]
    for found in (model(inputs), revived(inputs)):
        np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-6)
