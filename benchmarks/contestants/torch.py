"""Contestants under PyTorch: both Keras layers, torch's layer and torch's function."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import FEATURES, HEADS, RATE, Case
from benchmarks.contestants import Contestant, common

COMPILERS = {"eager": "", "compiled": "inductor"}  # of the grid's programs


def makers(case: Case) -> dict:
    """Returns a maker for each contestant of the case."""
    if case.kind == "function":
        return {
            "keras_mha": lambda case: _function(common.our_function, case),
            "torch sdpa": lambda case: _function(_sdpa, case),
        }
    found = common.layers(case, _layer)
    if case.kind != "grouped" and common.has_whole_scores(case):
        found["torch.nn"] = _torch_nn
    return found


def _sdpa(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2)


def _contestant(call, parameters):
    """Makes a contestant of `call(training)` and the tensors that get gradients."""

    def forward():
        with torch.no_grad():
            _done(call(False))

    def training():
        for parameter in parameters:
            parameter.grad = None
        call(True).sum().backward()
        _done(parameters[0].grad)

    return forward, training


def _done(tensor):
    """Waits for what a GPU still computes."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _tensor(array, dtype=None):
    """Puts numbers where Keras has its own, of the case's type if it is said."""
    dtype = dtype and getattr(torch, dtype)
    return torch.tensor(array, dtype=dtype, device=keras.ops.zeros(()).device)


def _function(function, case):
    return of_function(function, [common.heads(case)] * 3, dtype=case.dtype)


def of_function(
    function: Callable, arrays: list[np.ndarray], dtype: str = "float32"
) -> Contestant:
    """Makes a contestant of an attention function of query, key and value, which are
    cast to `dtype`."""
    tensors = [_tensor(array, dtype).requires_grad_() for array in arrays]
    return _contestant(lambda training: function(*tensors), tensors)


def _layer(layer, call, case):
    return of_layer(layer, call, [common.inputs(case)], case.compiler, case.dtype)


def of_layer(
    layer: keras.Layer,
    call: Callable[..., Any],
    arrays: list[np.ndarray],
    compiler: str = "",
    dtype: str = "float32",
) -> Contestant:
    """Makes a contestant of a layer.

    Args:
        layer: Built layer.
        call: How it is called: `call(*tensors, training=...)`.
        arrays: The inputs.
        compiler: `"inductor"` for `torch.compile`, else none.
        dtype: String, what the inputs are cast to.
    """
    tensors = [_tensor(array, dtype).requires_grad_() for array in arrays]
    if compiler == "inductor":
        call = torch.compile(call, dynamic=False)
    return _contestant(
        lambda training: call(*tensors, training=training),
        [*tensors, *layer.parameters()],
    )


def _torch_nn(case):
    layer = torch.nn.MultiheadAttention(
        FEATURES,
        HEADS,
        dropout=RATE if case.kind == "dropout" else 0.0,
        batch_first=True,
        device=keras.ops.zeros(()).device,
        dtype=getattr(torch, case.dtype),
    )
    x = _tensor(common.inputs(case), case.dtype).requires_grad_()
    options = {"attn_mask": ~_tensor(common.allowed(case)), "need_weights": False}
    options["is_causal"] = case.kind in ("causal", "dropout")
    if case.kind == "biased":
        bias = _tensor(common.bias(case), case.dtype)
        options["attn_mask"] = bias.masked_fill(options["attn_mask"], -torch.inf)

    def call(training):
        layer.train(training)
        return layer(x, x, x, **options)[0]

    return _contestant(call, [x, *layer.parameters()])


def decoding(layer, call, tokens, cache, program):
    """Makes a contestant of a step; see `decoding.py`."""

    def step():
        with torch.no_grad():
            return call(tokens[0], cache)

    return step
