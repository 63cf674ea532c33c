"""Attention by cuDNN's kernel on NVIDIA's GPUs, for half types.

The kernel knows causal masks, windows to the left, and how many keys a sequence has. A
mask of all pairs it takes as numbers that are added to the scores, which are T x S. So
every other mask is said in another way:

- Keys that are hidden from all queries alike (padding), where their order says nothing:
  those that are seen are put first, and counted.
- The same where it does: heads get one more feature, which is `a` in every query, 0 in
  a key that is seen and `-b` in one that is not. With `scale * a * b` of some millions
  the weight of a hidden key is exactly 0, as long as no two scores of a row are as far
  apart; and to the score of a key that is seen, exactly 0 is added.
- Booleans that the caller gave for all pairs become a bias.
- Queries that see nothing are found beforehand: cuDNN's numbers of such rows are not
  looked at, and its gradient gets zeros and an infinite sum there.

A sink joins the softmax afterwards, of which the rows' sum is all that is to be known;
with it the sum, the kernel's gradient is that of the softmax with the sink.

References:
    Dao, 2023, FlashAttention-2: https://arxiv.org/abs/2307.08691
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels import blockwise
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import cudnn_machine, cudnn_primitives
from keras_mha.kernels.jax_kernels.cudnn_primitives import Kernel
from keras_mha.kernels.jax_kernels.mask_parts import (
    MaskParts,
    dense_shape,
    named,
    parted,
)
from keras_mha.kernels.masking import LOWEST
from keras_mha.kernels.parts import join_tensors
from keras_mha.kernels.problem import MIXES_HEADS, Problem, undivided
from keras_mha.masks import Mask, whole_tile

# What is added to scores that a bias or booleans mask. Of bfloat16 a power of two:
# whatever is added to it is rounded away, and its multiples are exact, so that the
# difference of two such scores is 0. Of float16 the least that it has.
_MASKED = {"bfloat16": -(2.0**100), "float16": -65504.0}

# The sum of a row that sees nothing, for the gradient: weights are exactly 0 against
# it, also of keys that the kernel takes to be seen.
_NO_SUM = 1e30

# A bias's gradient makes cuDNN hold numbers of half a type for the scores of all heads
# and rows of the batch. Up to so many bytes they may be more than the bias has.
_FEW_BYTES = 2**28

# Scores of hidden keys are from half of this to this. More would take more than one bit
# of what products of half a type, summed in float32, can be off by.
_HIDDEN = 2.0**24

# The largest exponent of two in float16.
_MOST = 15


def refusal(call: AttentionCall) -> str | None:
    """Returns why cuDNN's kernel cannot run this call, or `None` if it can."""
    return (
        _refusal_of_options(call)
        or _refusal_of_tensors(call)
        or _refusal_of_mask(call)
        or _refusal_of_bias(call)
        or cudnn_primitives.refusal()
        or cudnn_machine.refusal()
    )


def _refusal_of_options(call):
    if call.mixes_heads:
        return MIXES_HEADS
    if call.return_lse:
        return "cuDNN's kernel has no gradient of the rows' sums"
    if call.dropout > 0:
        return "cuDNN's dropout does not follow the layer's seed"
    if call.logit_soft_cap is not None:
        return "cuDNN's kernel has no soft cap"
    if call.position_bias is not None:
        return "a position's bias is made tile by tile, and cuDNN takes it whole"
    return undivided(call)


def _refusal_of_tensors(call):
    if dtype_name(call.query) not in _MASKED:
        return "cuDNN's kernel takes float16 and bfloat16 only"
    batch, *shape = call.query.shape
    numbers = (*shape, *call.key.shape[1:], call.value.shape[3], batch or 1)
    if not all(isinstance(number, int) for number in numbers):
        return "cuDNN's kernel takes lengths that are numbers"
    widest = cudnn_machine.widest()
    if max(call.query.shape[3], call.value.shape[3]) > widest:
        return f"cuDNN's kernel takes heads up to a width of {widest} here"
    return None


def _refusal_of_mask(call):
    rows, columns = call.query.shape[1], call.key.shape[1]
    parts = parted(call.mask, rows, columns)
    if parts.segments or parts.rest:
        kind = named(*(parts.segments + parts.rest)[:1])
        return f"{kind} would be T x S numbers for cuDNN's kernel"
    if parts.window is not None:
        if call.bias is not None or parts.dense:
            return "cuDNN's kernel takes no window beside a bias or booleans"
        if rows > columns:
            return "cuDNN's windows take no more queries than keys"
    if _way_to_hide(parts, call.bias is not None) == "by a feature":
        if call.query.shape[3] + 1 > cudnn_machine.widest():
            return "hidden keys take one more feature than cuDNN's heads can have"
        if not _exponent(call.scale):
            return f"with a scale of {call.scale:g} cuDNN's kernel would see every key"
    return None


def _refusal_of_bias(call):
    if call.bias is None:
        return None
    if dtype_name(call.bias) != dtype_name(call.query):
        return "cuDNN's kernel takes no bias of more precision than the query"
    if dtype_name(call.bias) == "float16":
        return "in float16 a bias that masks cannot be told from a low one by cuDNN"
    shape = tuple(call.bias.shape)
    if shape[2:] != call.scores_shape[2:]:
        return "a bias that broadcasts would be T x S numbers for cuDNN's kernel"
    masks = parted(call.mask, *call.scores_shape[2:]).dense
    if any(_larger(dense_shape(mask), shape) for mask in masks):
        return "beside the mask's booleans the bias would have more numbers than given"
    return None


def _larger(shape, other):
    return any(a > b for a, b in zip(shape[:2], other[:2], strict=True))


def _way_to_hide(parts: MaskParts, has_bias: bool) -> str | None:
    if not parts.keys:
        return None
    in_order = parts.causal or parts.window or has_bias or parts.dense
    return "by a feature" if in_order else "by a length"


def _exponent(scale: float) -> int | None:
    """Returns the exponent of the power of two that takes a hidden key's product with
    any query to a score of `_HIDDEN`; `None` where half types have none."""
    if not 2.0**-12 <= scale <= 2.0**12:
        return None
    return min(math.floor(math.log2(_HIDDEN / scale)), 2 * _MOST)


# ------------------------------------------------------------- the kernel's arguments


@dataclass(frozen=True, eq=False)
class _Arguments:
    """What the kernel is to be given.

    Args:
        kernel: What it is to compute.
        arrange: Of query, key and value, in `blockwise.forward`'s layout, makes the
            kernel's; linear in them.
        arrange_bias: Of the bias, or `None`, makes the kernel's; linear where the bias
            does not mask.
        rows: Of this many queries the kernel's rows are made, the rest are zeros.
        lengths: As of `cudnn_primitives.attend`.
        seen: Which queries see anything; booleans that broadcast to `(B, N, T)`,
            `None` for all.
    """

    kernel: Kernel
    arrange: Callable
    arrange_bias: Callable
    rows: int
    lengths: Tensor | None
    seen: Tensor | None


def _arguments(problem: Problem, tensors: dict[str, Any]) -> _Arguments:
    batch, _, _, _, rows = tensors["query"].shape
    columns = tensors["key"].shape[3]
    mask = join_tensors(problem.mask, tensors["mask"])
    parts = parted(mask, rows, columns)
    # No query sees the keys behind the last one's.
    kept = min(rows, columns) if parts.causal else columns
    has_bias = "bias" in tensors or bool(parts.dense)
    visible = _visible(parts.keys, batch, rows, columns)
    way = _way_to_hide(parts, "bias" in tensors)
    lengths = None
    if way == "by a length":
        # Where no key is visible cuDNN is to see one. What comes of it is not looked
        # at.
        lengths = jnp.maximum(jnp.sum(visible, axis=1, dtype="int32"), 1)
    pad = 2 if has_bias else 1
    arrange = partial(
        _arrange,
        exponent=_exponent(problem.scale),
        visible=visible,
        way=way,
        kept=kept,
        pad=pad,
    )
    arrange_bias = partial(
        _arrange_bias,
        dense=_dense_booleans(parts.dense),
        dtype=dtype_name(tensors["query"]),
        kept=kept,
        pad=pad,
    )
    causal = parts.causal and kept > 1
    kernel = Kernel(problem.scale, causal, parts.window if causal else None)
    seen = _seen(parts, visible, mask, tensors)
    return _Arguments(kernel, arrange, arrange_bias, rows, lengths, seen)


def _arrange(query, key, value, *, exponent, visible, way, kept, pad):
    batch, groups, width, shared, rows = query.shape
    query = query.transpose(0, 4, 1, 3, 2).reshape(batch, rows, groups * shared, width)
    key, value = (x.transpose(0, 3, 1, 2)[:, :kept] for x in (key, value))
    if way == "by a feature":
        query, key = _with_hiding_feature(query, key, visible[:, :kept], exponent)
    if way == "by a length":
        key, value = _visible_first(key, visible), _visible_first(value, visible)
    width = _multiple(8, max(query.shape[3], value.shape[3]))
    return tuple(
        _padded(_padded(x, 3, width), 1, _multiple(pad, x.shape[1]))
        for x in (query, key, value)
    )


def _with_hiding_feature(query, key, visible, exponent):
    """Adds a feature by which a query's product with keys that are not visible is minus
    two to the power of the exponent."""
    half = exponent // 2
    feature = jnp.full_like(query[..., :1], 2.0**half)
    other = jnp.where(visible, 0.0, -(2.0 ** (exponent - half))).astype(key.dtype)
    other = jnp.broadcast_to(other[:, :, None, None], (*key.shape[:3], 1))
    return (
        jnp.concatenate([query, feature], axis=3),
        jnp.concatenate([key, other], axis=3),
    )


def _visible_first(x, visible):
    # Zeros for those that are not, so that their gradients are zeros too.
    x = jnp.where(visible[:, :, None, None], x, jnp.zeros((), x.dtype))
    order = jnp.argsort(~visible, axis=1, stable=True)
    return jax.vmap(
        lambda x, order: x.at[order].get(mode="promise_in_bounds", unique_indices=True)
    )(x, order)


def _arrange_bias(bias, *, dense, dtype, kept, pad):
    if bias is None and dense is None:
        return None
    masked = jnp.asarray(_MASKED[dtype], dtype)
    if bias is None:
        bias = jnp.where(dense, jnp.zeros((), dtype), masked)
    else:
        batch, groups, shared, *lengths = bias.shape
        bias = bias.reshape(batch, groups * shared, *lengths)
        allowed = bias > LOWEST
        allowed = allowed if dense is None else allowed & dense
        bias = jnp.where(allowed, bias, masked)
    bias = bias[..., :kept]
    rows, columns = (_multiple(pad, length) for length in bias.shape[2:])
    return _padded(_padded(bias, 3, columns, masked), 2, rows)


def _dense_booleans(dense):
    """Returns where all of these masks allow a pair, four axes; `None` for all."""
    found = None
    for mask in dense:
        values = jnp.asarray(mask.values).astype(bool).reshape(dense_shape(mask))
        found = values if found is None else found & values
    return found


def _multiple(of, number):
    return -(-number // of) * of


def _padded(x, axis, length, value=0):
    missing = length - x.shape[axis]
    if not missing:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, missing)
    return jnp.pad(x, padding, constant_values=jnp.asarray(value, x.dtype))


# --------------------------------------------------------------- who sees, and is seen


def _visible(masks: tuple[Mask, ...], batch: int, rows: int, columns: int):
    """Returns the keys that none of these masks hides, `(B, S)`; `None` for all."""
    if not masks:
        return None
    tile = whole_tile(rows, columns)
    found = True
    for mask in masks:
        found = jnp.logical_and(found, mask.block(tile))
    found = jnp.broadcast_to(found, (batch, 1, 1, columns))
    return found.reshape(batch, columns)


def _seen(parts, visible, mask, tensors):
    """Returns which queries see anything, as of `_Arguments`."""
    rows, columns = tensors["query"].shape[4], tensors["key"].shape[3]
    if "bias" in tensors or parts.dense:
        # Reduced as it is made: these booleans are held nowhere.
        allowed = True if mask is None else mask.block(whole_tile(rows, columns))
        if "bias" in tensors:
            bias = tensors["bias"]
            bias = bias.reshape(bias.shape[0], -1, *bias.shape[3:])
            allowed = jnp.logical_and(allowed, bias > LOWEST)
        return jnp.any(allowed, axis=3)
    seen = None
    if visible is not None:
        seen = _rows_that_see(visible, parts.causal, parts.window, rows)[:, None]
    for each in parts.queries:
        values = jnp.asarray(each.values).astype(bool).reshape(dense_shape(each))
        seen = values[..., 0] if seen is None else seen & values[..., 0]
    return seen


def _rows_that_see(visible, causal, window, rows):
    """Returns which queries, `(B, T)`, see one of the visible keys, `(B, S)`."""
    if not causal:
        return jnp.any(visible, axis=1, keepdims=True)
    columns = visible.shape[1]
    counts = jnp.pad(jnp.cumsum(visible, axis=1, dtype="int32"), ((0, 0), (1, 0)))
    row = jnp.arange(rows)
    first = jnp.zeros_like(row) if window is None else row - window + 1
    first, after = jnp.clip(first, 0, columns), jnp.clip(row + 1, 0, columns)
    return counts[:, after] > counts[:, first]


# --------------------------------------------------------------------- both directions


def forward(problem: Problem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        problem: What is to be computed.
        tensors: As of `blockwise.forward`.

    Returns:
        The output, shape `(B, K, V, G, T)`, and the logarithm of each row's sum of
        exponentials, shape `(B, K, 1, G, T)`, infinite where a row sees nothing.
    """
    arguments = _arguments(problem, tensors)
    output, sums = cudnn_primitives.attend(
        arguments.kernel,
        *arguments.arrange(tensors["query"], tensors["key"], tensors["value"]),
        arguments.arrange_bias(tensors.get("bias")),
        arguments.lengths,
    )
    output = output[:, : arguments.rows, :, : tensors["value"].shape[2]]
    sums = sums[..., : arguments.rows]
    if arguments.seen is not None:
        output = _zero_unless(arguments.seen, output)
        sums = jnp.where(arguments.seen, sums, math.inf)
    groups, _, shared = tensors["query"].shape[1:4]
    batch, rows, _, width = output.shape
    output = output.reshape(batch, rows, groups, shared, width).transpose(0, 2, 4, 3, 1)
    sums = sums.reshape(batch, groups, 1, shared, rows)
    if "sink" in tensors:
        return _with_sink(output, sums, tensors["sink"])
    return output, sums


def _with_sink(output, sums, sink):
    """Returns the output and the sums of a softmax that a sink joined."""
    sink = sink.astype(sums.dtype)[:, None, :, None]
    sums = jnp.where(sums == math.inf, -math.inf, sums)
    joined = jnp.logaddexp(sums, sink)
    joined = jnp.where(joined == -math.inf, math.inf, joined)
    # Where nothing else is seen the output is 0 already.
    return (output * jnp.exp(sums - joined)).astype(output.dtype), joined


def _zero_unless(seen, x):
    return jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], x, jnp.zeros((), x.dtype))


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
    of_bias = "bias" in problem.differentiable
    if of_bias and not _holds_scores_for_bias(tensors):
        return blockwise.backward(problem, tensors, output, lse, d_output)
    arguments = _arguments(problem, tensors)
    tokens = tensors["query"], tensors["key"], tensors["value"]
    tokens, back = jax.vjp(arguments.arrange, *tokens)
    if of_bias:
        bias, bias_back = jax.vjp(arguments.arrange_bias, tensors["bias"])
    else:
        bias = arguments.arrange_bias(tensors.get("bias"))
    gradients = cudnn_primitives.pull_back(
        arguments.kernel,
        *tokens,
        bias,
        arguments.lengths,
        *_of_rows(arguments, tokens[0].shape, output, lse, d_output),
        of_bias=of_bias,
    )
    found = dict(zip(("query", "key", "value"), back(gradients[:3]), strict=True))
    if of_bias:
        (found["bias"],) = bias_back(gradients[3])
    if "sink" in problem.differentiable:
        found["sink"] = _of_sink(tensors["sink"], output, lse, d_output)
    return {
        name: found[name].astype(tensors[name].dtype) for name in problem.differentiable
    }


def _holds_scores_for_bias(tensors):
    """Whether cuDNN may hold numbers of all scores for the gradient of a bias."""
    batch, groups, _, shared, rows = tensors["query"].shape
    scores = batch * groups * shared * rows * tensors["key"].shape[3]
    return scores == tensors["bias"].size or 2 * scores <= _FEW_BYTES


def _of_rows(arguments, shape, output, lse, d_output):
    """Returns the rows' sums, the output and its gradient, as the kernel had them."""
    batch, length, heads, width = shape
    output, d_output = (
        x.transpose(0, 4, 1, 3, 2).reshape(batch, arguments.rows, heads, -1)
        for x in (output, d_output.astype(output.dtype))
    )
    sums = lse.reshape(batch, heads, arguments.rows)
    if arguments.seen is not None:
        sums = jnp.where(arguments.seen, sums, _NO_SUM)
        d_output = _zero_unless(arguments.seen, d_output)
    output, d_output = (
        _padded(_padded(x, 3, width), 1, length) for x in (output, d_output)
    )
    return _padded(sums, 2, length, _NO_SUM), output, d_output


def _of_sink(sink, output, lse, d_output):
    share = jnp.sum(
        d_output.astype("float32") * output.astype("float32"), axis=2, keepdims=True
    )
    weights = jnp.exp(sink.astype("float32")[:, None, :, None] - lse)
    return -jnp.sum(weights * share, axis=(0, 2, 4))
