"""`keras_mha.MixedRotaryEmbedding` by itself, against the definition."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from tests import oracle
from tests.helpers import outputs_and_gradients, to_numpy, to_tensor, with_variables
from tests.layers.test_rotary_embedding import assert_close, draw, rotated


def made(width: int = 8, num_heads: int = 2, **options: Any) -> Any:
    """A layer with frequencies of random numbers."""
    layer = keras_mha.MixedRotaryEmbedding(num_heads, **options)
    layer.build((None, None, num_heads, width))
    layer.frequencies.assign(draw(*layer.frequencies.shape).astype("float32"))
    return layer


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, True),
        ({"interleaved": True}, False),
        ({"axes": 3, "rotary_dim": 6}, True),
    ],
)
def test_by_definition(options, rows):
    """Output, and the gradients of the heads and of the frequencies."""
    layer = made(**options)
    x = draw(2, 5, 4, 8)
    shape = (5, layer.axes)
    ids = np.random.default_rng(0).integers(0, 20, (2, *shape) if rows else shape)
    interleaved = options.get("interleaved", False)
    frequencies, cotangent = to_numpy(layer.frequencies.value), draw(*x.shape, seed=1)

    (found,), gradients = outputs_and_gradients(
        with_variables(
            lambda x: layer(x, to_tensor(ids, "int32")), [layer.frequencies]
        ),
        [x, frequencies],
        [cotangent],
    )

    def definition(x, frequencies):
        return oracle.mixed_rotary(x, ids, frequencies, interleaved=interleaved)

    assert_close(found, definition(x, frequencies))
    # Turned back, what the gradient of a rotation is.
    assert_close(gradients[0], definition(cotangent, -frequencies))
    step = 1e-5 * draw(*frequencies.shape, seed=2)
    change = definition(x, frequencies + step) - definition(x, frequencies - step)
    np.testing.assert_allclose(
        (gradients[1] * step).sum(), (change * cotangent).sum() / 2, rtol=1e-3
    )


def test_axial_frequencies_are_the_axial_embedding():
    x, ids = draw(2, 5, 2, 8), oracle.grid(5, 2)[:5]
    axial, _ = oracle.rotary_frequencies(4, 10.0)
    layer = made()
    frequencies = np.zeros((2, 2, 4))
    frequencies[0, :, :2] = frequencies[1, :, 2:] = axial
    layer.frequencies.assign(frequencies.astype("float32"))
    expected = oracle.axial_rotary(x, ids, max_wavelength=10.0)
    assert_close(rotated(layer, x, ids), expected)


def test_frequencies_begin_as_axial_ones_in_turned_directions():
    """As published: at right angles, of the axial lengths, of each head its own."""
    layer = keras_mha.MixedRotaryEmbedding()
    layer(to_tensor(draw(1, 3, 4, 8)), to_tensor(np.zeros((3, 2)), "int32"))
    frequencies = to_numpy(layer.frequencies.value)
    assert frequencies.shape == (2, 4, 4)
    axial, _ = oracle.rotary_frequencies(4, 10.0)
    lengths = np.sqrt((frequencies**2).sum(axis=0))
    np.testing.assert_allclose(lengths, np.tile(axial, (4, 2)), rtol=1e-5)
    first, second = frequencies[..., :2], frequencies[..., 2:]
    np.testing.assert_allclose((first * second).sum(axis=0), 0, atol=1e-6)
    directions = frequencies[:, :, 0] / lengths[:, 0]
    assert len(np.unique(np.round(directions, 4), axis=1).T) == 4


def test_config_and_weights_come_back(tmp_path):
    x = keras.Input((2, 3, 6))
    layer = keras_mha.MultiHeadAttention(
        4,
        8,
        num_key_value_heads=2,
        position=keras_mha.MixedRotaryEmbedding(max_wavelength=100.0, rotary_dim=4),
    )
    model = keras.Model(x, layer(x))
    config = json.loads(json.dumps(layer.position.get_config()))
    assert (config["num_heads"], config["rotary_dim"]) == (2, 4)
    revived = keras_mha.MixedRotaryEmbedding.from_config(config)
    assert json.loads(json.dumps(revived.get_config())) == config
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    images = to_tensor(draw(2, 2, 3, 6))
    assert_close(to_numpy(loaded(images)), to_numpy(model(images)))


def test_training_moves_the_frequencies():
    position = keras_mha.MixedRotaryEmbedding()
    x = keras.Input((2, 2, 6))
    model = keras.Model(x, keras_mha.MultiHeadAttention(2, 4, position=position)(x))
    before = to_numpy(position.frequencies.value)
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    model.fit(draw(4, 2, 2, 6), draw(4, 2, 2, 6, seed=1), verbose=0)
    assert (to_numpy(position.frequencies.value) != before).all()
