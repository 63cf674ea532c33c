"""Attention on TPUs by splash attention, which JAX brings.

It goes through blocks of the scores as our tiles do, with a running softmax in float32,
and skips those that a mask of positions empties. Half operands stay half in its
products of queries and keys. The rows' sums are kept, from which its backward kernels
bring the weights back.

References:
    Dao et al., 2022, FlashAttention: https://arxiv.org/abs/2205.14135
    The kernel, in `jax/experimental/pallas/ops/tpu/splash_attention`:
        https://github.com/jax-ml/jax
"""

import math
from typing import Any

import jax.numpy as jnp

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import (
    splash_blocks,
    splash_kernel,
    splash_masks,
    splash_sharding,
)
from keras_mha.kernels.jax_kernels.layout import gradient_of_sink
from keras_mha.kernels.jax_kernels.splash_kernel import Plan, Tensors
from keras_mha.kernels.masking import LOWEST
from keras_mha.kernels.parts import join_tensors
from keras_mha.kernels.problem import MIXES_HEADS, Problem, undivided

_TYPES = ("float32", "bfloat16")
_MOST_WIDTH = 256  # of wider heads a block overflows the memory of a TPU's core
_MOST_BLOCKS = 2**17  # whose numbers lie in a TPU's small memory for scalars
_NO_LOGIT = 0.99 * LOWEST  # a row's sum is less where all that it has is masked

NAME = "splash attention"


def refusal(call: AttentionCall) -> str | None:
    """Returns why splash attention cannot run this call, or `None` if it can."""
    if not splash_kernel.is_as_known():
        return "this version of jax has another splash attention"
    if call.mixes_heads:
        return MIXES_HEADS
    return (
        _refusal_of_options(call)
        or undivided(call)
        or _refusal_of_shapes(call)
        or splash_sharding.refusal(call.query.shape[0], call.key.shape[2])
        or splash_masks.refusal(call.mask)
    )


def _refusal_of_options(call):
    if call.return_lse:
        return "splash attention does not return the rows' sums"
    if call.dropout > 0:
        return "splash attention has no dropout"
    if call.has_bias:
        return "splash attention takes no bias"
    if dtype_name(call.query) not in _TYPES:
        return f"splash attention takes {' and '.join(_TYPES)} only"
    return None


def _refusal_of_shapes(call):
    shapes = (*call.query.shape, *call.key.shape, *call.value.shape)
    if not all(isinstance(length, int) for length in shapes):
        return "splash attention needs lengths that are numbers"
    rows, columns = call.scores_shape[2:]
    least = splash_blocks.LANES
    if min(rows, columns) < least:
        return f"splash attention pays from {least} queries and {least} keys"
    width = max(call.query.shape[3], call.value.shape[3])
    if width > _MOST_WIDTH:
        return f"splash attention takes heads of at most {_MOST_WIDTH} features"
    cut = splash_blocks.blocks(rows, columns, width)
    if math.ceil(rows / cut.rows) * math.ceil(columns / cut.columns) > _MOST_BLOCKS:
        return "splash attention takes no sequences of so many blocks"
    return None


def forward(problem: Problem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends; arguments and results are those of `blockwise.forward`."""
    plan, given = _prepared(problem, tensors)
    output, lse = splash_kernel.forward(plan, given)
    seen = lse > _NO_LOGIT  # a row of unvisited blocks has -inf, and NaN for an output
    output = jnp.where(seen[..., None], output, jnp.zeros_like(output))
    lse = jnp.where(seen, lse, math.inf)
    width = tensors["value"].shape[2]
    output = _columns_first(output[..., : plan.rows, :width], tensors)
    return output, _columns_first(lse[..., : plan.rows, None], tensors)


def backward(
    problem: Problem,
    tensors: dict[str, Any],
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
) -> dict[str, Tensor]:
    """Returns gradients; arguments and results are those of `blockwise.backward`."""
    plan, given = _prepared(problem, tensors)
    found = {}
    if "sink" in problem.differentiable:
        sink = tensors["sink"]
        found["sink"] = gradient_of_sink(sink, output, lse, d_output).astype(sink.dtype)
    output, lse, d_output = map(_rows_first, (output, lse, d_output))
    lse = lse[..., 0]
    # What the softmax takes from every logit's gradient, one number a row.
    share = (output.astype("float32") * d_output.astype("float32")).sum(-1)
    missing = given.query.shape[2] - plan.rows
    rows = (0, 0), (0, 0), (0, missing)
    kept = (
        jnp.pad(lse, rows, constant_values=math.inf),  # rows that see nothing
        _padded(d_output, missing, given.value.shape[3]),
        jnp.pad(share, rows),
    )
    without_sink = given._replace(sink=None)
    if "query" in problem.differentiable:
        d_query = splash_kernel.backward_query(plan, without_sink, *kept)
        d_query = d_query[:, :, : plan.rows, : tensors["query"].shape[2]]
        d_query = _columns_first(d_query, tensors).astype("float32") * problem.scale
        found["query"] = d_query.astype(tensors["query"].dtype)
    if {"key", "value"} & set(problem.differentiable):
        both = splash_kernel.backward_key_value(plan, without_sink, *kept)
        for name, gradient in zip(("key", "value"), both, strict=True):
            gradient = gradient[:, :, : plan.columns, : tensors[name].shape[2]]
            found[name] = jnp.swapaxes(gradient, 2, 3)
    return {name: found[name] for name in problem.differentiable}


def _prepared(problem: Problem, tensors: dict[str, Any]) -> tuple[Plan, Tensors]:
    """Returns a call as the kernels want it."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    batch, _, width, _, rows = query.shape
    columns = key.shape[3]
    cut = splash_blocks.blocks(rows, columns, max(width, value.shape[2]))
    missing_rows, missing_columns = -rows % cut.rows, -columns % cut.columns
    mask = splash_masks.split(join_tensors(problem.mask, tensors["mask"]))
    function = splash_masks.positions(mask, columns if missing_columns else None)
    plan = Plan(function, rows, columns, cut, problem.logit_soft_cap)
    # The kernel has no place for a scale. Times one that is a power of two the query
    # stays what it is; times another, a half query is rounded once more.
    query = (_rows_first(query).astype("float32") * problem.scale).astype(query.dtype)
    key, value = (jnp.swapaxes(x, 2, 3) for x in (key, value))
    ids = splash_masks.segment_ids(mask, batch, rows, columns)
    if ids is not None:
        ids = tuple(
            jnp.pad(x, ((0, 0), (0, missing)))
            for x, missing in zip(ids, (missing_rows, missing_columns), strict=True)
        )
    sink = tensors.get("sink")
    return plan, Tensors(
        _padded(query, missing_rows, splash_blocks.padded_width(width)),
        _padded(key, missing_columns, splash_blocks.padded_width(width)),
        _padded(value, missing_columns, splash_blocks.padded_width(value.shape[3])),
        ids,
        None if sink is None else sink.reshape(-1).astype("float32"),
    )


def _rows_first(x: Tensor) -> Tensor:
    """Turns `(B, K, width, G, T)` into `(B, N, T, width)`."""
    batch, groups, width, shared, rows = x.shape
    return x.transpose(0, 1, 3, 4, 2).reshape(batch, groups * shared, rows, width)


def _columns_first(x: Tensor, tensors: dict[str, Any]) -> Tensor:
    """The way back."""
    batch, _, rows, width = x.shape
    _, groups, _, shared, _ = tensors["query"].shape
    x = x.reshape(batch, groups, shared, rows, width)
    return x.transpose(0, 1, 4, 2, 3)


def _padded(x: Tensor, missing: int, width: int) -> Tensor:
    """Appends rows of zeros, and features of zeros up to a width."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, width - x.shape[3])))
