"""Attention in tiles with a running softmax: memory linear in the sequence length.

The scores are worked out tile by tile and never kept. Going through the tiles of a row,

    top'   = max(top, max(logits))                      the largest logit so far
    total' = total * exp(top - top') + sum(exp(logits - top'))
    sums'  = sums * exp(top - top') + dropout(exp(logits - top')) . value

and at its end `output = sums / total`. What is kept for the gradient is the output and
one number a row, `lse = top + log(total)`, which brings the weights of any tile back:

    weights  = exp(logits - lse)
    d_value  = dropout(weights) . d_output
    d_logits = weights * (dropout(d_output . value) - d_output . output)

Tiles that the mask empties are not computed: those of which it says so beforehand
(`Mask.status`), and those of which its booleans turn out to be all `False`; nor are
those that a bias puts so low that they do not matter (`far_tiles`). Half types
are cast tile by tile; everything is computed in float32 (or float64). What is written
here are first derivatives: all others are those of the formula, with all scores
(`whole`).

References:
    Rabe and Staats, 2021, Self-attention does not need O(n^2) memory:
        https://arxiv.org/abs/2112.05682
    Dao et al., 2022, FlashAttention: https://arxiv.org/abs/2205.14135
    Milakov and Gimelshein, 2018, Online normalizer calculation for softmax:
        https://arxiv.org/abs/1805.02867
"""

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from keras import ops

from keras_mha._keras import Tensor, at_least_float32, dtype_name, larger
from keras_mha.kernels import backends
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.far_tiles import FarTiles
from keras_mha.kernels.half_products import times
from keras_mha.kernels.masking import LOWEST
from keras_mha.kernels.problem import (
    MIXES_HEADS,
    Problem,
    positions_first,
    prepared,
    undivided,
)
from keras_mha.kernels.thresholds import few_scores
from keras_mha.kernels.tile_scores import TileScores
from keras_mha.kernels.walk import Place
from keras_mha.kernels.whole import whole

# The largest logit of a row that has none yet: a little above what masks, so that the
# exponential of what is masked is 0 against it.
_NO_LOGIT = 0.999 * LOWEST


def refusal(call: AttentionCall) -> str | None:
    """Returns why tiles cannot run this call, or `None` if they can."""
    return MIXES_HEADS if call.mixes_heads else undivided(call)


def attend(call: AttentionCall) -> Attended:
    """Runs one call of attention."""
    problem, tensors = prepared(call)
    output = backends.current().with_gradient(
        forward, backward, whole, problem, tensors
    )
    return Attended(positions_first(output))


def _by_length(
    function: Callable, problem: Problem, tensors: dict, *others: Any
) -> Any:
    """Runs `function`, in one tile where lengths not known yet turn out to be short."""
    backend = backends.current()
    rows, columns = ops.shape(tensors["query"])[4], ops.shape(tensors["key"])[3]
    if isinstance(rows, int) and isinstance(columns, int):
        return function(problem, tensors, *others)
    in_one_tile = replace(problem, groups_at_once=None, tile=None)
    most_rows = (few_scores(problem.device) - 1) // larger(columns, 1)
    return backend.either(
        rows <= most_rows,  # rows * columns might not fit into 32 bits
        lambda: function(in_one_tile, tensors, *others),
        lambda: function(problem, tensors, *others),
    )


def forward(problem: Problem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        problem: What is to be computed.
        tensors: `"query"` of shape `(B, K, H, G, T)`, `"key"` `(B, K, H, S)`, `"value"`
            `(B, K, V, S)`, `"mask"` (a tuple), and where there are such `"bias"`
            `(B, K, G, T, S)` with lengths of 1 that broadcast, `"sink"` `(K, G)`,
            `"seed"` `(2,)` and what the position's bias holds.

    Returns:
        The output, shape `(B, K, V, G, T)`, and the logarithm of each row's sum of
        exponentials, shape `(B, K, 1, G, T)`, infinite where a row sees nothing.
    """
    return _by_length(_forward, problem, tensors)


def _forward(problem, tensors):
    scores = TileScores(problem, tensors)
    far = FarTiles(scores)
    walk, width = scores.walk, tensors["value"].shape[2]

    def visit_row(row, results):
        outputs, norms = results
        output, lse = _attend_rows(scores, far, row)
        output = ops.cast(output, dtype_name(tensors["query"]))
        return walk.put_rows(outputs, row, output), walk.put_rows(norms, row, lse)

    outputs, norms = walk.for_each_row(
        visit_row,
        (
            walk.row_tiles(width, dtype_name(tensors["query"])),
            walk.row_tiles(1, walk.dtype),
        ),
    )
    return walk.joined_rows(outputs), walk.joined_rows(norms)


def _attend_rows(
    scores: TileScores, far: FarTiles, row: Place
) -> tuple[Tensor, Tensor]:
    """Returns the output and the lse, as rows of width V and 1."""
    walk, tensors = scores.walk, scores.tensors
    query = scores.query(row)

    def step(place, allowed, state):
        top, total, sums = state
        logits, _ = scores.logits(query, place, allowed)
        new_top = larger(top, walk.backend.row_max(logits))
        weights = walk.backend.exp_minus(logits, new_top)
        shrink = ops.exp(top - new_top)
        total = total * shrink + ops.sum(weights, axis=-1)
        value = walk.cut_columns(tensors["value"], place)
        new = walk.backend.to_rows(scores.dropped(place)(weights), value)
        return new_top, total, sums * walk.beside_rows(shrink) + new

    per_row = (*walk.lead, walk.shared, walk.rows.size)
    state = (
        ops.full(per_row, _NO_LOGIT, dtype=walk.dtype),
        ops.zeros(per_row, dtype=walk.dtype),
        walk.new_rows(tensors["value"].shape[2]),
    )
    may_matter = far.goes_on(query, row)
    goes_on = may_matter and (lambda place, state: may_matter(place, state[0]))
    top, total, sums = walk.for_each_tile(row, step, state, goes_on)
    if "sink" in tensors:
        sink = walk.cut_heads(tensors["sink"], row)
        new_top = larger(top, sink)
        shrink = ops.exp(top - new_top)
        total = total * shrink + ops.exp(sink - new_top)
        top, sums = new_top, sums * walk.beside_rows(shrink)
    seen = total > 0
    total = ops.where(seen, total, 1.0)
    kept = total * (1.0 - scores.problem.dropout)
    lse = ops.where(seen, top + ops.log(total), math.inf)
    return sums / walk.beside_rows(kept), walk.beside_rows(lse)


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
    return _by_length(_backward, problem, tensors, output, lse, d_output)


def _backward(problem, tensors, output, lse, d_output):
    dtype = dtype_name(at_least_float32(tensors["query"][:0]))
    # What the softmax takes from every logit's gradient, one number a row.
    share = ops.cast(d_output, dtype) * ops.cast(output, dtype)
    share = ops.sum(share, axis=2, keepdims=True)
    tensors = tensors | {"lse": lse, "d_output": d_output, "share": share}
    scores = TileScores(problem, tensors)
    far = FarTiles(scores)
    walk = scores.walk

    def visit_row(row, results):
        d_queries, *others = results
        d_query, *others = _differentiate_rows(scores, far, row, others)
        d_query = d_query * scores.factors_of_scale[0]
        return walk.put_rows(d_queries, row, d_query), *others

    results = (
        walk.row_tiles(tensors["query"].shape[2], dtype),
        walk.column_tiles(tensors["key"].shape[2], dtype),
        walk.column_tiles(tensors["value"].shape[2], dtype),
    )
    if "bias" in problem.differentiable:
        results += (walk.score_tiles(tensors["bias"], dtype),)
    results += tuple(
        ops.zeros(ops.shape(tensors[name]), dtype) for name in scores.position_weights
    )
    results = walk.for_each_row(visit_row, results)
    found = {
        "query": walk.joined_rows(results[0]),
        "key": walk.joined_columns(results[1]),
        "value": walk.joined_columns(results[2]),
    }
    if "bias" in problem.differentiable:
        found["bias"] = walk.joined_scores(results[3], tensors["bias"])
    if scores.position_weights:
        position_gradients = results[-len(scores.position_weights) :]
        found |= zip(scores.position_weights, position_gradients, strict=True)
    if "sink" in problem.differentiable:
        weights = ops.exp(ops.cast(tensors["sink"], dtype)[:, None, :, None] - lse)
        found["sink"] = -ops.sum(weights * share, axis=(0, 2, 4))
    return {
        name: ops.cast(found[name], dtype_name(tensors[name]))
        for name in problem.differentiable
    }


def _differentiate_rows(
    scores: TileScores, far: FarTiles, row: Place, results: list
) -> tuple:
    """Returns the rows' gradient of the scaled query, as rows of width H, and the
    results with what these rows add to the gradients of key, value and biases."""
    walk, tensors, backend = scores.walk, scores.tensors, scores.walk.backend
    query = scores.query(row)
    early, late = scores.problem.kept_factors
    d_output = times(walk.cut_rows(tensors["d_output"], row), early)
    lse = walk.cut_numbers(tensors["lse"], row)
    share = walk.cut_numbers(tensors["share"], row)[..., None]

    def step(place, allowed):
        key = walk.cut_columns(tensors["key"], place)
        value = walk.cut_columns(tensors["value"], place)
        logits, slope = scores.logits(query, place, allowed)
        weights = backend.exp_minus(logits, lse)
        dropped = scores.dropped(place)
        d_value = times(backend.to_columns(dropped(weights), d_output), late)
        d_weights = times(backend.scores(d_output, value), late)
        d_logits = weights * (dropped(d_weights) - share)
        d_bias = ()
        if "bias" in scores.problem.differentiable:
            d_bias = (walk.summed_scores(d_logits, tensors["bias"]),)
        d_bias += scores.position_gradients(place, d_logits)
        d_scores = scores.scaled(d_logits if slope is None else d_logits * slope)
        d_query = backend.to_rows(d_scores, key)
        return d_query, backend.to_columns(d_scores, query), d_value, *d_bias

    def add(place, sums, parts):
        d_query, d_key, d_value, *d_bias = parts
        new = (
            sums[0] + d_query,
            walk.add_columns(sums[1], place, d_key),
            walk.add_columns(sums[2], place, d_value),
        )
        if "bias" in scores.problem.differentiable:
            new += (walk.add_scores(sums[3], place, d_bias[0], tensors["bias"]),)
        # Of the position's bias there are few weights, which every tile adds to.
        done = len(new)
        return new + tuple(map(operator.add, sums[done:], d_bias[done - 3 :]))

    def visit_tile(place, allowed, sums):
        return add(place, sums, step(place, allowed))

    may_matter = far.goes_on(query, row)
    goes_on = may_matter and (lambda place, sums: may_matter(place, lse))
    zeros = ops.zeros_like(query, dtype=walk.dtype)
    return walk.for_each_tile(row, visit_tile, (zeros, *results), goes_on)
