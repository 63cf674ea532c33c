"""Who may attend to whom in a call: its mask and its bias together."""

from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Tensor, at_least_float32, dtype_name
from keras_mha._lengths import shape_of
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import Mask, Tile, whole_tile

# A bias of this or less masks, as minus infinity does: what is left of such a score in
# float32 is the bias alone. Far below any score, and finite, so that inf - inf is never
# computed.
LOWEST = -1e30


def whole(call: AttentionCall) -> Tile:
    """Returns the tile of all scores of a call."""
    return whole_tile(shape_of(call.query)[1], shape_of(call.key)[1])


def bias_block(call: AttentionCall, tile: Tile) -> Tensor | None:
    """Returns all that is added to a tile of the scaled scores, or `None`.

    Its numbers broadcast to `(B, N, rows, columns)`.
    """
    bias = call.bias
    if bias is not None:
        bias = tile.cut_columns(tile.cut_rows(bias, 2), 3)
    return with_position_bias(bias, call, tile)


def with_position_bias(
    bias: Tensor | None, call: AttentionCall, tile: Tile
) -> Tensor | None:
    """Returns a tile's bias with what the position adds to it."""
    if call.position_bias is None:
        return bias
    block = call.position_bias.block(tile)
    if bias is None:
        return block
    bias = at_least_float32(bias)  # a half type would round the position's
    return bias + ops.cast(block, bias.dtype)


def allowed_pairs(
    call: AttentionCall, tile: Tile, bias: Tensor | None
) -> Tensor | None:
    """Returns booleans that broadcast to `(B, N, rows, columns)`, or `None` for all.

    Args:
        call: The call.
        tile: A part of the scores.
        bias: What `bias_block` returned for it.
    """
    allowed = None
    if call.mask is not None and not (
        tile.is_static and call.mask.status(tile) == "full"
    ):
        allowed = mask_block(call.mask, tile, *call.scores_shape[:2])
    if bias is None or not _may_mask(call):
        return allowed
    seen = bias > LOWEST
    return seen if allowed is None else ops.logical_and(allowed, seen)


def _may_mask(call: AttentionCall) -> bool:
    """Whether what is added to the scores can hide keys."""
    return call.bias is not None or not call.position_bias.is_finite


def mask_block(mask: Mask, tile: Tile, batch: int | None, heads: int) -> Tensor:
    """Returns the mask's booleans for a tile, and raises if a user's mask errs."""
    block = ops.convert_to_tensor(mask.block(tile))
    shape = (batch, heads, *(_known(n) for n in (tile.rows, tile.columns)))
    if not _checks.broadcasts_to(tuple(block.shape), shape):
        raise ValueError(
            f"{type(mask).__name__} must give booleans that broadcast to {shape} "
            f"(batch, heads, rows, columns). Received: shape {tuple(block.shape)}"
        )
    return block if dtype_name(block) == "bool" else ops.cast(block, "bool")


def _known(length: Any) -> int | None:
    return length if isinstance(length, int) else None
