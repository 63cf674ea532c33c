"""Sinks on torch's CPU kernel, which has none: a rescaling by the rows' sums."""

from __future__ import annotations

import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from tests import oracle
from tests.helpers import only_torch, outputs_and_gradients, to_numpy, to_tensor

pytestmark = only_torch

B, T, S, N, K, H, V = 2, 23, 31, 4, 2, 8, 5
RNG = np.random.default_rng(0)
SHAPES = ((B, T, N, H), (B, S, K, H), (B, S, K, V), (N,))
i, j = np.arange(T)[:, None], np.arange(S)
MASKS = {"all": (None, True), "causal": (masks.Causal(), j <= i)}


def attend(mask, implementation="fused", **options):
    def function(query, key, value, sink):
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            sink=sink,
            implementation=implementation,
            **options,
        )

    return function


@pytest.mark.parametrize("mask, allowed", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_gradients_are_those_of_the_definition(mask, allowed, dtype):
    arrays = [RNG.normal(size=shape) for shape in SHAPES]
    arrays[3] *= 3
    cotangent = RNG.normal(size=(B, T, N, V))
    found = outputs_and_gradients(attend(mask), arrays, [cotangent], dtype)
    allowed = np.broadcast_to(allowed, (B, N, T, S))
    options = {"mask": allowed, "sink": arrays[3]}
    output, _ = oracle.dot_product_attention(*arrays[:3], **options)
    expected = oracle.dot_product_attention_gradients(
        *arrays[:3], output_cotangent=cotangent, **options
    )
    tolerance = {"float32": 2e-5, "bfloat16": 0.15}[dtype]
    np.testing.assert_allclose(found[0][0], output, atol=tolerance)
    names = "dquery", "dkey", "dvalue", "dsink"
    for name, gradient in zip(names, found[1], strict=True):
        np.testing.assert_allclose(
            gradient, expected[name], atol=2 * tolerance, rtol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("sink", [0.0, np.float32(-100.0), 100.0])
def test_a_sink_may_be_a_number_and_out_of_reach(sink):
    query, key, value = (to_tensor(RNG.normal(size=shape)) for shape in SHAPES[:3])
    options = {"mask": masks.Causal(), "sink": sink}
    fused, tiles = (
        keras_mha.dot_product_attention(
            query, key, value, implementation=name, **options
        )
        for name in ("fused", "reference")
    )
    np.testing.assert_allclose(to_numpy(fused), to_numpy(tiles), atol=1e-6)


def test_a_gradient_can_be_differentiated_again():
    import torch

    arrays = [to_tensor(RNG.normal(size=shape)).requires_grad_() for shape in SHAPES]
    results = []
    for implementation in ("fused", "reference"):
        output = attend(masks.Causal(), implementation)(*arrays)
        first = torch.autograd.grad(output.square().sum(), arrays, create_graph=True)
        total = sum(x.square().sum() for x in first)
        results.append(torch.autograd.grad(total, arrays))
    for found, expected in zip(*results, strict=True):
        scale = float(expected.abs().max())
        np.testing.assert_allclose(
            to_numpy(found), to_numpy(expected), atol=1e-4 * scale
        )


def test_what_the_kernel_has_no_sums_for_goes_elsewhere():
    x = np.zeros((1, 2048, 2, 8), "float32")
    for mask, taken in (
        (None, "fused"),
        (masks.Causal(), "fused"),
        (masks.Causal() & masks.SlidingWindow(9), "blockwise"),
        (masks.Causal(1), "blockwise"),
    ):
        plan = keras_mha.plan_attention(x, x, x, mask=mask, sink=0.0)
        assert plan.implementation == taken
    with pytest.raises(ValueError, match="the fused kernel has no sink"):
        keras_mha.plan_attention(
            x, x, x, mask=masks.Causal(1), sink=0.0, implementation="fused"
        )
