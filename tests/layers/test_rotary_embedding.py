"""`keras_mha.RotaryEmbedding` by itself, against the float64 definition."""

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
from tests.helpers import (
    backend_jit,
    call_at_once,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

# Of a half type the rounding of the result is left: half a unit in the last place.
TOLERANCE = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 2.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}

# What does not depend on the length, and so has exact frequencies.
FIXED_SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": LINEAR,
    "linear, less than 1": {"rope_type": "linear", "factor": 0.3},
    "yarn": YARN,
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, other ramp": YARN | {"beta_fast": 8, "beta_slow": 2},
    "yarn, attention_factor": YARN | {"attention_factor": 0.75},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, equal mscales": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, factor of one": YARN | {"factor": 1.0},
    "llama3": LLAMA3,
    "llama3, wider": LLAMA3 | {"high_freq_factor": 32.0, "factor": 2.5},
}
SCALINGS = FIXED_SCALINGS | {
    "dynamic": DYNAMIC,
    "dynamic, steeper": DYNAMIC | {"factor": 4.5},
}
FAR = ["none", "linear", "yarn", "llama3"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def unit_pairs(tokens: int, width: int, interleaved: bool = False) -> np.ndarray:
    """Heads whose every pair is (1, 0), which rotary makes (cos, sin) of its angle."""
    x = np.zeros((1, tokens, 1, width))
    x[..., slice(0, None, 2) if interleaved else slice(0, width // 2)] = 1.0
    return x


def rotated(layer: Any, x: np.ndarray, positions: Any = None) -> np.ndarray:
    """What the layer makes of arrays, the positions being a tensor."""
    arrays = [to_tensor(x, layer.compute_dtype)]
    if positions is not None:
        arrays.append(to_tensor(np.asarray(positions), "int32"))
    return to_numpy(call_at_once(lambda *tensors: layer(*tensors), arrays))


def assert_close(found, expected, dtype: str = "float32") -> None:
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------- by definition


@given(
    scaling=st.sampled_from(list(SCALINGS)),
    rotary_dim=st.sampled_from([None, 4, 6]),
    interleaved=st.booleans(),
    max_wavelength=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    positions=st.sampled_from([None, "t", "bt"]),
    furthest=st.sampled_from([10, 200, 1_000_000]),
    seed=st.integers(0, 2**16),
)
def test_any_rotation(
    scaling, rotary_dim, interleaved, max_wavelength, positions, furthest, seed
):
    """Output and gradient, which is turned the other way."""
    rng = np.random.default_rng(seed)
    config = {
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
        "max_wavelength": max_wavelength,
        "scaling": SCALINGS[scaling],
    }
    if scaling not in FIXED_SCALINGS:
        furthest = min(furthest, 200)
    x, cotangent = (rounded(rng.normal(size=(2, 5, 3, 8)), "float32") for _ in "xc")
    sizes = {None: None, "t": (5,), "bt": (2, 5)}[positions]
    ids = None if sizes is None else rng.integers(0, furthest + 1, size=sizes)

    layer = keras_mha.RotaryEmbedding(**config)
    (found,), (gradient,) = outputs_and_gradients(
        lambda x: layer(x, None if ids is None else to_tensor(ids, "int32")),
        [x],
        [cotangent],
    )
    assert_close(found, oracle.rotary(x, ids, **config))
    ids = np.arange(5) if ids is None else ids
    lengths = np.broadcast_to(ids, (2, 5)).max(axis=1) + 1
    expected = oracle.rotary(cotangent, -ids, lengths=lengths, **config)
    assert_close(gradient, expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_scaling(scaling):
    # 40 positions are beyond the length from which "dynamic" counts.
    options = {"scaling": SCALINGS[scaling]}
    x = draw(1, 40, 2, 16)
    found = rotated(keras_mha.RotaryEmbedding(**options), x)
    assert_close(found, oracle.rotary(x, **options))


def test_dynamic_scaling_goes_by_each_rows_own_length():
    x = draw(3, 4, 2, 8)
    ids = np.array([[0, 1, 2, 3], [12, 13, 14, 15], [0, 50, 3, 2]])
    found = rotated(keras_mha.RotaryEmbedding(scaling=DYNAMIC), x, ids)
    assert_close(found, oracle.rotary(x, ids, scaling=DYNAMIC))
    # Two of the rows are within the original length, where nothing is scaled.
    assert_close(found[:2], oracle.rotary(x[:2], ids[:2]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_after_rotary_dim_are_as_they_were(interleaved):
    x = rounded(draw(2, 5, 3, 8), "float32")
    layer = keras_mha.RotaryEmbedding(4, interleaved, scaling=YARN)
    found = rotated(layer, x)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    assert (found[:, 1:, :, :4] != x[:, 1:, :, :4]).all()


def test_position_zero_is_not_turned():
    x = rounded(draw(2, 3, 2, 8), "float32")
    found = rotated(keras_mha.RotaryEmbedding(), x, [0, 3, 0])
    np.testing.assert_array_equal(found[:, [0, 2]], x[:, [0, 2]])


def test_pairings_differ_by_the_order_of_the_features_alone():
    x = draw(2, 5, 3, 8)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    halves = rotated(keras_mha.RotaryEmbedding(), x)
    neighbours = rotated(keras_mha.RotaryEmbedding(interleaved=True), x[..., order])
    assert_close(neighbours, halves[..., order])


@pytest.mark.parametrize("scaling", ["none", "yarn", "dynamic"])
def test_positions_count_from_zero_unless_given(scaling):
    x = draw(2, 20, 1, 8)
    layer = keras_mha.RotaryEmbedding(scaling=SCALINGS[scaling])
    counted = rotated(layer, x)
    assert_close(rotated(layer, x, np.arange(20)), counted)
    assert_close(rotated(layer, x, np.tile(np.arange(20), (2, 1))), counted)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("scaling", ["none", "dynamic"])
def test_positions_may_be_a_numpy_array(scaling, dtype):
    x, ids = draw(2, 3, 2, 8), np.array([[5, 1, 20], [0, 1, 2]], dtype)
    layer = keras_mha.RotaryEmbedding(scaling=SCALINGS[scaling])
    found = to_numpy(layer(to_tensor(x), ids))
    assert_close(found, oracle.rotary(x, ids, scaling=SCALINGS[scaling]))


# ------------------------------------------------------------------ relative positions


@given(
    scaling=st.sampled_from(["none", "linear", "yarn", "llama3", "dynamic"]),
    interleaved=st.booleans(),
    places=st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)),
    shift=st.integers(0, 10_000),
)
def test_products_know_the_difference_of_positions_alone(
    scaling, interleaved, places, shift
):
    if scaling == "dynamic":
        places, shift = (places[0] % 100, places[1] % 100), shift % 100
    # In one row, so that all four have the same length behind them.
    ids = [places[0], places[1], places[0] + shift, places[1] + shift]
    x = draw(1, 2, 1, 8)[:, [0, 1, 0, 1]]
    layer = keras_mha.RotaryEmbedding(
        interleaved=interleaved, scaling=SCALINGS[scaling]
    )
    query, key, query_later, key_later = rotated(layer, x, ids)[0, :, 0]
    np.testing.assert_allclose(query @ key, query_later @ key_later, atol=5e-5)


@pytest.mark.parametrize("scaling", FAR)
def test_lengths_of_vectors_are_kept(scaling):
    x = draw(1, 4, 2, 8)
    scaling = SCALINGS[scaling]
    found = rotated(keras_mha.RotaryEmbedding(scaling=scaling), x, [0, 7, 1000, 10**6])
    _, factor = oracle.rotary_frequencies(8, scaling=scaling)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=-1),
        factor * np.linalg.norm(x, axis=-1),
        rtol=1e-5,
    )


# ------------------------------------------------------------------------ far positions

FAR_IDS = np.array([0, 1, 999, 65_537, 123_456, 500_000, 999_999, 1_000_000])


@pytest.mark.parametrize("max_wavelength", [10_000.0, 500_000.0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", FAR)
def test_angles_are_exact_at_position_one_million(scaling, interleaved, max_wavelength):
    # A product of float32 numbers would be off by up to 0.03 there.
    config = {
        "interleaved": interleaved,
        "max_wavelength": max_wavelength,
        "scaling": SCALINGS[scaling],
    }
    x = unit_pairs(len(FAR_IDS), 64, interleaved)
    found = rotated(keras_mha.RotaryEmbedding(**config), x, FAR_IDS)
    expected = oracle.rotary(x, FAR_IDS, **config)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", FAR)
def test_angles_are_exact_when_compiled(scaling):
    # A compiler that reorders sums would undo what keeps the angles exact.
    layer = keras_mha.RotaryEmbedding(scaling=SCALINGS[scaling])
    x = unit_pairs(len(FAR_IDS), 32)
    compiled = backend_jit(lambda x, ids: layer(x, ids), xla=True)
    found = to_numpy(compiled(to_tensor(x), to_tensor(FAR_IDS, "int32")))
    expected = oracle.rotary(x, FAR_IDS, scaling=SCALINGS[scaling])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scaling", FAR)
def test_angles_are_exact_in_half_types(scaling, dtype):
    scaling = SCALINGS[scaling]
    x = rounded(draw(1, len(FAR_IDS), 2, 32), dtype)
    layer = keras_mha.RotaryEmbedding(scaling=scaling, dtype=dtype)
    found = rotated(layer, x, FAR_IDS)
    assert_close(found, oracle.rotary(x, FAR_IDS, scaling=scaling), dtype)


@pytest.mark.parametrize("trained", [4096, 2**21])
def test_dynamic_scaling_is_exact_where_the_length_is_known(trained):
    scaling = {**DYNAMIC, "original_max_position_embeddings": trained}
    layer = keras_mha.RotaryEmbedding(scaling=scaling)
    x = np.concatenate([unit_pairs(len(FAR_IDS), 64, False)] * 2)
    ids = np.stack([FAR_IDS, FAR_IDS // 1000])  # rows of different lengths
    found = to_numpy(layer(to_tensor(x), to_tensor(ids, "int32")))
    expected = oracle.rotary(x, ids, scaling=scaling)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_dynamic_scaling_is_exact_within_the_trained_length_when_compiled():
    scaling = {**DYNAMIC, "original_max_position_embeddings": 2**21}
    layer = keras_mha.RotaryEmbedding(scaling=scaling)
    x = unit_pairs(len(FAR_IDS), 32)
    compiled = backend_jit(lambda x, ids: layer(x, ids), xla=True)
    found = to_numpy(compiled(to_tensor(x), to_tensor(FAR_IDS, "int32")))
    expected = oracle.rotary(x, FAR_IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dynamic_scaling_in_half_types(dtype):
    x = rounded(draw(1, 40, 2, 8), dtype)
    layer = keras_mha.RotaryEmbedding(scaling=DYNAMIC, dtype=dtype)
    assert_close(rotated(layer, x), oracle.rotary(x, scaling=DYNAMIC), dtype)


# ------------------------------------------------------------------------- as a layer


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("mixed_bfloat16", "bfloat16"),
    ],
)
def test_output_has_the_shape_of_the_input_and_the_dtype_of_the_layer(policy, dtype):
    layer = keras_mha.RotaryEmbedding(4, dtype=policy)
    found = layer(to_tensor(draw(2, 5, 3, 8), dtype))
    assert tuple(found.shape) == (2, 5, 3, 8)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    assert layer.weights == []


FULL = {
    "rotary_dim": 4,
    "interleaved": True,
    "max_wavelength": 500.0,
    "scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    "name": "turned",
    "dtype": "mixed_bfloat16",
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_config_comes_back(scaling):
    layer = keras_mha.RotaryEmbedding(**FULL | {"scaling": scaling})
    config = json.loads(json.dumps(layer.get_config()))
    assert set(FULL) <= set(config)
    revived = keras_mha.RotaryEmbedding.from_config(config)
    assert json.loads(json.dumps(revived.get_config())) == config
    assert revived.dtype_policy.name == "mixed_bfloat16"


def test_functional_model_of_any_length_is_saved(tmp_path):
    heads = keras.Input((None, 2, 8))
    ids = keras.Input((None,), dtype="int32")
    layer = keras_mha.RotaryEmbedding(4, scaling=DYNAMIC)
    turned = layer(heads, ids)
    assert turned.shape == (None, None, 2, 8)
    model = keras.Model([heads, ids], [turned, layer(heads)])
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    options = {"rotary_dim": 4, "scaling": DYNAMIC}
    for which, tokens in [(model, 20), (revived, 20), (revived, 3)]:
        x = draw(2, tokens, 2, 8)
        places = np.random.default_rng(0).integers(0, 50, size=(2, tokens))
        placed, counted = call_at_once(
            lambda *inputs, which=which: which(list(inputs)),
            [to_tensor(x), to_tensor(places, "int32")],
        )
        assert_close(to_numpy(placed), oracle.rotary(x, places, **options))
        assert_close(to_numpy(counted), oracle.rotary(x, **options))
