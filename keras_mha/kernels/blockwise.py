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
(`Mask.status`), and those of which its booleans turn out to be all `False`. Half types
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
from dataclasses import dataclass, replace
from typing import Any

from keras import ops

from keras_mha._keras import Tensor, at_least_float32, dtype_name, is_float, larger
from keras_mha._lengths import unless_one
from keras_mha.kernels import backends, dropout, tiling
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.masking import LOWEST, mask_block
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.kernels.walk import Place, Walk
from keras_mha.masks import whole_tile

# The largest logit of a row that has none yet: a little above what masks, so that the
# exponential of what is masked is 0 against it.
_NO_LOGIT = 0.999 * LOWEST


@dataclass(frozen=True)
class Problem:
    """What of a call is no tensor. Equal problems can share a compiled program.

    Args:
        scale: Factor of the dot products.
        logit_soft_cap: As in `AttentionCall`.
        dropout: Share of the attention weights to drop, less than 1.
        mask: The mask without its tensors.
        position_bias: The bias object without its tensors.
        position_tensors: Names of the tensors that it holds, in order.
        differentiable: Names of the tensors that have gradients.
        groups_at_once: As in `Walk`.
        tile: As in `Walk`.
    """

    scale: float
    logit_soft_cap: float | None
    dropout: float
    mask: Any
    position_bias: Any
    position_tensors: tuple[str, ...]
    differentiable: tuple[str, ...]
    groups_at_once: int | None
    tile: int | None


def refusal(call: AttentionCall) -> str | None:
    """Returns why tiles cannot run this call, or `None` if they can."""
    if call.return_scores:
        return "only the reference can return the scores"
    if call.dropout == 1:
        return "dropout=1 leaves nothing to be computed in tiles"
    if 0 in call.scores_shape:
        return "there are no scores"
    lengths = call.scores_shape[2:]
    is_length = backends.current().is_length
    if not all(length is None or is_length(length) for length in lengths):
        return "tiles need lengths that are numbers, which an exported program has not"
    return None


def attend(call: AttentionCall) -> tuple[Tensor, None]:
    """Runs one call of attention.

    Returns:
        The output, shape `(B, T, N, V)`, and `None`: there are no scores to return.
    """
    batch, rows, heads, _ = ops.shape(call.query)
    shape = (batch, rows, heads, call.value.shape[3])
    problem, tensors = _prepared(call)
    output = backends.current().with_gradient(
        forward, backward, whole, problem, tensors
    )
    output = ops.transpose(output, (0, 4, 1, 3, 2))  # (B, T, K, G, V)
    return ops.reshape(output, shape), None


def _prepared(call: AttentionCall) -> tuple[Problem, dict[str, Any]]:
    batch, rows, heads, width = ops.shape(call.query)
    groups = call.key.shape[2]
    shared = heads // groups
    query = ops.reshape(call.query, (batch, rows, groups, shared, width))
    tensors = {
        "query": ops.transpose(query, (0, 2, 4, 3, 1)),
        "key": ops.transpose(call.key, (0, 2, 3, 1)),
        "value": ops.transpose(call.value, (0, 2, 3, 1)),
    }
    if call.bias is not None:
        shape = ops.shape(call.bias)
        by_head = (unless_one(shape[1], groups), unless_one(shape[1], shared))
        tensors["bias"] = ops.reshape(call.bias, (shape[0], *by_head, *shape[2:]))
    if call.sink is not None:
        sink = ops.broadcast_to(call.sink, (heads,))
        tensors["sink"] = ops.reshape(sink, (groups, shared))
    position_bias, held = split_tensors(call.position_bias)
    held = {f"position_bias_{i}": tensor for i, tensor in enumerate(held)}
    differentiable = tuple(name for name, x in (tensors | held).items() if is_float(x))
    tensors |= held
    if call.dropout:
        tensors["seed"] = dropout.seed_of(call)
    mask, tensors["mask"] = split_tensors(call.mask)
    problem = Problem(
        scale=call.scale,
        logit_soft_cap=call.logit_soft_cap,
        dropout=call.dropout,
        mask=mask,
        position_bias=None if call.position_bias is None else position_bias,
        position_tensors=tuple(held),
        differentiable=differentiable,
        groups_at_once=_groups_at_once(call),
        tile=tiling.TILE,
    )
    return problem, tensors


def _groups_at_once(call: AttentionCall) -> int | None:
    """A CPU wants a tile that fits its cache, others as much work as they can get."""
    backend = backends.current()
    if not backend.on_cpu(call.query):
        return None
    heads, groups = call.query.shape[2], call.key.shape[2]
    most = max(backend.HEADS_PER_TILE * groups // heads, 1)
    return max(n for n in range(1, most + 1) if groups % n == 0)


def _by_length(
    function: Callable, problem: Problem, tensors: dict, *others: Any
) -> Any:
    """Runs `function`, in one tile where lengths not known yet turn out to be short."""
    backend = backends.current()
    rows, columns = ops.shape(tensors["query"])[4], ops.shape(tensors["key"])[3]
    if isinstance(rows, int) and isinstance(columns, int):
        return function(problem, tensors, *others)
    whole = replace(problem, groups_at_once=None, tile=None)
    most_rows = (backend.FEW_SCORES - 1) // larger(columns, 1)
    return backend.either(
        rows <= most_rows,  # rows * columns might not fit into 32 bits
        lambda: function(whole, tensors, *others),
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
    scores = _Scores(problem, tensors)
    walk, width = scores.walk, tensors["value"].shape[2]

    def visit_row(row, results):
        outputs, norms = results
        output, lse = _attend_rows(scores, row)
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


def _attend_rows(scores: "_Scores", row: Place) -> tuple[Tensor, Tensor]:
    """Returns the output `(heads, V, G * rows)` and lse `(heads, 1, G * rows)`."""
    walk, tensors = scores.walk, scores.tensors
    query = walk.cut_rows(tensors["query"], row) * scores.problem.scale

    def step(place, allowed, state):
        top, total, sums = state
        logits, _ = scores.logits(query, place, allowed)
        new_top = larger(top, walk.backend.row_max(logits))
        weights = walk.backend.exp_minus(logits, new_top)
        shrink = ops.exp(top - new_top)
        total = total * shrink + ops.sum(weights, axis=-1)
        value = walk.cut_columns(tensors["value"], place)
        new = walk.backend.to_rows(scores.dropped(place)(weights), value)
        return new_top, total, sums * shrink[:, None] + new

    shape = (walk.folded, walk.all_rows)
    state = (
        ops.full(shape, _NO_LOGIT, dtype=walk.dtype),
        ops.zeros(shape, dtype=walk.dtype),
        ops.zeros((shape[0], tensors["value"].shape[2], shape[1]), dtype=walk.dtype),
    )
    top, total, sums = walk.for_each_tile(row, step, state)
    if "sink" in tensors:
        sink = walk.cut_heads(tensors["sink"], row)
        new_top = larger(top, sink)
        shrink = ops.exp(top - new_top)
        total = total * shrink + ops.exp(sink - new_top)
        top, sums = new_top, sums * shrink[:, None]
    seen = total > 0
    total = ops.where(seen, total, 1.0)
    output = sums / (total * (1.0 - scores.problem.dropout))[:, None]
    return output, ops.where(seen, top + ops.log(total), math.inf)[:, None]


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
    d_output = ops.cast(d_output, dtype)
    # What the softmax takes from every logit's gradient, one number a row.
    share = ops.sum(d_output * ops.cast(output, dtype), axis=2, keepdims=True)
    tensors = tensors | {"lse": lse, "d_output": d_output, "share": share}
    scores = _Scores(problem, tensors)
    walk = scores.walk

    def visit_row(row, results):
        d_queries, *others = results
        d_query, *others = _differentiate_rows(scores, row, others)
        return walk.put_rows(d_queries, row, d_query * problem.scale), *others

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


def _differentiate_rows(scores: "_Scores", row: Place, results: list) -> tuple:
    """Returns the rows' gradient of the scaled query, `(heads, H, G * rows)`, and the
    results with what these rows add to the gradients of key, value and biases."""
    walk, tensors, backend = scores.walk, scores.tensors, scores.walk.backend
    query = walk.cut_rows(tensors["query"], row) * scores.problem.scale
    d_output = walk.cut_rows(tensors["d_output"], row)
    kept_d_output = d_output / (1.0 - scores.problem.dropout)
    lse = walk.cut_rows(tensors["lse"], row)[:, 0]
    share = walk.cut_rows(tensors["share"], row)[:, 0, :, None]

    def step(place, allowed):
        key = walk.cut_columns(tensors["key"], place)
        value = walk.cut_columns(tensors["value"], place)
        logits, slope = scores.logits(query, place, allowed)
        weights = backend.exp_minus(logits, lse)
        dropped = scores.dropped(place)
        d_value = backend.to_columns(dropped(weights), kept_d_output)
        d_weights = backend.scores(kept_d_output, value)
        d_logits = weights * (dropped(d_weights) - share)
        d_bias = ()
        if "bias" in scores.problem.differentiable:
            d_bias = (walk.summed_scores(d_logits, tensors["bias"]),)
        d_bias += scores.position_gradients(place, d_logits)
        d_scores = d_logits if slope is None else d_logits * slope
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

    return walk.for_each_tile(row, visit_tile, (ops.zeros_like(query), *results))


def whole(problem: Problem, tensors: dict[str, Any]) -> Tensor:
    """Attends with all scores at once, by operations that have every derivative.

    The same weights are dropped as in tiles.

    Args:
        problem: As of `forward`.
        tensors: As of `forward`.

    Returns:
        The output, shape `(B, K, V, G, T)`.
    """
    # Nothing is cut here: in XLA's programs of TensorFlow, the gradient of a piece that
    # was cut out has no gradient.
    scores = _Scores(replace(problem, groups_at_once=None, tile=None), tensors)
    walk, place = (
        scores.walk,
        Place(chunk=0, batch=0, group=0, i=0, row=0, j=0, column=0),
    )
    query, key, value = (_folded(tensors[name]) for name in ("query", "key", "value"))
    logits = walk.backend.scores(query * problem.scale, key)
    if problem.logit_soft_cap is not None:
        logits = problem.logit_soft_cap * ops.tanh(logits / problem.logit_soft_cap)
    logits = walk.by_head(logits)
    logits, seen = scores.whole(logits, place)
    if "sink" in tensors:
        sink = ops.cast(tensors["sink"], walk.dtype)[None, :, :, None, None]
        sink = ops.broadcast_to(sink, ops.shape(logits[..., :1]))
        logits = ops.concatenate([logits, sink], axis=-1)
    # As a tuple where there is one key: of an int, Keras would warn.
    weights = ops.softmax(logits, axis=(4,) if logits.shape[4] == 1 else -1)
    weights = weights[..., : ops.shape(seen)[4]] / (1.0 - problem.dropout)
    weights = walk.folded_scores(ops.where(seen, weights, ops.cast(0.0, walk.dtype)))
    output = walk.backend.to_rows(scores.dropped(place)(weights), value)
    batch, groups, _, shared, rows = ops.shape(tensors["query"])
    output = ops.reshape(output, (batch, groups, ops.shape(value)[1], shared, rows))
    return ops.cast(output, dtype_name(tensors["query"]))


def _folded(x: Tensor) -> Tensor:
    """Returns all of a tensor as `Walk` cuts it, in float32 at least."""
    batch, groups, width, *positions = ops.shape(x)
    x = ops.reshape(x, (batch * groups, width, math.prod(positions)))
    return at_least_float32(x)


class _Scores:
    """The tiles of the score matrix, as forward and backward pass both need them."""

    def __init__(self, problem: Problem, tensors: dict[str, Any]):
        self.problem, self.tensors = problem, tensors
        mask = join_tensors(problem.mask, tensors["mask"])
        self.position_weights = tuple(
            name for name in problem.position_tensors if name in problem.differentiable
        )
        query, key = tensors["query"], tensors["key"]
        self.walk = Walk(query, key, mask, problem.groups_at_once, problem.tile)

    def logits(
        self, query: Tensor, place: Place, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns a tile of logits, `(heads, G * rows, columns)`, minus infinity where
        masked, and the soft cap's derivative (`None` without a cap)."""
        walk, slope = self.walk, None
        key = walk.cut_columns(self.tensors["key"], place)
        logits = walk.backend.scores(query, key)
        if (cap := self.problem.logit_soft_cap) is not None:
            capped = ops.tanh(logits / cap)
            logits, slope = cap * capped, 1.0 - capped * capped
        has_position_bias = self.problem.position_bias is not None
        if allowed is None and "bias" not in self.tensors and not has_position_bias:
            return logits, slope
        logits = walk.by_head(logits)
        if "bias" in self.tensors:
            bias = walk.cut_scores(self.tensors["bias"], place)
            logits = logits + ops.cast(bias, walk.dtype)
        if has_position_bias:
            logits = logits + self._position_bias(place)
        if allowed is not None:
            # Added, not chosen by: the small tile is made once for all heads.
            logits = logits + ops.where(
                allowed, ops.cast(0.0, walk.dtype), ops.cast(-math.inf, walk.dtype)
            )
        return walk.folded_scores(logits), slope

    def _position_bias(self, place: Place, **weights: Tensor) -> Tensor:
        """Returns a tile of the position's bias, with these weights in it if given."""
        names = self.problem.position_tensors
        held = tuple(weights.get(name, self.tensors[name]) for name in names)
        bias = join_tensors(self.problem.position_bias, held)
        return ops.cast(self.walk.bias_block(bias, place), self.walk.dtype)

    def position_gradients(self, place: Place, d_logits: Tensor) -> tuple[Tensor, ...]:
        """Returns what a tile adds to the gradients of `position_weights`."""
        names, walk = self.position_weights, self.walk
        if not names:
            return ()
        gradients = walk.backend.pull_back(
            lambda *weights: self._position_bias(
                place, **dict(zip(names, weights, strict=True))
            ),
            tuple(self.tensors[name] for name in names),
            lambda block: walk.summed_like(d_logits, block),
        )
        return tuple(ops.cast(gradient, walk.dtype) for gradient in gradients)

    def whole(self, logits: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Returns all logits by head with their biases, and which of them are seen,
        those that are not so low that no softmax sees them."""
        walk = self.walk
        tile = whole_tile(walk.rows.length, walk.columns.length)
        if "bias" in self.tensors:
            logits = logits + ops.cast(self.tensors["bias"], walk.dtype)
        if self.problem.position_bias is not None:
            held = tuple(self.tensors[name] for name in self.problem.position_tensors)
            bias = join_tensors(self.problem.position_bias, held)
            block = walk.block_by_head(bias.block(tile), tile, place)
            logits = logits + ops.cast(block, walk.dtype)
        seen = logits > LOWEST
        if walk.mask is not None:
            heads = walk.groups * walk.shared
            block = mask_block(walk.mask, tile, walk.static_batch, heads)
            seen = ops.logical_and(seen, walk.block_by_head(block, tile, place))
        return ops.where(seen, logits, ops.cast(LOWEST, walk.dtype)), seen

    def dropped(self, place: Place) -> Callable[[Tensor], Tensor]:
        """Returns what drops weights of a tile, without scaling up the rest."""
        if not self.problem.dropout:
            return lambda weights: weights
        walk = self.walk
        kept = dropout.kept(
            self.tensors["seed"],
            self.problem.dropout,
            walk.head_index(place),
            walk.tile(place),
        )
        kept = walk.folded_scores(kept)
        return lambda weights: walk.backend.keep(weights, kept)
