"""Multi-head attention by its definition: float64 NumPy, plain loops, no tricks.

Everything in the package is measured against this page. It shares no code with the
package and is meant to be read beside the formulas; it is slow and does not care.

Letters: B batch, T queries, S keys and values, N query heads, K key/value heads (N is
a multiple of K, and query head n reads key/value head n // (N / K)), H width of a query
or key head, V width of a value head, D width of an input, E width of the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


# ----------------------------------------------------------------------------------
# The attention alone
# ----------------------------------------------------------------------------------


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    sink: float | Array | None = None,
    dropout_multiplier: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of (B, T, N, H) queries to (B, S, K, H) keys, (B, S, K, V) values.

    For each batch row and each head, with i a query and j a key:

        r_ij = scale * (q_i . k_j)                      scale = 1 / sqrt(H) by default
        s_ij = cap * tanh(r_ij / cap) + bias_ij         (no cap: s_ij = r_ij + bias_ij)
        p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))      over the visible j
        o_i  = sum_j m_ij p_ij v_j

    `mask` (True = visible) and `bias` broadcast to (B, N, T, S) as NumPy does; a bias
    of -inf hides the key as the mask does. Without a sink the term exp(sink) is absent.
    `sink` is one logit or one logit a head, shape (N,). m_ij is dropout's multiplier,
    0 or 1 / (1 - rate), and 1 where none is given. A row that sees no key has weights
    of zero.

    Returns the output (B, T, N, V) and the scores p (B, N, T, S), before dropout.
    """
    query, key, value = _float64(query), _float64(key), _float64(value)
    batch, queries, heads, _ = query.shape
    keys, groups = key.shape[1], key.shape[2]
    kept = _dropout_multiplier(dropout_multiplier, (batch, heads, queries, keys))

    logits, visible = _logits(query, key, mask, bias, scale, logit_soft_cap)
    sinks = _sinks(sink, heads)
    scores = np.zeros((batch, heads, queries, keys))
    output = np.zeros((batch, queries, heads, value.shape[-1]))
    for b in range(batch):
        for n in range(heads):
            for i in range(queries):
                scores[b, n, i] = softmax(
                    logits[b, n, i],
                    visible[b, n, i],
                    None if sink is None else sinks[n],
                )
            k = n // (heads // groups)
            output[b, :, n] = (kept[b, n] * scores[b, n]) @ value[b, :, k]
    return output, scores


def softmax(logits: Array, visible: Array, sink: float | None = None) -> Array:
    """p_j = exp(s_j) / (exp(sink) + sum_j exp(s_j)) over the visible j, 0 elsewhere.

    With nothing visible, all zeros. The largest logit is taken off every exponent,
    which changes no quotient and keeps exp from overflowing.
    """
    weights = np.zeros(logits.shape)
    if not visible.any():
        return weights
    seen = logits[visible]
    largest = seen.max() if sink is None else max(seen.max(), sink)
    total = np.exp(seen - largest).sum()
    if sink is not None:
        total += np.exp(sink - largest)
    weights[visible] = np.exp(seen - largest) / total
    return weights


def dot_product_attention_gradients(
    query: Array,
    key: Array,
    value: Array,
    *,
    output_cotangent: Array,
    scores_cotangent: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    sink: float | Array | None = None,
    dropout_multiplier: Array | None = None,
) -> dict[str, Array]:
    """Gradients of L = sum(output * output_cotangent) + sum(scores * scores_cotangent).

    In the names of `dot_product_attention`, with g_i the output's cotangent and c_ij
    the scores' (0 where none is given), for one head of one batch row:

        dv_j  = sum_i m_ij p_ij g_i
        dp_ij = m_ij (g_i . v_j) + c_ij
        D_i   = sum_j p_ij dp_ij
        ds_ij = p_ij (dp_ij - D_i)                  since dp_j/ds_l = p_j (1[j=l] - p_l)
        dbias_ij = ds_ij
        dsink = - sum_i p_i,sink D_i                p_i,sink = 1 - sum_j p_ij
        dr_ij = ds_ij (1 - tanh(r_ij / cap)^2)      no cap: dr_ij = ds_ij
        dq_i  = scale sum_j dr_ij k_j
        dk_j  = scale sum_i dr_ij q_i

    A key/value head's gradient is the sum over the query heads that read it; a bias's
    is the sum over the axes along which it was broadcast. All terms of a row that sees
    no key are zero, since its p_ij are.

    Returns "dquery", "dkey", "dvalue", and "dbias", "dsink" where these were given.
    """
    _, scores = dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sink=sink,
    )
    query, key, value = _float64(query), _float64(key), _float64(value)
    output_cotangent = _float64(output_cotangent)
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1], key.shape[2]
    if scale is None:
        scale = 1.0 / np.sqrt(width)
    if scores_cotangent is None:
        scores_cotangent = np.zeros(scores.shape)
    kept = _dropout_multiplier(dropout_multiplier, scores.shape)

    dquery = np.zeros(query.shape)
    dkey = np.zeros(key.shape)
    dvalue = np.zeros(value.shape)
    dlogits = np.zeros((batch, heads, queries, keys))
    dsink = np.zeros(heads)
    for b in range(batch):
        for n in range(heads):
            k = n // (heads // groups)
            p, m, g = scores[b, n], kept[b, n], output_cotangent[b, :, n]
            q_head, k_head, v_head = query[b, :, n], key[b, :, k], value[b, :, k]

            dvalue[b, :, k] += (m * p).T @ g
            dp = m * (g @ v_head.T) + scores_cotangent[b, n]
            row_sum = (p * dp).sum(axis=-1, keepdims=True)
            ds = p * (dp - row_sum)
            dlogits[b, n] = ds
            p_sink = 1.0 - p.sum(axis=-1, keepdims=True)
            dsink[n] -= (p_sink * row_sum).sum()

            dr = ds
            if logit_soft_cap is not None:
                r = scale * (q_head @ k_head.T)
                dr = ds * (1.0 - np.tanh(r / logit_soft_cap) ** 2)
            dquery[b, :, n] += scale * (dr @ k_head)
            dkey[b, :, k] += scale * (dr.T @ q_head)

    gradients = {"dquery": dquery, "dkey": dkey, "dvalue": dvalue}
    if bias is not None:
        gradients["dbias"] = sum_to_shape(dlogits, np.shape(bias))
    if sink is not None:
        gradients["dsink"] = sum_to_shape(dsink, np.shape(sink))
    return gradients


def sum_to_shape(array: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting: sums over the axes that were repeated."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    for axis, size in enumerate(shape):
        if size == 1:
            array = array.sum(axis=axis, keepdims=True)
    return array


def _logits(
    query: Array,
    key: Array,
    mask: Array | None,
    bias: Array | None,
    scale: float | None,
    logit_soft_cap: float | None,
) -> tuple[Array, Array]:
    """s_ij, and which of them count, both (B, N, T, S)."""
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1], key.shape[2]
    assert heads % groups == 0
    if scale is None:
        scale = 1.0 / np.sqrt(width)
    shape = (batch, heads, queries, keys)

    logits = np.zeros(shape)
    for b in range(batch):
        for n in range(heads):
            k = n // (heads // groups)
            logits[b, n] = scale * (query[b, :, n] @ key[b, :, k].T)
    if logit_soft_cap is not None:
        logits = logit_soft_cap * np.tanh(logits / logit_soft_cap)

    visible = np.ones(shape, dtype=bool)
    if mask is not None:
        visible &= np.broadcast_to(np.asarray(mask, dtype=bool), shape)
    if bias is not None:
        bias = np.broadcast_to(_float64(bias), shape)
        visible &= bias != -np.inf
        logits = logits + bias
    return logits, visible


def _sinks(sink: float | Array | None, heads: int) -> Array:
    """One logit a head; the value is not looked at when there is no sink."""
    return np.broadcast_to(0.0 if sink is None else _float64(sink), (heads,))


def _dropout_multiplier(multiplier: Array | None, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(1.0 if multiplier is None else _float64(multiplier), shape)


def _float64(array: Any) -> Array:
    return np.asarray(array, dtype="float64")


# ----------------------------------------------------------------------------------
# The layer
# ----------------------------------------------------------------------------------


def multi_head_attention(
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    query: Array,
    value: Array | None = None,
    key: Array | None = None,
    *,
    query_mask: Array | None = None,
    value_mask: Array | None = None,
    key_mask: Array | None = None,
    attention_mask: Array | None = None,
    attention_bias: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    use_causal_mask: bool = False,
) -> tuple[Array, Array]:
    """The whole layer on (B, T, D) queries, (B, S, D') values, (B, S, D'') keys.

    In this order:

        Q, K, V = query W_q + b_q, key W_k + b_k, value W_v + b_v     a head at a time
        Q, K    = qk_norm(Q), qk_norm(K)                              if asked for
        O       = dot_product_attention(Q, K, V, ...)
        O       = O * sigmoid(query W_g + b_g)                        if asked for
        output  = O W_o + b_o                                         over heads and V

    `weights` holds "query_kernel" (D, N, H), "key_kernel" (D'', K, H), "value_kernel"
    (D', K, V), "output_kernel" (N, V, *E) and, where the layer has them,
    "query_bias" (N, H), "key_bias" (K, H), "value_bias" (K, V), "output_bias" (*E),
    "gate_kernel" (D, N, V), "gate_bias" (N, V), "query_norm" (H,), "key_norm" (H,),
    "sink" (N,). `config` holds the layer's arguments by their public names; one that
    is missing has its default. `value` None is self-attention; `key` None is `value`.

    Returns the output (B, T, *E) and the scores (B, N, T, S).
    """
    value = query if value is None else value
    key = value if key is None else key
    query, key, value = _float64(query), _float64(key), _float64(value)

    query_heads = project(query, weights["query_kernel"], weights.get("query_bias"))
    key_heads = project(key, weights["key_kernel"], weights.get("key_bias"))
    value_heads = project(value, weights["value_kernel"], weights.get("value_bias"))

    kind = config.get("qk_norm")
    epsilon = config.get("qk_norm_epsilon", 1e-6)
    query_heads = normalize(query_heads, kind, epsilon, weights.get("query_norm"))
    key_heads = normalize(key_heads, kind, epsilon, weights.get("key_norm"))

    scale = config.get("scale")
    if scale is None:
        key_dim = query_heads.shape[-1]
        scale = np.sqrt(key_dim) if kind == "l2" else 1.0 / np.sqrt(key_dim)

    sink = {None: None, "zero": 0.0, "learned": weights.get("sink")}[
        config.get("attention_sink")
    ]
    output, scores = dot_product_attention(
        query_heads,
        key_heads,
        value_heads,
        mask=combined_mask(
            query.shape[1],
            key.shape[1],
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            use_causal_mask=use_causal_mask,
            sliding_window=config.get("sliding_window"),
        ),
        bias=attention_bias,
        scale=scale,
        logit_soft_cap=config.get("logit_soft_cap"),
        sink=sink,
    )
    if config.get("use_gate"):
        gate = project(query, weights["gate_kernel"], weights.get("gate_bias"))
        output = output / (1.0 + np.exp(-gate))

    kernel = _float64(weights["output_kernel"])
    # (B, T, N, V) x (N, V, *E) -> (B, T, *E)
    output = np.tensordot(output, kernel, axes=2)
    if weights.get("output_bias") is not None:
        output = output + _float64(weights["output_bias"])
    return output, scores


def project(inputs: Array, kernel: Array, bias: Array | None) -> Array:
    """(B, T, D) x (D, N, H) + (N, H) -> (B, T, N, H)."""
    heads = np.einsum("btd,dnh->btnh", inputs, _float64(kernel))
    return heads if bias is None else heads + _float64(bias)


def normalize(
    heads: Array, kind: str | None, epsilon: float, gain: Array | None
) -> Array:
    """Normalises each head over its features, the last axis.

    "rms":   x / sqrt(mean(x^2) + epsilon) * gain
    "layer": (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * gain
    "l2":    x / max(|x|, epsilon)
    """
    if kind is None:
        return heads
    if kind == "l2":
        length = np.sqrt((heads**2).sum(axis=-1, keepdims=True))
        return heads / np.maximum(length, epsilon)
    if kind == "layer":
        heads = heads - heads.mean(axis=-1, keepdims=True)
    else:
        assert kind == "rms", kind
    mean_square = (heads**2).mean(axis=-1, keepdims=True)
    return heads / np.sqrt(mean_square + epsilon) * _float64(gain)


def combined_mask(
    queries: int,
    keys: int,
    *,
    query_mask: Array | None = None,
    value_mask: Array | None = None,
    key_mask: Array | None = None,
    attention_mask: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    use_causal_mask: bool = False,
    sliding_window: int | None = None,
) -> Array:
    """All masks given, and-ed; broadcastable to (B, N, T, S), True = may attend.

    causal: j <= i; window: |i - j| < size; segments: the ids of i and j are equal;
    query mask: i is valid; value and key masks: j is valid. `attention_mask` is
    (T, S), (B, T, S) or (B, N, T, S).
    """
    i = np.arange(queries)[:, None]
    j = np.arange(keys)[None, :]
    mask = np.ones((1, 1, queries, keys), dtype=bool)
    if use_causal_mask:
        mask = mask & (j <= i)
    if sliding_window is not None:
        mask = mask & (np.abs(i - j) < sliding_window)
    if query_mask is not None:
        mask = mask & np.asarray(query_mask, dtype=bool)[:, None, :, None]
    if value_mask is not None:
        mask = mask & np.asarray(value_mask, dtype=bool)[:, None, None, :]
    if key_mask is not None:
        mask = mask & np.asarray(key_mask, dtype=bool)[:, None, None, :]
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
        query_ids, key_ids = (np.asarray(ids) for ids in pair)
        mask = mask & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
    if attention_mask is not None:
        mask = mask & head_first(np.asarray(attention_mask, dtype=bool))
    return mask


def head_first(mask: Array) -> Array:
    """A mask of (T, S), (B, T, S) or (B, N, T, S) as one of four axes.

    NumPy would put the batch of a rank-3 mask where the heads are.
    """
    return mask[:, None] if mask.ndim == 3 else mask
