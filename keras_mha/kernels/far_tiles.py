"""Tiles that are too far away to matter, where a bias falls with the distance.

By Cauchy and Schwarz no logit of a row is, in a tile, above

    bound_i = |scale| |q_i| max_j |k_j| + max_j bias[i, j],

and a row's largest is no less than the largest found so far. Where

    bound_i < largest_i + log(1e-30),

no weight that the row has in that tile is more than 1e-30 of its largest. (In the
gradient the row's lse stands for its largest, and their sum for the largest weight.)
The tiles of some rows are visited from the nearest on, up to the first in which that is
so for every row. With ALiBi those from some distance on are left out, the sooner the
steeper the head. Where queries or keys are not finite nothing is.

References:
    Press et al., 2022, Train short, test long: https://arxiv.org/abs/2108.12409
"""

import math
from collections.abc import Callable

from keras import ops

from keras_mha._keras import Tensor, at_least_float32
from keras_mha.kernels.tile_scores import TileScores
from keras_mha.kernels.walk import Place

NEGLIGIBLE = math.log(1e-30)
ROUNDING = 1e-3  # The bound is raised by this share, more than products are rounded.


class FarTiles:
    """Says up to which tile they matter."""

    def __init__(self, scores: TileScores):
        self._scores, self._longest = scores, None
        # Other devices take all heads at once, and the flattest sees far.
        if scores.problem.device == "cpu" and scores.has_bias_that_falls:
            lengths = _norm(at_least_float32(scores.tensors["key"]), 2)
            longest = ops.max(lengths, axis=-1, keepdims=True)
            # A maximum may not tell of what is no number; a comparison does.
            are_numbers = ops.all(lengths <= longest, axis=-1, keepdims=True)
            infinite = ops.full_like(longest, math.inf)
            self._longest = ops.where(are_numbers, longest, infinite)  # (B, K, 1)

    def goes_on(
        self, query: Tensor, row: Place
    ) -> Callable[[Place, Tensor], Tensor] | None:
        """Returns what says whether a tile of some rows may matter; `None` if all may.

        Args:
            query: The rows' query, as `TileScores.query` returns it.
            row: Where they are.

        Returns:
            A function of the tile's place and of what no row's largest logit is below,
            shape `(*lead, G, rows)`, which returns a boolean.
        """
        if self._longest is None:
            return None
        scores, walk = self._scores, self._scores.walk
        factor = abs(scores.factors_of_scale[1]) * (1.0 + ROUNDING)
        longest = walk.cut_key_heads(self._longest, row)[..., None]
        products = _norm(query, walk.features) * (longest * factor)
        if (cap := scores.problem.logit_soft_cap) is not None:
            are_finite = products < math.inf
            products = ops.where(are_finite, ops.minimum(products, cap), products)
        repeated = walk.repeated_rows(row)

        def may_matter(place: Place, largest: Tensor) -> Tensor:
            is_far = products + scores.highest_bias(place) < largest + NEGLIGIBLE
            if repeated is not None:
                is_far = ops.logical_or(is_far, repeated)
            return ops.logical_not(ops.all(is_far))

        return may_matter


def _norm(x, axis):
    return ops.sqrt(ops.sum(ops.square(x), axis=axis))
