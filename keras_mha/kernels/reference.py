"""Attention as the formula is written, with all T x S scores at once: the definition.

Every other kernel is held to this one, and only this one can return the scores:

    logits  = query . key * scale
    logits  = logits mixed over the heads                with talking heads
    logits  = cap * tanh(logits / cap)                   with a soft cap
    logits  = logits + bias
    weights = softmax(logits where the mask allows)      with a sink: one more column
    weights = weights mixed over the heads               with talking heads
    output  = dropout(weights) . value

A row whose every key is masked (or has a bias of minus infinity) gets weights of 0,
and the gradients through it are 0. float16 and bfloat16 are computed in float32, but
for products on other devices than a CPU (`half_products`).

References:
    Vaswani et al., 2017, Attention is all you need: https://arxiv.org/abs/1706.03762
    Shazeer et al., 2020, Talking-heads attention: https://arxiv.org/abs/2003.02436
"""

import dataclasses
import math
from typing import Any, NamedTuple

from keras import ops

from keras_mha._keras import Tensor
from keras_mha._lengths import shape_of
from keras_mha.kernels import backends, dropout, one_program
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.half_products import as_operand, factors_of_scale, times
from keras_mha.kernels.masking import (
    LOWEST,
    allowed_pairs,
    whole,
    with_position_bias,
)
from keras_mha.masks import Tile, is_plain_causal


def attend(call: AttentionCall) -> Attended:
    """Runs one call of attention."""
    seed = dropout.seed_of(call) if 0 < call.dropout < 1 else None
    return one_program.run(_attend, call, seed)


def _attend(call, seed):
    output, weights, lse = attend_rows(call, whole(call), seed)
    if weights is not None:
        weights = ops.cast(weights, call.query.dtype)
    return Attended(output, weights, lse)


def attend_rows(call: AttentionCall, tile: Tile, seed: Tensor | None) -> Attended:
    """Attends from some rows to all columns.

    Args:
        call: A call whose query and bias have these rows only.
        tile: A part of its scores that has all columns.
        seed: What `dropout.seed_of` gave for the call; `None` where nothing, or
            everything, is dropped.

    Returns:
        What a kernel does, of these rows, with the weights in float32 at least.
    """
    scores = _scores(call, tile)
    needs_weights = call.return_scores or call.talking_heads[1] is not None
    if needs_weights:
        weights = _mixed(scores.weights, call.talking_heads[1])
    else:
        weights = scores.softmax
    kept, factor = _dropout(weights, call.dropout, seed, tile)
    value = as_operand(call.value, call.device_kind)
    output = _weighted_values(ops.cast(kept, value.dtype), value)
    if factor != 1:
        output = output * factor
    if not needs_weights and scores.seen is not None:
        # Of the output, which is smaller than the weights.
        seen = ops.transpose(scores.seen, (0, 2, 1, 3))
        output = ops.where(seen, output, ops.cast(0.0, output.dtype))
    lse = _lse(call, scores) if call.return_lse else None
    weights = weights if call.return_scores else None
    return Attended(ops.cast(output, call.query.dtype), weights, lse)


class Scores(NamedTuple):
    """What there is between queries and keys; float32 for float16 and bfloat16 inputs.

    Args:
        products: `query . key * scale`, shape `(B, N, rows, S)`.
        logits: What softmax is taken of: mixed, capped, with biases; not masked.
        allowed: Booleans that broadcast to this shape; `None` for all.
        softmax: What softmax gives: nothing that counts in a row that sees nothing.
        seen: Booleans that broadcast to `(B, N, rows, 1)`, which rows see a key; `None`
            if all do.
    """

    products: Tensor
    logits: Tensor
    allowed: Tensor | None
    softmax: Tensor
    seen: Tensor | None

    @property
    def weights(self) -> Tensor:
        """What values are weighted by; not mixed yet."""
        if self.seen is None:
            return self.softmax
        return ops.where(self.seen, self.softmax, ops.cast(0.0, self.softmax.dtype))


def scores_of_rows(call: AttentionCall, tile: Tile) -> Scores:
    """Returns the scores of a part of a call that has all columns, and some rows."""
    bias = None if call.bias is None else tile.cut_rows(call.bias, 2)
    query = tile.cut_rows(call.query, 1)
    return _scores(dataclasses.replace(call, query=query, bias=bias), tile)


def _scores(call: AttentionCall, tile: Tile) -> Scores:
    bias = with_position_bias(call.bias, call, tile)
    query, key = (as_operand(x, call.device_kind) for x in (call.query, call.key))
    early, late = factors_of_scale(call.scale, query)
    products = times(_query_dot_key(query * early, key), late)
    logits = _logits(call, _mixed(products, call.talking_heads[0]), bias)
    allowed = allowed_pairs(call, tile, bias)
    softmax = _masked_softmax(logits, allowed, call)
    return Scores(products, logits, allowed, softmax, _seen(allowed, call))


def attention_weights(call: AttentionCall, tile: Tile) -> Tensor:
    """Returns what values are weighted by, before dropout, `(B, N, rows, S)`."""
    return _mixed(scores_of_rows(call, tile).weights, call.talking_heads[1])


def _mixed(scores: Tensor, mixing: Tensor | None) -> Tensor:
    """`(B, N, rows, S)` with each head a mixture of all: `(N, N)`, from and to."""
    if mixing is None:
        return scores
    mixing = ops.cast(mixing, scores.dtype)
    return ops.einsum("...nts,nm->...mts", scores, mixing)


def _lse(call: AttentionCall, scores: Scores) -> Tensor:
    """Returns the logarithm of each row's sum of exponentials, `(B, N, rows)`."""
    logits = scores.logits
    if scores.allowed is not None:
        logits = ops.where(scores.allowed, logits, LOWEST)
    if call.sink is not None:
        logits = _beside_sink(call, logits)
    lse = ops.logsumexp(logits, axis=-1)
    return ops.where(lse > LOWEST / 2, lse, ops.cast(-math.inf, lse.dtype))


def _beside_sink(call: AttentionCall, logits: Tensor) -> Tensor:
    """Returns the logits with the sink as one more column."""
    sink = ops.reshape(ops.cast(call.sink, logits.dtype), (1, -1, 1, 1))
    column = ops.zeros_like(logits[..., :1]) + sink
    return ops.concatenate([logits, column], axis=-1)


def _logits(call: AttentionCall, logits: Tensor, bias: Tensor | None) -> Tensor:
    if call.logit_soft_cap is not None:
        logits = call.logit_soft_cap * ops.tanh(logits / call.logit_soft_cap)
    if bias is not None:
        logits = logits + ops.cast(bias, logits.dtype)
    return logits


def _masked_softmax(
    logits: Tensor, allowed: Tensor | None, call: AttentionCall
) -> Tensor:
    if allowed is not None and call.has_bias:  # which may be minus infinity
        logits = ops.where(allowed, logits, LOWEST)
    elif allowed is not None:
        # Added, not chosen by: what is added is made once for all heads, and in its
        # gradient nothing is chosen.
        zero, lowest = (ops.cast(x, logits.dtype) for x in (0.0, LOWEST))
        logits = logits + ops.where(allowed, zero, lowest)
    if call.sink is not None:
        return ops.softmax(_beside_sink(call, logits), axis=-1)[..., :-1]
    # As a tuple where there is one key: of an int, Keras would warn.
    return ops.softmax(logits, axis=(3,) if logits.shape[-1] == 1 else -1)


def _seen(allowed: Tensor | None, call: AttentionCall) -> Tensor | None:
    # Every row of a causal mask sees its first key at least.
    if allowed is None or (not call.has_bias and is_plain_causal(call.mask)):
        return None
    seen = ops.any(allowed, axis=-1, keepdims=True)
    if len(seen.shape) == 4:
        return seen
    return ops.reshape(seen, (*(1,) * (4 - len(seen.shape)), *shape_of(seen)))


def _dropout(
    weights: Tensor, rate: float, seed: Tensor | None, tile: Tile
) -> tuple[Tensor, float]:
    """Returns the weights that are kept, others 0, and what to multiply all by: left to
    the output, which is smaller."""
    if rate == 0:
        return weights, 1.0
    if rate == 1:
        return weights * 0.0, 1.0
    batch, heads = shape_of(weights)[:2]
    head_index = ops.reshape(
        ops.arange(batch * heads, dtype="int32"), (batch, heads, 1, 1)
    )
    kept = dropout.kept(seed, rate, head_index, tile)
    return backends.current().keep(weights, kept), 1.0 / (1.0 - rate)


def _product(equation: str, x: Tensor, y: Tensor) -> Tensor:
    return backends.current().product(equation, x, y)


def _query_dot_key(query: Tensor, key: Tensor) -> Tensor:
    """`(B, T, N, H), (B, S, K, H) -> (B, N, T, S)`."""
    batch, rows, heads, width = shape_of(query)
    columns, groups = shape_of(key)[1:3]
    if _is_one(query.shape[1]) and not backends.current().may_share_heads(key):
        return _one_query_dot_key(query, key)
    if groups == heads:
        return _product("btnh,bsnh->bnts", query, key)
    query = ops.reshape(query, (batch, rows, groups, heads // groups, width))
    b = _batch_letters(query.shape[1])
    logits = _product(f"{b}tkgh,{b}skh->{b}kgts", query, key)
    return ops.reshape(logits, (batch, heads, rows, columns))


def _weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """`(B, N, T, S), (B, S, K, V) -> (B, T, N, V)`."""
    batch, heads, rows, columns = shape_of(weights)
    groups, width = shape_of(value)[2:]
    if _is_one(weights.shape[2]) and not backends.current().may_share_heads(value):
        return _values_of_one_query(weights, value)
    if groups == heads:
        return _product("bnts,bsnv->btnv", weights, value)
    weights = ops.reshape(weights, (batch, groups, heads // groups, rows, columns))
    b = _batch_letters(weights.shape[3])
    output = _product(f"{b}kgts,{b}skv->{b}tkgv", weights, value)
    return ops.reshape(output, (batch, rows, heads, width))


def _batch_letters(rows: Any) -> str:
    # What Keras makes of `b` is fast on TensorFlow, and fails where there are no rows.
    return "..." if isinstance(rows, int) and rows == 0 else "b"


def _is_one(length: Any) -> bool:
    # A tensor in TorchScript, which takes a length not known yet to be 1.
    return isinstance(length, int) and length == 1


# A single query, as in decoding, has so little to compute that bringing keys and
# values into the order of a product per head would take most of the time. They are read
# as they lie, all heads in one product, of which what heads say of others is dropped.
# Not where devices share the heads: each would wait for the products of all.


def _one_query_dot_key(query: Tensor, key: Tensor) -> Tensor:
    """`(B, 1, N, H), (B, S, K, H) -> (B, N, 1, S)`."""
    batch, _, heads, width = shape_of(query)
    columns, groups = shape_of(key)[1:3]
    query = ops.reshape(query, (batch, groups, heads // groups, 1, width))
    own = ops.reshape(ops.eye(groups, dtype=query.dtype), (groups, 1, groups, 1))
    query = ops.reshape(query * own, (batch, heads, groups * width))
    key = ops.reshape(key, (batch, columns, groups * width))
    return _product("...nd,...sd->...ns", query, key)[:, :, None]


def _values_of_one_query(weights: Tensor, value: Tensor) -> Tensor:
    """`(B, N, 1, S), (B, S, K, V) -> (B, 1, N, V)`."""
    batch, heads, _, columns = shape_of(weights)
    groups, width = shape_of(value)[2:]
    value = ops.reshape(value, (batch, columns, groups * width))
    output = _product("bns,bsd->bnd", weights[:, :, 0], value)
    output = ops.reshape(output, (batch, groups, heads // groups, groups, width))
    own = ops.reshape(ops.eye(groups, dtype=output.dtype), (groups, 1, groups, 1))
    return ops.reshape(ops.sum(output * own, axis=3), (batch, 1, heads, width))
