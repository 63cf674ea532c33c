"""Packed segments on NVIDIA's GPUs, by an attention kernel that JAX has in Pallas.

cuDNN's kernel would take segments as numbers for all T x S scores, since how many there
are is not known when a program is written. This one compares ids, in memory linear in
the length. It has one array of ids for both sides: where those of queries and keys turn
out to differ, tiles run. Keys that a mask hides get a feature more; see `layout`.

References:
    Tillet et al., 2019, Triton: https://dl.acm.org/doi/10.1145/3315508.3329973
    Dao, 2023, FlashAttention-2: https://arxiv.org/abs/2307.08691
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels import blockwise
from keras_mha.kernels.backends import jax_manual_axes as manual_axes
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import cudnn_machine
from keras_mha.kernels.jax_kernels.layout import (
    finished,
    for_gradient,
    gradient_of_sink,
    hiding_exponent,
    keys_first,
    multiple,
    padded,
    positions_first,
    with_hiding_feature,
    zero_unless,
)
from keras_mha.kernels.jax_kernels.mask_parts import (
    MaskParts,
    both,
    named,
    parted,
    seeing_queries,
    visible_keys,
)
from keras_mha.kernels.jax_kernels.sharing import as_one_call
from keras_mha.kernels.parts import join_tensors
from keras_mha.kernels.problem import MIXES_HEADS, Problem, undivided

_WIDEST = 128

# Lengths are padded to a multiple of the longest blocks.
_BLOCK = 128

# The kernel has logarithms to the base 2.
_LOG_2 = 0.6931471805599453

# Whether the kernel is interpreted, where there is no GPU to compile it for.
_INTERPRET = False

_BACKWARD = (
    *("sm_scale", "causal", "block_sizes", "backward_pass_impl", "num_warps"),
    *("num_stages", "grid", "interpret", "debug", "return_residuals", "res", "do"),
)

NAME = "Pallas (Triton)"


def refusal(call: AttentionCall) -> str | None:
    """Returns why this kernel cannot run this call, or `None` if it can."""
    return (
        _refusal_of_options(call)
        or _refusal_of_tensors(call)
        or _refusal_of_mask(call)
        or cudnn_machine.refusal_of_capability()
        or _refusal_of_version()
    )


def _refusal_of_options(call):
    if call.mixes_heads:
        return MIXES_HEADS
    if call.return_lse:
        return "jax's Pallas kernel has no gradient of the rows' sums"
    if call.dropout > 0:
        return "jax's Pallas kernel has no dropout"
    if call.logit_soft_cap is not None:
        return "jax's Pallas kernel has no soft cap"
    if call.has_bias:
        return "jax's Pallas kernel takes no bias"
    if manual_axes.is_varying():
        return "jax's Pallas kernel does not say how it varies within shard_map"
    return undivided(call)


def _refusal_of_tensors(call):
    if dtype_name(call.query) not in ("float16", "bfloat16"):
        return "jax's Pallas kernel is taken for float16 and bfloat16 only"
    batch, *shape = call.query.shape
    numbers = (*shape, *call.key.shape[1:], call.value.shape[3], batch or 1)
    if not all(isinstance(number, int) for number in numbers):
        return "jax's Pallas kernel takes lengths that are numbers"
    if call.query.shape[1] != call.key.shape[1]:
        return "jax's Pallas kernel takes segments of as many queries as keys only"
    if max(call.query.shape[3], call.value.shape[3]) > _WIDEST:
        return f"jax's Pallas kernel is taken for heads up to a width of {_WIDEST}"
    return None


def _refusal_of_mask(call):
    length = call.query.shape[1]
    parts = parted(call.mask, length, length)
    if len(parts.segments) != 1:
        return "jax's Pallas kernel is taken for one mask of segments"
    if parts.window is not None:
        return "jax's Pallas kernel has no window"
    if parts.dense or parts.rest:
        return (
            f"jax's Pallas kernel does not take {named((*parts.dense, *parts.rest)[0])}"
        )
    if parts.keys:
        if call.query.shape[3] + 1 > _WIDEST:
            return "hidden keys take one more feature than the kernel's heads can have"
        if not hiding_exponent(call.scale):
            return f"with a scale of {call.scale:g} the kernel would see every key"
    return None


def _refusal_of_version():
    try:
        from jax.experimental.pallas.ops.gpu import attention

        is_known = tuple(inspect.signature(attention._mha_backward).parameters)
    except (ImportError, AttributeError):
        is_known = None
    if is_known == _BACKWARD:
        return None
    return f"jax {jax.__version__} has another kernel in Pallas than is known here"


# ------------------------------------------------------------- the kernel's arguments


@dataclass(frozen=True, eq=False)
class _Arguments:
    """What the kernel is to be given.

    Args:
        scale: Factor of the dot products.
        causal: Whether query `i` sees the keys `j <= i` only.
        arrange: Of query, key and value, in `blockwise.forward`'s layout, makes the
            kernel's; linear in them.
        segments: The segment of each token, int32 of shape `(B, T)`.
        parts: The mask's parts.
    """

    scale: float
    causal: bool
    arrange: Callable
    segments: Tensor
    parts: MaskParts


def _arguments(problem, tensors, mask):
    batch, length = tensors["query"].shape[0], tensors["query"].shape[4]
    parts = parted(mask, length, length)
    arrange = partial(
        _arrange,
        visible=visible_keys(parts.keys, batch, length, length),
        exponent=hiding_exponent(problem.scale),
    )
    ids = jnp.broadcast_to(parts.segments[0].query_ids, (batch, length))
    # Numbered by where the first of each stands among all in order, so that behind the
    # last token there can be a segment of none.
    numbers = jax.vmap(jnp.searchsorted)(jnp.sort(ids, axis=1), ids).astype("int32")
    segments = padded(numbers, 1, multiple(_BLOCK, length), length)
    return _Arguments(problem.scale, parts.causal, arrange, segments, parts)


def _arrange(query, key, value, *, visible, exponent):
    query, key, value = positions_first(query), keys_first(key), keys_first(value)
    if visible is not None:
        key, value = zero_unless(visible, key), zero_unless(visible, value)
        query, key = with_hiding_feature(query, key, visible, exponent)
    width = max(query.shape[3], value.shape[3], 16)
    width = 1 << (width - 1).bit_length()  # the power of two that is no less
    length = multiple(_BLOCK, query.shape[1])
    return tuple(padded(padded(x, 3, width), 1, length) for x in (query, key, value))


def _seen(parts, sums, scale):
    """Returns which queries see anything, of the sums of their rows."""
    seen = seeing_queries(parts.queries)
    if not parts.keys:
        return seen  # each sees itself
    # The scores of hidden keys are all that a row has if its sum is as low as they are.
    lowest = scale * 2.0 ** hiding_exponent(scale)
    return both(seen, sums > -lowest / 2)


# ------------------------------------------------------------------------- the kernel


def _block_sizes(width):
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes

    # What fits into the shared memory of every GPU from Ampere on.
    block = _BLOCK if width <= 64 else 64
    return BlockSizes(
        block_q=block,
        block_k=block,
        block_q_dkv=32,
        block_kv_dkv=32,
        block_q_dq=32,
        block_kv_dq=32,
    )


def _attend(scale, causal, tensors):
    from jax.experimental.pallas.ops.gpu import attention

    query, key, value = _of_all_heads(tensors)
    output, sums = attention.mha(
        *(query, key, value, tensors["segments"]),
        sm_scale=scale,
        causal=causal,
        block_sizes=_block_sizes(query.shape[3]),
        interpret=_INTERPRET,
        return_residuals=True,
    )
    return output, sums * _LOG_2


def _pull_back(scale, causal, tensors):
    from jax.experimental.pallas.ops.gpu import attention

    query, key, value = _of_all_heads(tensors)
    sums = tensors["sums"] / _LOG_2
    kept = query, key, value, tensors["segments"], tensors["output"], sums
    options = (None, 2, None, _INTERPRET, False, False)
    found = attention._mha_backward(
        scale,
        causal,
        _block_sizes(query.shape[3]),
        "triton",
        *options,
        kept,
        tensors["d_output"],
    )
    batch, length, groups, width = tensors["key"].shape
    d_key, d_value = (
        jnp.sum(x.reshape(batch, length, groups, -1, width), axis=3) for x in found[1:3]
    )
    return found[0], d_key, d_value


def _of_all_heads(tensors):
    """Returns query, key and value of as many heads."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    shared = query.shape[2] // key.shape[2]
    if shared == 1:
        return query, key, value
    return query, jnp.repeat(key, shared, axis=2), jnp.repeat(value, shared, axis=2)


# --------------------------------------------------------------------- both directions


def _where_ids_agree(function, otherwise, mask, tensors):
    """Runs one function if queries and keys have the same ids, else the other one."""
    (segments,) = parted(mask, *(tensors["query"].shape[4],) * 2).segments
    agree = jnp.all(segments.query_ids == segments.key_ids)
    return jax.lax.cond(agree, function, otherwise)


def forward(problem: Problem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        problem: What is to be computed.
        tensors: As of `blockwise.forward`.

    Returns:
        The output, shape `(B, K, V, G, T)`, and the logarithm of each row's sum of
        exponentials, shape `(B, K, 1, G, T)`, infinite where a row sees nothing.
    """
    mask = join_tensors(problem.mask, tensors["mask"])
    return _where_ids_agree(
        lambda: _forward(problem, tensors, mask),
        lambda: blockwise.forward(problem, tensors),
        mask,
        tensors,
    )


def _forward(problem, tensors, mask):
    arguments = _arguments(problem, tensors, mask)
    tokens = arguments.arrange(tensors["query"], tensors["key"], tensors["value"])
    given = dict(zip(("query", "key", "value"), tokens, strict=True))
    output, sums = as_one_call(
        partial(_attend, arguments.scale, arguments.causal),
        given | {"segments": arguments.segments},
        ("output", "sums"),
    )
    _, groups, width, length = tensors["value"].shape
    output, sums = output[:, :length, :, :width], sums[..., :length]
    seen = _seen(arguments.parts, sums, arguments.scale)
    return finished(output, sums, seen, tensors.get("sink"), groups)


def backward(
    problem: Problem,
    tensors: dict[str, Any],
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
) -> dict[str, Tensor]:
    """Returns the gradients of the differentiable tensors, by name and of their shapes.

    Args:
        problem: As of `forward`.
        tensors: As of `forward`.
        output: What `forward` returned.
        lse: What `forward` returned.
        d_output: The gradient of the output.
    """
    mask = join_tensors(problem.mask, tensors["mask"])
    return _where_ids_agree(
        lambda: _backward(problem, tensors, mask, output, lse, d_output),
        lambda: blockwise.backward(problem, tensors, output, lse, d_output),
        mask,
        tensors,
    )


def _backward(problem, tensors, mask, output, lse, d_output):
    arguments = _arguments(problem, tensors, mask)
    tokens = tensors["query"], tensors["key"], tensors["value"]
    tokens, back = jax.vjp(arguments.arrange, *tokens)
    _, length, _, width = tokens[0].shape
    # What sees nothing has an infinite sum, or is known by its queries' mask.
    seen = both(seeing_queries(arguments.parts.queries), _finite(lse))
    rows = for_gradient(output, lse, d_output, seen, length, width)
    names = ("query", "key", "value", "sums", "output", "d_output")
    gradients = as_one_call(
        partial(_pull_back, arguments.scale, arguments.causal),
        dict(zip(names, (*tokens, *rows), strict=True))
        | {"segments": arguments.segments},
        ("query", "key", "value"),
    )
    found = dict(zip(("query", "key", "value"), back(gradients), strict=True))
    if "sink" in problem.differentiable:
        found["sink"] = gradient_of_sink(tensors["sink"], output, lse, d_output)
    return {
        name: found[name].astype(tensors[name].dtype) for name in problem.differentiable
    }


def _finite(lse):
    batch, groups, _, shared, rows = lse.shape
    return jnp.isfinite(lse).reshape(batch, groups * shared, rows)
