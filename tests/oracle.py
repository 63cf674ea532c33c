"""Multi-head attention by its definition: float64 NumPy, plain loops, no tricks.

Everything in the package is measured against this page. It shares no code with the
package and is meant to be read beside the formulas; it is slow and does not care.

Letters: B batch, T queries, S keys and values, N query heads, K key/value heads (N is
a multiple of K, and query head n reads key/value head n // (N / K)), H width of a query
or key head, V width of a value head, D width of an input, E width of the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
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
    talking_heads: tuple[Array | None, Array | None] = (None, None),
    dropout_multiplier: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of (B, T, N, H) queries to (B, S, K, H) keys, (B, S, K, V) values.

    For each batch row and each head, with i a query and j a key:

        r_ij = scale * (q_i . k_j)                      scale = 1 / sqrt(H) by default
        r_ij = sum_n A_n r_ij of head n                 if heads talk before softmax
        s_ij = cap * tanh(r_ij / cap) + bias_ij         (no cap: s_ij = r_ij + bias_ij)
        p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))      over the visible j
        p_ij = sum_n B_n p_ij of head n                 if heads talk after softmax
        o_i  = sum_j m_ij p_ij v_j

    `mask` (True = visible) and `bias` broadcast to (B, N, T, S) as NumPy does; a bias
    of -inf hides the key as the mask does. Without a sink the term exp(sink) is absent.
    `sink` is one logit or one logit a head, shape (N,). m_ij is dropout's multiplier,
    0 or 1 / (1 - rate), and 1 where none is given. A row that sees no key has weights
    of zero. `talking_heads` are two matrices (N, N), of which A and B are the head's
    column: what it hears of each head.

    Returns the output (B, T, N, V) and the scores p (B, N, T, S), before dropout.
    """
    query, key, value = _float64(query), _float64(key), _float64(value)
    batch, queries, heads, _ = query.shape
    keys, groups = key.shape[1], key.shape[2]
    kept = _dropout_multiplier(dropout_multiplier, (batch, heads, queries, keys))

    before, after = talking_heads
    logits, visible = _logits(query, key, mask, bias, scale, logit_soft_cap, before)
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
        scores[b] = mixed(scores[b], after)
        for n in range(heads):
            k = n // (heads // groups)
            output[b, :, n] = (kept[b, n] * scores[b, n]) @ value[b, :, k]
    return output, scores


def log_sums(
    query: Array,
    key: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    sink: float | Array | None = None,
    talking_heads: tuple[Array | None, None] = (None, None),
) -> Array:
    """log(exp(sink) + sum_j exp(s_ij)) over the visible j, (B, N, T); -inf if none.

    The s_ij and the arguments are those of `dot_product_attention`.
    """
    query, key = _float64(query), _float64(key)
    before = talking_heads[0]
    logits, visible = _logits(query, key, mask, bias, scale, logit_soft_cap, before)
    logits = np.where(visible, logits, -np.inf)
    if sink is not None:
        column = np.broadcast_to(
            _sinks(sink, query.shape[2])[:, None, None], (*logits.shape[:3], 1)
        )
        logits = np.concatenate([logits, column], axis=-1)
    with np.errstate(divide="ignore"):  # log(0)
        largest = np.maximum(logits.max(axis=-1, keepdims=True), -1e9)
        total = np.exp(logits - largest).sum(axis=-1)
        return largest[..., 0] + np.log(total)


def mixed(heads: Array, matrix: Array | None) -> Array:
    """Head m of the result is sum_n matrix[n, m] heads[n]; (N, T, S) and (N, N)."""
    if matrix is None:
        return heads
    matrix = _float64(matrix)
    return np.stack(
        [
            sum(matrix[n, m] * heads[n] for n in range(len(heads)))
            for m in range(len(heads))
        ]
    )


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
    mixing: Array | None = None,
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
        logits[b] = mixed(logits[b], mixing)
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
# Positions
# ----------------------------------------------------------------------------------


def rotary(
    x: Array,
    positions: Array | None = None,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    max_wavelength: float = 10_000.0,
    scaling: Mapping[str, Any] | None = None,
    lengths: Array | None = None,
) -> Array:
    """Rotary position embedding (Su et al., 2021) of heads (B, T, N, H).

    With d = rotary_dim (all H features by default), position p turns pair i, of d/2,

        x_a -> m (x_a cos(p w_i) - x_b sin(p w_i))
        x_b -> m (x_a sin(p w_i) + x_b cos(p w_i))

    where (a, b) = (i, i + d/2), or (2i, 2i + 1) if interleaved. The frequencies w_i and
    the factor m are those of `rotary_frequencies`. Features from d on stay as they are.

    `positions` is (T,) or (B, T), 0..T-1 by default. `lengths` (B,) is what "dynamic"
    scaling takes for each row's length: its largest position + 1 by default.
    """
    x = _float64(x)
    batch, tokens, _, width = x.shape
    dim = width if rotary_dim is None else rotary_dim
    positions = np.arange(tokens) if positions is None else np.asarray(positions)
    positions = np.broadcast_to(positions, (batch, tokens))
    if lengths is None:
        lengths = positions.max(axis=1) + 1

    turned = x.copy()
    for b in range(batch):
        frequencies, m = rotary_frequencies(dim, max_wavelength, scaling, lengths[b])
        for i in range(dim // 2):
            one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
            for t in range(tokens):
                angle = float(positions[b, t]) * frequencies[i]
                cos, sin = np.cos(angle), np.sin(angle)
                x_a, x_b = x[b, t, :, one], x[b, t, :, other]
                turned[b, t, :, one] = m * (x_a * cos - x_b * sin)
                turned[b, t, :, other] = m * (x_a * sin + x_b * cos)
    return turned


def rotary_frequencies(
    dim: int,
    max_wavelength: float = 10_000.0,
    scaling: Mapping[str, Any] | None = None,
    length: float = 0,
) -> tuple[Array, float]:
    """The frequencies w_i (dim/2,) and the factor m on cos and sin.

    With d = dim, W = max_wavelength, f = factor, L = original_max_position_embeddings,
    and v_i = W^(-2i/d) the frequencies without scaling:

    "default": w_i = v_i.

    "linear" (Chen et al., 2023): w_i = v_i / f, as if positions were p / f.

    "dynamic" (NTK-aware, by the length n so far): w_i = W'^(-2i/d) with

        W' = W (f n / L - (f - 1))^(d / (d - 2))          for n > L; else W' = W

    "llama3" (Llama 3.1): by how often pair i turns in L positions, r_i = L v_i / 2 pi,

        w_i = v_i                                 if r_i > high_freq_factor
        w_i = v_i / f                             if r_i < low_freq_factor
        w_i = (1 - s) v_i / f + s v_i             between,
              s = (r_i - low_freq_factor) / (high_freq_factor - low_freq_factor)

    "yarn" (Peng et al., 2023): between v_i and v_i / f by a ramp over i. The pair that
    turns r times in L positions would have the index c(r), from r = L W^(-2c/d) / 2 pi:

        c(r) = d ln(L / (2 pi r)) / (2 ln W)
        low  = max(floor(c(beta_fast)), 0),   high = min(ceil(c(beta_slow)), d - 1)
        g_i  = clip((i - low) / (high - low), 0, 1)
        w_i  = g_i v_i / f + (1 - g_i) v_i

    without floor and ceil if truncate is false; where high = low, high is 0.001 more.
    m = attention_factor if it is given; else M(mscale) / M(mscale_all_dim) if both are;
    else M(1), with M(k) = 0.1 k ln f + 1, and 1 for f <= 1. In all others m = 1.
    """
    i = np.arange(dim // 2)
    plain = max_wavelength ** (-2.0 * i / dim)
    scaling = scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return plain, 1.0

    factor = scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0

    original = scaling["original_max_position_embeddings"]
    if kind == "dynamic":
        if length <= original or dim == 2:  # the only pair turns by 1 at any base
            return plain, 1.0
        stretch = factor * length / original - (factor - 1)
        base = max_wavelength * stretch ** (dim / (dim - 2))
        return base ** (-2.0 * i / dim), 1.0

    if kind == "llama3":
        few, many = scaling["low_freq_factor"], scaling["high_freq_factor"]
        frequencies = np.zeros(dim // 2)
        for pair in i:
            turns = original * plain[pair] / (2 * np.pi)
            # 0 up to `few` turns, 1 from `many` on.
            kept = min(max((turns - few) / (many - few), 0.0), 1.0)
            frequencies[pair] = kept * plain[pair] + (1 - kept) * plain[pair] / factor
        return frequencies, 1.0

    assert kind == "yarn", kind

    def pair_that_turns(times: float) -> float:
        ratio = original / (2 * np.pi * times)
        return dim * np.log(ratio) / (2 * np.log(max_wavelength))

    low = pair_that_turns(scaling.get("beta_fast", 32))
    high = pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if high == low:
        high += 0.001
    ramp = np.clip((i - low) / (high - low), 0.0, 1.0)

    def magnitude(k: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * k * np.log(factor) + 1.0

    m = scaling.get("attention_factor")
    if m is None:
        k, k_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        m = magnitude(k) / magnitude(k_all) if k and k_all else magnitude(1)
    return ramp * plain / factor + (1 - ramp) * plain, m


def axial_rotary(
    x: Array,
    coordinates: Array,
    *,
    sections: tuple[int, ...] | None = None,
    shared_frequencies: bool = False,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    max_wavelength: float = 10_000.0,
    scaling: Mapping[str, Any] | None = None,
    lengths: Array | None = None,
) -> Array:
    """Axial rotary embedding (Heo et al., 2024; Qwen2-VL) of heads (B, T, N, H).

    A token has a coordinate on each of n axes; `coordinates` is (T, n) or (B, T, n).
    The pairs of `rotary` are dealt to the axes in blocks: the first sections[0] turn
    by the coordinate on axis 0, the next sections[1] by that on axis 1, and so on, in
    blocks of d / 2n by default. Pair i overall is pair i - s of its axis's block, which
    begins at s and has m pairs. It turns by its coordinate times

        W^(-2 (i - s) / 2m)       the axis's own frequencies
        W^(-2 i / d)              one sequence of frequencies, shared by the axes

    and scaled, by that pair of `rotary_frequencies` of 2m and of d. "dynamic" scaling
    takes for a row's length its largest coordinate + 1.
    """
    x = _float64(x)
    batch, tokens, _, width = x.shape
    dim = width if rotary_dim is None else rotary_dim
    coordinates = np.asarray(coordinates)
    axes = coordinates.shape[-1]
    coordinates = np.broadcast_to(coordinates, (batch, tokens, axes))
    if sections is None:
        sections = (dim // 2 // axes,) * axes
    if lengths is None:
        lengths = coordinates.max(axis=(1, 2)) + 1
    options = max_wavelength, scaling

    turned = x.copy()
    for b in range(batch):
        start = 0
        for axis, pairs in enumerate(sections):
            for i in range(start, start + pairs):
                if shared_frequencies:
                    all_of_them, m = rotary_frequencies(dim, *options, lengths[b])
                    frequency = all_of_them[i]
                else:
                    own, m = rotary_frequencies(2 * pairs, *options, lengths[b])
                    frequency = own[i - start]
                one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
                for t in range(tokens):
                    angle = float(coordinates[b, t, axis]) * frequency
                    cos, sin = np.cos(angle), np.sin(angle)
                    x_a, x_b = x[b, t, :, one], x[b, t, :, other]
                    turned[b, t, :, one] = m * (x_a * cos - x_b * sin)
                    turned[b, t, :, other] = m * (x_a * sin + x_b * cos)
            start += pairs
    return turned


def mixed_rotary(
    x: Array, coordinates: Array, frequencies: Array, *, interleaved: bool = False
) -> Array:
    """RoPE-Mixed (Heo et al., 2024) of heads (B, T, N, H), by all coordinates at once.

    `coordinates` is (T, n) or (B, T, n) and `frequencies` (n, K, d/2), K dividing N:
    pair i of head n, one of the pairs of `rotary`, turns by

        sum_a coordinate_a frequencies[a, n // (N / K), i]
    """
    x, frequencies = _float64(x), _float64(frequencies)
    batch, tokens, heads, _ = x.shape
    axes, groups, pairs = frequencies.shape
    coordinates = np.broadcast_to(coordinates, (batch, tokens, axes))
    turned = x.copy()
    for b, t, n, i in np.ndindex(batch, tokens, heads, pairs):
        one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        angle = coordinates[b, t] @ frequencies[:, n // (heads // groups), i]
        cos, sin = np.cos(angle), np.sin(angle)
        x_a, x_b = x[b, t, n, one], x[b, t, n, other]
        turned[b, t, n, one] = x_a * cos - x_b * sin
        turned[b, t, n, other] = x_a * sin + x_b * cos
    return turned


def grid(*sizes: int) -> Array:
    """The coordinates of a grid's points in row-major order, (T, n)."""
    return np.array(list(np.ndindex(*sizes)), dtype=int).reshape(-1, len(sizes))


def alibi_slopes(heads: int) -> Array:
    """The slopes of Press et al. (2022), (heads,).

    For a power of two: 2^(-8/n), 2^(-16/n), ..., 2^-8. For other numbers of heads those
    of the power of two below, and then every second one (the first, the third, ...) of
    the power of two above, as many as are missing.
    """
    below = 1
    while 2 * below <= heads:
        below *= 2
    slopes = [2.0 ** (-8.0 * (n + 1) / below) for n in range(below)]
    above = [2.0 ** (-8.0 * (n + 1) / (2 * below)) for n in range(2 * below)]
    return np.array(slopes + above[0::2][: heads - below])


def alibi_bias(slopes: Array, query_positions: Array, key_positions: Array) -> Array:
    """-slope_n |p_i - p_j|: (N, T, S), or (B, N, T, S) if either has a batch axis."""
    distance = np.abs(_distances(query_positions, key_positions))
    return -_float64(slopes)[:, None, None] * distance[..., None, :, :]


def grid_alibi_bias(
    slopes: Array,
    query_coordinates: Array,
    key_coordinates: Array,
    distance: str = "manhattan",
) -> Array:
    """-slope_n times the distance of two points with coordinates on several axes.

    "manhattan" (the decay of Fan et al., 2023): the sum of the distances along the
    axes; "euclidean" (Fuller et al., 2023): the root of the sum of their squares.
    Coordinates are (T, n) or (B, T, n). Returns (N, T, S) or (B, N, T, S).
    """
    along = (
        _float64(key_coordinates)[..., None, :, :]
        - _float64(query_coordinates)[..., :, None, :]
    )
    if distance == "manhattan":
        total = np.abs(along).sum(axis=-1)
    else:
        assert distance == "euclidean", distance
        total = np.sqrt((along**2).sum(axis=-1))
    return -_float64(slopes)[:, None, None] * total[..., None, :, :]


def window_rows(
    query_coordinates: Array, key_coordinates: Array, window: tuple[int, ...]
) -> Array:
    """The row of Swin's table (Liu et al., 2021) of every query and key.

    For two points of a window (h, w), at (y, x) the query and (y', x') the key, it is

        (y - y' + h - 1) (2 w - 1) + (x - x' + w - 1)

    and so on for more axes. What is farther away than h - 1 or w - 1 along an axis
    counts as that far. Coordinates are (T, n) or (B, T, n); the rows (T, S), (B, T, S).
    """
    query, key = np.asarray(query_coordinates), np.asarray(key_coordinates)
    if query.ndim == 3 or key.ndim == 3:
        batch = max(x.shape[0] for x in (query, key) if x.ndim == 3)
        sides = (np.broadcast_to(x, (batch, *x.shape[-2:])) for x in (query, key))
        return np.stack(
            [window_rows(*pair, window) for pair in zip(*sides, strict=True)]
        )
    rows = np.zeros((len(query), len(key)), dtype=int)
    for i in range(len(query)):
        for j in range(len(key)):
            for axis, size in enumerate(window):
                along = int(query[i, axis]) - int(key[j, axis])
                along = min(max(along, 1 - size), size - 1)
                rows[i, j] = rows[i, j] * (2 * size - 1) + along + size - 1
    return rows


def window_bias(
    table: Array,
    query_coordinates: Array,
    key_coordinates: Array,
    window: tuple[int, ...],
) -> Array:
    """table[row_ij, n]: (N, T, S), or (B, N, T, S) if either has a batch axis."""
    rows = window_rows(query_coordinates, key_coordinates, window)
    return np.moveaxis(_float64(table)[rows], -1, -3)


def relative_position_bucket(
    distance: int,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> int:
    """T5's bucket (Raffel et al., 2020) of distance = key position - query position.

    Bidirectional: half of the buckets, from num_buckets / 2 on, are for keys that come
    later, half for the others. One-sided: all are for keys at or before the query, and
    later ones count as distance 0. Of the m buckets of a side, the first e = m // 2
    hold the distances 0 .. e-1, one each. The others split e .. max_distance evenly on
    a logarithmic scale, and the last one holds all that is further. For n >= e:

        e + floor(ln(n / e) / ln(max_distance / e) (m - e)),   at most m - 1

    The floor is found in whole numbers: it is the largest b for which
    (n / e)^(m - e) >= (max_distance / e)^b.
    """
    m = num_buckets // 2 if bidirectional else num_buckets
    first = m if bidirectional and distance > 0 else 0
    n = abs(distance) if bidirectional else max(-distance, 0)
    e = m // 2
    if n < e:
        return first + n
    b = 0
    while e + b < m - 1 and Fraction(n, e) ** (m - e) >= Fraction(max_distance, e) ** (
        b + 1
    ):
        b += 1
    return first + e + b


def relative_position_buckets(
    query_positions: Array, key_positions: Array, **options: Any
) -> Array:
    """The bucket of every query and key, (T, S) or (B, T, S)."""
    distances = _distances(query_positions, key_positions).astype(int)
    known = {
        d: relative_position_bucket(int(d), **options) for d in set(distances.flat)
    }
    return np.vectorize(known.__getitem__, otypes=[int])(distances)


def relative_position_bias(
    table: Array, query_positions: Array, key_positions: Array, **options: Any
) -> Array:
    """table[bucket_ij, n]: (N, T, S), or (B, N, T, S) if either has a batch axis.

    `options` are those of `relative_position_bucket` but num_buckets, which is the
    number of the table's rows.
    """
    table = _float64(table)
    buckets = relative_position_buckets(
        query_positions, key_positions, num_buckets=table.shape[0], **options
    )
    return np.moveaxis(table[buckets], -1, -3)


def relative_position_table_gradient(
    bias_gradient: Array, buckets: Array, num_buckets: int
) -> Array:
    """From the gradient of the bias (B, N, T, S): its sum over each bucket's places."""
    batch, heads, queries, keys = bias_gradient.shape
    buckets = np.broadcast_to(buckets, (batch, queries, keys))
    found = np.zeros((num_buckets, heads))
    for bucket in range(num_buckets):
        for n in range(heads):
            found[bucket, n] = bias_gradient[:, n][buckets == bucket].sum()
    return found


def restarted_positions(segment_ids: Array) -> Array:
    """0, 1, 2, ... along each row of (B, T), from 0 again where the id changes."""
    segment_ids = np.asarray(segment_ids)
    positions = np.zeros(segment_ids.shape, dtype=int)
    for b in range(segment_ids.shape[0]):
        for t in range(1, segment_ids.shape[1]):
            if segment_ids[b, t] == segment_ids[b, t - 1]:
                positions[b, t] = positions[b, t - 1] + 1
    return positions


def _distances(query_positions: Array, key_positions: Array) -> Array:
    """p_j - p_i: (T, S), or (B, T, S) where either has a batch axis."""
    query_positions, key_positions = _float64(query_positions), _float64(key_positions)
    return key_positions[..., None, :] - query_positions[..., :, None]


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
    position_ids: Array | tuple[Array, Array] | None = None,
    use_causal_mask: bool = False,
) -> tuple[Array, Array]:
    """The whole layer on (B, T, D) queries, (B, S, D') values, (B, S, D'') keys.

    In this order:

        Q, K, V = query W_q + b_q, key W_k + b_k, value W_v + b_v     a head at a time
        Q, K    = qk_norm(Q), qk_norm(K)                              if asked for
        Q, K    = rotary(Q), rotary(K)                                if asked for
        K, V    = K and qk_norm(K_m), V and V_m, one after the other  if there are such
        O       = dot_product_attention(Q, K, V, ...)
        O       = O * sigmoid(query W_g + b_g)                        if asked for
        output  = O W_o + b_o                                         over heads and V

    `weights` holds "query_kernel" (D, N, H), "key_kernel" (D'', K, H), "value_kernel"
    (D', K, V), "output_kernel" (N, V, *E) and, where the layer has them,
    "query_bias" (N, H), "key_bias" (K, H), "value_bias" (K, V), "output_bias" (*E),
    "gate_kernel" (D, N, V), "gate_bias" (N, V), "query_norm" (H,), "key_norm" (H,),
    "sink" (N,), "talking_heads_pre" (N, N), "talking_heads_post" (N, N),
    "position_table" (num_buckets, N), and of learned keys and values K_m "memory_key"
    (n, K, H) and V_m "memory_value" (n, K, V), which no mask hides and to whose scores
    no bias is added. `config` holds the layer's arguments by their public names; one
    that is missing has its default. `value` None is self-attention; `key` None is
    `value`.

    `config["position"]` is plain data: {"kind": "rotary", ...} with the options of
    `rotary`; {"kind": "alibi"}; or {"kind": "relative", ...} with the options of
    `relative_position_bucket`. The biases of the last two are added to
    `attention_bias`. `position_ids` are those of `all_positions`. With an option
    "axes" above 1 they have a last axis of that many coordinates, and the options are
    those of `axial_rotary`, `grid_alibi_bias` or `window_bias`. The kind "mixed rotary"
    has those of `mixed_rotary`, and "position_frequencies" (n, K, d/2) for a weight.

    Returns the output (B, T, *E) and the scores (B, N, T, S) of the sequence's keys.
    """
    value = query if value is None else value
    key = value if key is None else key
    query, key, value = _float64(query), _float64(key), _float64(value)
    if query_mask is not None:
        # What a hidden query holds does not matter, and learned keys it sees as well.
        query = np.where(np.asarray(query_mask, dtype=bool)[..., None], query, 0.0)

    query_heads = project(query, weights["query_kernel"], weights.get("query_bias"))
    key_heads = project(key, weights["key_kernel"], weights.get("key_bias"))
    value_heads = project(value, weights["value_kernel"], weights.get("value_bias"))

    kind = config.get("qk_norm")
    epsilon = config.get("qk_norm_epsilon", 1e-6)
    query_heads = normalize(query_heads, kind, epsilon, weights.get("query_norm"))
    key_heads = normalize(key_heads, kind, epsilon, weights.get("key_norm"))

    position = dict(config.get("position") or {"kind": None})
    bias, position_kind = attention_bias, position.pop("kind")
    axes = position.pop("axes", len(position.get("window", (0,))))
    query_positions, key_positions = all_positions(
        query.shape[:2], key.shape[:2], position_ids, segment_ids, axes
    )
    if position_kind == "mixed rotary":
        position["frequencies"] = weights["position_frequencies"]
        query_heads = mixed_rotary(query_heads, query_positions, **position)
        key_heads = mixed_rotary(key_heads, key_positions, **position)
    elif position_kind == "rotary" and axes > 1:
        furthest = [p.max(axis=(1, 2)) for p in (query_positions, key_positions)]
        position["lengths"] = np.maximum(*furthest) + 1
        query_heads = axial_rotary(query_heads, query_positions, **position)
        key_heads = axial_rotary(key_heads, key_positions, **position)
    elif position_kind == "rotary":
        # Both sides turn by the same frequencies, so scores know p_j - p_i alone.
        furthest = np.maximum(query_positions.max(axis=1), key_positions.max(axis=1))
        position["lengths"] = furthest + 1
        query_heads = rotary(query_heads, query_positions, **position)
        key_heads = rotary(key_heads, key_positions, **position)
    elif position_kind is not None:
        if position_kind == "alibi":
            slopes = alibi_slopes(query_heads.shape[2])
            made = alibi_bias if axes == 1 else grid_alibi_bias
            added = made(slopes, query_positions, key_positions, **position)
        elif "window" in position:
            added = window_bias(
                weights["position_table"], query_positions, key_positions, **position
            )
        else:
            assert position_kind == "relative", position_kind
            position["table"] = weights["position_table"]
            position.pop("num_buckets", None)
            added = relative_position_bias(
                query_positions=query_positions, key_positions=key_positions, **position
            )
        bias = added if bias is None else added + _float64(bias)

    scale = config.get("scale")
    if scale is None:
        key_dim = query_heads.shape[-1]
        scale = np.sqrt(key_dim) if kind == "l2" else 1.0 / np.sqrt(key_dim)

    sink = {None: None, "zero": 0.0, "learned": weights.get("sink")}[
        config.get("attention_sink")
    ]
    mask = combined_mask(
        query.shape[1],
        key.shape[1],
        query_mask=query_mask,
        value_mask=value_mask,
        key_mask=key_mask,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        use_causal_mask=use_causal_mask,
        sliding_window=config.get("sliding_window"),
    )
    learned = config.get("num_memory_key_values") or 0
    if learned:
        memory_key = _float64(weights["memory_key"])
        memory_key = normalize(memory_key, kind, epsilon, weights.get("key_norm"))
        key_heads = behind_sequence(key_heads, memory_key)
        value_heads = behind_sequence(value_heads, _float64(weights["memory_value"]))
        shape = np.broadcast_shapes(mask.shape, (1, 1, 1, key.shape[1]))
        never_hidden = np.ones((*shape[:-1], learned), dtype=bool)
        mask = np.concatenate([np.broadcast_to(mask, shape), never_hidden], axis=-1)
        if bias is not None:
            shape = np.broadcast_shapes(np.shape(bias), (key.shape[1],))
            bias = np.concatenate(
                [np.broadcast_to(bias, shape), np.zeros((*shape[:-1], learned))],
                axis=-1,
            )

    output, scores = dot_product_attention(
        query_heads,
        key_heads,
        value_heads,
        mask=mask,
        bias=bias,
        scale=scale,
        logit_soft_cap=config.get("logit_soft_cap"),
        sink=sink,
        talking_heads=tuple(weights.get(f"talking_heads_{x}") for x in ("pre", "post")),
    )
    scores = scores[..., : key.shape[1]]
    if config.get("use_gate"):
        gate = project(query, weights["gate_kernel"], weights.get("gate_bias"))
        output = output / (1.0 + np.exp(-gate))

    kernel = _float64(weights["output_kernel"])
    # (B, T, N, V) x (N, V, *E) -> (B, T, *E)
    output = np.tensordot(output, kernel, axes=2)
    if weights.get("output_bias") is not None:
        output = output + _float64(weights["output_bias"])
    return output, scores


def behind_sequence(heads: Array, learned: Array) -> Array:
    """(B, S, K, H) and (n, K, H), the same for every row, -> (B, S + n, K, H)."""
    return np.stack([np.concatenate([row, learned]) for row in heads])


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


def all_positions(
    query_shape: tuple[int, int],
    key_shape: tuple[int, int],
    position_ids: Array | tuple[Array, Array] | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    axes: int = 1,
) -> tuple[Array, Array]:
    """The positions of the queries (B, T) and of the keys (B, S).

    `position_ids` if given, one array for both or a pair, each (T,) or (B, T); else
    counted anew from 0 in every segment; else 0..T-1 and 0..S-1. With several axes they
    must be given and have one more axis, of the coordinates.
    """
    if axes > 1:
        pair = position_ids if isinstance(position_ids, tuple) else (position_ids,) * 2
        return tuple(
            np.broadcast_to(ids, (*shape, axes))
            for ids, shape in zip(pair, (query_shape, key_shape), strict=True)
        )
    found = []
    for side, shape in enumerate((query_shape, key_shape)):
        if position_ids is not None:
            pair = isinstance(position_ids, tuple)
            positions = np.asarray(position_ids[side] if pair else position_ids)
        elif segment_ids is not None:
            pair = isinstance(segment_ids, tuple)
            positions = restarted_positions(segment_ids[side] if pair else segment_ids)
        else:
            positions = np.arange(shape[1])
        found.append(np.broadcast_to(positions, shape))
    return found[0], found[1]


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
