"""Calls with nothing in them: no queries, no keys, no samples."""

from __future__ import annotations

import numpy as np
import pytest

import keras_mha
from tests.helpers import only_tensorflow, to_numpy, to_tensor

LAYERS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "flash": {"num_key_value_heads": 1, "flash_attention": True},
    "rotary": {"position": keras_mha.RotaryEmbedding},
    "alibi": {"position": keras_mha.ALiBi},
    "relative": {"position": keras_mha.RelativePositionBias},
}


def layer_of(kind):
    arguments = dict(LAYERS[kind])
    if "position" in arguments:
        arguments["position"] = arguments["position"]()
    layer = keras_mha.MultiHeadAttention(4, 4, bias_initializer="ones", **arguments)
    layer.build((None, None, 8))
    return layer


def zeros(*shape):
    return to_tensor(np.zeros(shape, "float32"))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_queries(kind):
    layer = layer_of(kind)
    assert tuple(layer(zeros(2, 0, 8), zeros(2, 5, 8)).shape) == (2, 0, 8)
    assert tuple(layer(zeros(2, 0, 8)).shape) == (2, 0, 8)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_keys_leave_the_output_bias(kind):
    output = to_numpy(layer_of(kind)(zeros(2, 3, 8), zeros(2, 0, 8)))
    np.testing.assert_array_equal(output, np.ones((2, 3, 8)))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_samples(kind):
    assert tuple(layer_of(kind)(zeros(0, 3, 8), use_causal_mask=True).shape) == (
        0,
        3,
        8,
    )


@only_tensorflow
@pytest.mark.parametrize("kind", ["plain", "grouped", "relative"])
def test_no_samples_of_any_length(kind, monkeypatch):
    """Where lengths are not known, tiles are in the program."""
    import tensorflow as tf

    from keras_mha.kernels import backends, tiling

    monkeypatch.setattr(backends.current(), "FEW_SCORES", 64)
    monkeypatch.setattr(tiling, "TILE", 16)
    layer = layer_of(kind)

    @tf.function(input_signature=[tf.TensorSpec((None, None, 8))])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, use_causal_mask=True) ** 2)
        return tape.gradient(loss, layer.query_dense.kernel.value)

    assert np.isfinite(to_numpy(step(zeros(2, 33, 8)))).all()
    np.testing.assert_array_equal(to_numpy(step(zeros(0, 33, 8))), 0)
