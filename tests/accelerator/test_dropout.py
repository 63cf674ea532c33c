"""Dropout on the device: by the seed, at its rate, the same for output and gradient."""

from __future__ import annotations

import numpy as np
import pytest

import keras_mha
from tests import oracle
from tests.accelerator.device import IS_FORCED, needs_accelerator
from tests.helpers import outputs_and_gradients, rounded, to_numpy, to_tensor

pytestmark = needs_accelerator

# As many keys as a value is wide: of an identity matrix the output is the weights.
B, T, N, RATE = (2, 64, 2, 0.3) if IS_FORCED else (8, 128, 8, 0.3)


def attention(seed):
    def function(query, key, value):
        return keras_mha.dot_product_attention(
            query, key, value, dropout=RATE, seed=seed
        )

    return function


def kept(seed, dtype):
    """Booleans `(B, N, T, T)`: the weights that are not dropped."""
    zeros = to_tensor(np.zeros((B, T, N, T)), dtype)
    identity = np.broadcast_to(np.eye(T)[None, :, None], (B, T, N, T))
    weights = attention(seed)(zeros, zeros, to_tensor(identity, dtype))
    return to_numpy(weights).transpose(0, 2, 1, 3) != 0


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


def test_equal_seeds_repeat_and_others_do_not(dtype):
    first = kept(3, dtype)
    np.testing.assert_array_equal(kept(3, dtype), first)
    same = (kept(4, dtype) == first).mean()
    assert abs(same - (RATE**2 + (1 - RATE) ** 2)) < 0.02


def test_the_rate_is_kept(dtype):
    # Kernels may round the rate to a 256th.
    assert abs(kept(3, dtype).mean() - (1 - RATE)) < 0.015


def test_output_and_gradient_belong_to_the_same_weights(dtype):
    multiplier = kept(3, dtype) / (1 - RATE)
    rng = np.random.default_rng(1)
    *arrays, cotangent = (rounded(rng.normal(size=(B, T, N, T)), dtype) for _ in "qkvo")
    (output,), found = outputs_and_gradients(attention(3), arrays, [cotangent], dtype)
    options = {"dropout_multiplier": multiplier}
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    gradients = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=cotangent, **options
    )
    pairs = {"output": (output, expected)}
    for name, gradient in zip(("dquery", "dkey", "dvalue"), found, strict=True):
        pairs[name] = gradient, gradients[name]
    for name, (ours, exact) in pairs.items():
        error = np.abs(ours - exact).max() / np.abs(exact).max()
        assert error < (0.01 if dtype == "float32" else 0.03), f"{name}: {error:.1e}"
