"""`keras_mha.RotaryEmbedding` over several axes, by itself, against the definition."""

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
from tests.layers.test_rotary_embedding import (
    FIXED_SCALINGS,
    SCALINGS,
    assert_close,
    draw,
    rotated,
)

# How 12 features that rotate are shared: evenly over 2 and 3 axes, or by sections.
SHARES: dict[str, dict[str, Any]] = {
    "2 axes": {"axes": 2},
    "3 axes": {"axes": 3},
    "2 sections": {"sections": (4, 2)},
    "3 sections": {"axes": 3, "sections": (1, 2, 3)},
}


def by_definition(x: np.ndarray, ids: np.ndarray, axes: int | None = None, **options):
    """The definition, which sees from the coordinates how many axes there are."""
    return oracle.axial_rotary(x, ids, **options)


def axes_of(share: dict[str, Any]) -> int:
    return share.get("axes") or len(share["sections"])


@given(
    share=st.sampled_from(list(SHARES)),
    shared_frequencies=st.booleans(),
    scaling=st.sampled_from(list(SCALINGS)),
    rotary_dim=st.sampled_from([None, 12]),
    interleaved=st.booleans(),
    rows=st.booleans(),
    furthest=st.sampled_from([10, 200, 1_000_000]),
    seed=st.integers(0, 2**16),
)
def test_any_rotation(
    share, shared_frequencies, scaling, rotary_dim, interleaved, rows, furthest, seed
):
    """Output and gradient, which is turned the other way."""
    rng = np.random.default_rng(seed)
    config = {
        **SHARES[share],
        "shared_frequencies": shared_frequencies,
        "scaling": SCALINGS[scaling],
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
    }
    if scaling not in FIXED_SCALINGS:
        furthest = min(furthest, 200)
    width = 12 if rotary_dim is None else 14
    x, cotangent = (rounded(rng.normal(size=(2, 5, 3, width)), "float32") for _ in "xc")
    axes = axes_of(SHARES[share])
    ids = rng.integers(0, furthest + 1, size=(2, 5, axes) if rows else (5, axes))

    layer = keras_mha.RotaryEmbedding(**config)
    (found,), (gradient,) = outputs_and_gradients(
        lambda x: layer(x, to_tensor(ids, "int32")), [x], [cotangent]
    )
    assert_close(found, by_definition(x, ids, **config))
    lengths = np.broadcast_to(ids, (2, 5, axes)).max(axis=(1, 2)) + 1
    assert_close(gradient, by_definition(cotangent, -ids, lengths=lengths, **config))


def test_each_axis_is_a_rotation_by_itself_of_its_own_features():
    """The published axial form: a one-dimensional embedding for each half."""
    x, ids = draw(2, 5, 3, 8), np.random.default_rng(0).integers(0, 30, (2, 5, 2))
    layer = keras_mha.RotaryEmbedding(axes=2, interleaved=True)
    one_axis = keras_mha.RotaryEmbedding(interleaved=True)
    halves = [
        rotated(one_axis, x[..., 4 * axis : 4 * axis + 4], ids[..., axis])
        for axis in range(2)
    ]
    assert_close(rotated(layer, x, ids), np.concatenate(halves, axis=-1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_equal_coordinates_and_shared_frequencies_are_the_rotation_of_one_axis(
    interleaved,
):
    """As in M-RoPE, where a text's tokens have the same number on every axis."""
    x, ids = draw(2, 5, 3, 12), np.random.default_rng(0).integers(0, 30, (2, 5))
    options = {"interleaved": interleaved}
    layer = keras_mha.RotaryEmbedding(
        sections=(1, 2, 3), shared_frequencies=True, **options
    )
    found = rotated(layer, x, np.repeat(ids[..., None], 3, axis=-1))
    assert_close(found, rotated(keras_mha.RotaryEmbedding(**options), x, ids))


def test_products_know_the_differences_of_coordinates_alone():
    rng = np.random.default_rng(0)
    places, shift = rng.integers(0, 10_000, size=(2, 3)), rng.integers(0, 10_000, 3)
    x = draw(1, 2, 1, 12)[:, [0, 1, 0, 1]]
    layer = keras_mha.RotaryEmbedding(axes=3)
    ids = np.concatenate([places, places + shift])
    query, key, query_later, key_later = rotated(layer, x, ids)[0, :, 0]
    np.testing.assert_allclose(query @ key, query_later @ key_later, atol=5e-5)


def test_angles_are_exact_far_away_when_compiled():
    ids = np.array([[0, 1_000_000], [999_999, 3], [123_456, 500_000]])
    layer, x = keras_mha.RotaryEmbedding(axes=2), np.ones((1, 3, 1, 32))
    compiled = backend_jit(lambda x, ids: layer(x, ids), xla=True)
    found = to_numpy(compiled(to_tensor(x), to_tensor(ids, "int32")))
    np.testing.assert_allclose(found, oracle.axial_rotary(x, ids), rtol=0, atol=2e-5)


# -------------------------------------------------------------------------- as a layer


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_config_comes_back(share):
    layer = keras_mha.RotaryEmbedding(**share, shared_frequencies=True)
    config = json.loads(json.dumps(layer.get_config()))
    revived = keras_mha.RotaryEmbedding.from_config(config)
    assert json.loads(json.dumps(revived.get_config())) == config
    assert (revived.axes, revived.sections) == (axes_of(share), share.get("sections"))
    assert revived.shared_frequencies is True


def test_config_of_one_axis_is_that_of_before_there_were_several():
    names = set(keras_mha.RotaryEmbedding().get_config())
    assert not names & {"axes", "sections", "shared_frequencies"}


def test_functional_model_of_any_length_is_saved(tmp_path):
    heads, ids = keras.Input((None, 2, 8)), keras.Input((None, 2), dtype="int32")
    turned = keras_mha.RotaryEmbedding(axes=2)(heads, ids)
    assert turned.shape == (None, None, 2, 8)
    model = keras.Model([heads, ids], turned)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    for tokens in (6, 3):
        x = draw(2, tokens, 2, 8)
        places = np.random.default_rng(0).integers(0, 50, size=(2, tokens, 2))
        found = call_at_once(
            lambda *inputs: revived(list(inputs)),
            [to_tensor(x), to_tensor(places, "int32")],
        )
        assert_close(to_numpy(found), oracle.axial_rotary(x, places))
