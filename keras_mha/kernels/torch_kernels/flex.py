"""PyTorch's flex_attention: one kernel made for each kind of call, on NVIDIA's GPUs.

Masks, soft caps and biases are functions of a pair's indices that are compiled into the
kernel, and blocks that a mask empties are left out. What it has not is put around it:
a sink shrinks the output by what it takes of the softmax,

    output = sigmoid(lse - sink) * softmax(logits) . value

where `lse` is the logarithm of the row's sum of exponentials.

A program is compiled for all calls that differ in numbers and, from the second length
on, in lengths only. Not compiled, it would hold all scores: then it is not taken.

References:
    Dong et al., 2024, Flex Attention: https://arxiv.org/abs/2412.05496
"""

import dataclasses
import functools
import importlib.util
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels import reference
from keras_mha.kernels.backends.torch import (
    is_exporting,
    splits_sequences,
)
from keras_mha.kernels.backends.torch_differentiable import (
    differentiable,
    takes_formula,
)
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.masking import LOWEST
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.kernels.torch_kernels.blocks import block_mask
from keras_mha.kernels.torch_kernels.index_functions import (
    bias_function,
    look_up,
    refusal_of_bias,
    refusal_of_mask,
)

_FEWEST_ROWS = 128  # of fewer, whole scores are few too, and nothing need be compiled
_numbers = itertools.count()
_LEAST_WIDTH = 16  # narrower heads are padded
_MOST_BYTES = 512  # of a head; the kernel may not find room for more


def refusal(call: AttentionCall) -> str | None:
    """Returns why flex_attention cannot run this call, or `None` if it can."""
    if call.dropout > 0:
        return "flex_attention has no dropout"
    if call.return_scores:
        return "flex_attention does not return the scores"
    if is_exporting():
        return "an exported program cannot compile flex_attention's kernel"
    if takes_formula():
        return "flex_attention has no derivatives beyond the gradient"
    if splits_sequences():
        return "flex_attention does not see what other processes hold"
    if any(hasattr(x, "placements") for x in (call.query, call.key, call.value)):
        return "flex_attention knows no tensors that processes share"
    return (
        _refusal_of_shapes(call)
        or refusal_of_mask(call.mask)
        or refusal_of_bias(call.position_bias)
        or _refusal_of_compiler(call.query)
    )


def _refusal_of_shapes(call):
    rows, columns = call.scores_shape[2:]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return "flex_attention is told the blocks of lengths that are known"
    if rows < _FEWEST_ROWS or columns < 1:
        return f"flex_attention's kernel pays from {_FEWEST_ROWS} queries"
    bytes_of_number = {"float16": 2, "bfloat16": 2, "float32": 4}
    dtype = dtype_name(call.query)
    if dtype not in bytes_of_number:
        return f"flex_attention's kernel has no {dtype}"
    most = _MOST_BYTES // bytes_of_number[dtype]
    if max(call.query.shape[3], call.value.shape[3]) > most:
        return f"flex_attention's kernel takes heads of {dtype} up to {most} wide"
    return None


def _refusal_of_compiler(query: Any) -> str | None:
    if not hasattr(flex, "AuxRequest"):
        return "this version of PyTorch has not the flex_attention that is needed"
    # Of a device that is not here only its kind is known: it is taken to have one.
    if torch.cuda.is_available():
        device = getattr(query, "device", None)
        if not _has_compiler(getattr(device, "index", None) or 0):
            return "flex_attention's compiler, Triton, is not there"
    return None


@torch._dynamo.assume_constant_result
def _has_compiler(index: int) -> bool:
    """Whether Triton is there, and makes kernels for this GPU."""
    is_installed = importlib.util.find_spec("triton") is not None
    return is_installed and torch.cuda.get_device_capability(index) >= (7, 0)


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    parts, tensors = _floats(call)

    def formula(*tensors):
        return reference.attend(_with_floats(call, parts, tensors)).output

    return differentiable(formula, _attend(call), *tensors)


def _floats(call):
    """Returns what may have gradients, and what is left of the bias object."""
    position_bias, held = split_tensors(call.position_bias)
    given = (call.query, call.key, call.value, call.bias, call.sink, *held)
    return position_bias, [x for x in given if x is not None]


def _with_floats(call, position_bias, tensors):
    rest = iter(tensors)
    names = ("query", "key", "value", "bias", "sink")
    given = {name: next(rest) for name in names if getattr(call, name) is not None}
    if call.position_bias is not None:
        given["position_bias"] = join_tensors(position_bias, tuple(rest))
    return dataclasses.replace(call, **given)


def _attend(call):
    blocks = None
    if call.mask is not None:
        blocks = block_mask(call.mask, *call.scores_shape[2:], call.query.device)
    query, key, value = (
        _widened(x.transpose(1, 2)) for x in (call.query, call.key, call.value)
    )
    has_sink = call.sink is not None
    is_compiling = torch.compiler.is_compiling()
    run = _run if is_compiling else _program(_kind(call, blocks))
    scale = float(call.scale)
    output, lse = run(query, key, value, _score(call), blocks, scale, has_sink)
    output = output[..., : call.value.shape[3]]
    if has_sink:
        output = _beside_sink(call.sink, output, lse)
    return output.transpose(1, 2)


def _widened(x):
    """Zeros change no product, and what they give of the value is cut off."""
    missing = _LEAST_WIDTH - x.shape[3]
    return functional.pad(x, (0, missing)) if missing > 0 else x


def _score(call):
    """Returns what becomes of a scaled product, as a function of it and its indices."""
    cap, bias, position_bias = call.logit_soft_cap, None, None
    if call.bias is not None:
        bias = look_up(call.bias, "bhqk")
    if call.position_bias is not None:
        lengths = call.scores_shape[2:]
        position_bias = bias_function(call.position_bias, *lengths, call.query.device)
    if cap is None and bias is None and position_bias is None:
        return None

    def score(product, b, h, q, k):
        logit = product.to(torch.float32)
        if cap is not None:
            logit = cap * torch.tanh(logit / cap)
        if position_bias is not None:
            logit = logit + position_bias(b, h, q, k).to(torch.float32)
        if bias is not None:
            added = bias(b, h, q, k).to(torch.float32)
            logit = torch.where(added > LOWEST, logit + added, -torch.inf)
        return logit

    return score


def _run(query, key, value, score, blocks, scale, has_lse):
    found = flex.flex_attention(
        query,
        key,
        value,
        score_mod=score,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=flex.AuxRequest(lse=has_lse),
    )
    return found[0], found[1].lse


@functools.lru_cache(maxsize=256)
def _program(kind):
    """Returns `_run` compiled for one kind of calls, alone: the compiler keeps a few
    programs for each function, and for one that is met with many kinds it gives up."""
    # To the compiler another function, about which it has learned nothing yet.
    code = _run.__code__.replace(co_name=f"attend_{next(_numbers)}")
    return _compiled(types.FunctionType(code, _run.__globals__))


def _compiled(function: Callable) -> Callable:
    # The first length gets a program of its own, the second one for all lengths.
    return torch.compile(function, fullgraph=True)


def _kind(call, blocks):
    """Returns what, where it differs, makes another program; all but numbers and
    lengths."""
    rows, columns = call.scores_shape[2:]
    size = None
    if blocks is not None:
        size = blocks.BLOCK_SIZE[0]
    lengths = size, rows == columns, size and rows <= size, size and columns <= size
    mask, held = split_tensors(call.mask)
    position_bias, others = split_tensors(call.position_bias)
    tensors = (call.query, call.key, call.value, call.bias, *held, *others)
    outlines = tuple(
        (x.dtype, x.requires_grad, tuple(length == 1 for length in x.shape))
        for x in tensors
        if x is not None
    )
    widths = call.query.shape[2:], call.key.shape[2], call.value.shape[3]
    options = call.scale, call.logit_soft_cap, call.sink is None, call.bias is None
    where = call.query.device, torch.is_grad_enabled()
    return mask, position_bias, outlines, widths, options, where, lengths


def _beside_sink(sink, output, lse):
    # Finite: where a row sees nothing, and its output is 0, a sink may be there or not.
    lse = lse.to(torch.float32).clamp(min=LOWEST)
    sink = torch.as_tensor(sink, device=lse.device).to(torch.float32)
    share = torch.sigmoid(lse - sink.reshape(1, -1, 1))
    return (output.to(torch.float32) * share[..., None]).to(output.dtype)
