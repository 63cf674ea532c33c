"""The tiles of the score matrix: logits with what is added to them, and dropout."""

import math
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_mha._keras import Tensor
from keras_mha.biases import Bias, least_distance
from keras_mha.kernels import dropout
from keras_mha.kernels.half_products import as_operand, factors_of_scale, times
from keras_mha.kernels.masking import LOWEST, mask_block
from keras_mha.kernels.parts import join_tensors
from keras_mha.kernels.problem import Problem
from keras_mha.kernels.walk import Place, Walk
from keras_mha.masks import whole_tile


class TileScores:
    """The tiles of the score matrix, as forward and backward pass both need them."""

    def __init__(self, problem: Problem, tensors: dict[str, Any]):
        self.problem, self.tensors = problem, tensors
        mask = join_tensors(problem.mask, tensors["mask"])
        self.position_weights = tuple(
            name for name in problem.position_tensors if name in problem.differentiable
        )
        query, key = tensors["query"], tensors["key"]
        self.walk = Walk(
            *(query, key, mask, problem.groups_at_once, problem.tile),
            keeps_halves=problem.half_products,
        )
        # Of no row: what is asked is the type of an operand.
        operand = as_operand(query[:0], problem.device)
        self.factors_of_scale = factors_of_scale(problem.scale, operand)

    def query(self, row: Place) -> Tensor:
        """Returns the rows' query, as rows of width H, with part of the scale."""
        query = self.walk.cut_rows(self.tensors["query"], row)
        return query * self.factors_of_scale[0]

    def scaled(self, products: Tensor) -> Tensor:
        """Returns products of the query, or their gradients, with their part of it."""
        return times(products, self.factors_of_scale[1])

    def logits(
        self, query: Tensor, place: Place, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns a tile of logits, `(*lead, G, rows, columns)`, minus infinity where
        masked, and the soft cap's derivative (`None` without a cap)."""
        walk, slope = self.walk, None
        key = walk.cut_columns(self.tensors["key"], place)
        logits = self.scaled(walk.backend.scores(query, key))
        if (cap := self.problem.logit_soft_cap) is not None:
            capped = ops.tanh(logits / cap)
            logits, slope = cap * capped, 1.0 - capped * capped
        has_position_bias = self.problem.position_bias is not None
        if allowed is None and "bias" not in self.tensors and not has_position_bias:
            return logits, slope
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
        # A graph may not know of what was added that it broadcasts.
        return ops.reshape(logits, walk.scores_shape), slope

    def _position_bias(self, place: Place, **weights: Tensor) -> Tensor:
        """Returns a tile of the position's bias, with these weights in it if given."""
        bias = self._position_bias_object(**weights)
        return ops.cast(self.walk.bias_block(bias, place), self.walk.dtype)

    def _position_bias_object(self, **weights: Tensor) -> Bias:
        names = self.problem.position_tensors
        held = tuple(weights.get(name, self.tensors[name]) for name in names)
        return join_tensors(self.problem.position_bias, held)

    @property
    def has_bias_that_falls(self) -> bool:
        """Whether all that is added to a score falls with the distance."""
        if self.problem.position_bias is None or "bias" in self.tensors:
            return False
        return self._position_bias_object().falls

    def highest_bias(self, place: Place) -> Tensor:
        """Returns what the bias is not above from a tile on, `(1, key heads, G, 1)`,
        where `has_bias_that_falls`."""
        bias, tile = self._position_bias_object(), self.walk.tile_of_heads(place)
        highest = bias.of_distances(least_distance(tile)[None], tile)
        highest = ops.reshape(highest, (1, -1, self.walk.shared, 1))
        return ops.cast(highest, self.walk.dtype)

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
        """Returns all logits with their biases, and which of them are seen, those that
        are not so low that no softmax sees them."""
        walk = self.walk
        tile = whole_tile(walk.rows.length, walk.columns.length)
        if "bias" in self.tensors:
            logits = logits + ops.cast(self.tensors["bias"], walk.dtype)
        if self.problem.position_bias is not None:
            block = self._position_bias_object().block(tile)
            block = walk.block_by_head(block, tile, place)
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
        return lambda weights: walk.backend.keep(weights, kept)
