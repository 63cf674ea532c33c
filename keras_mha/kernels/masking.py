"""Who may attend to whom in a call: its mask and its bias together."""

from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import Mask, Tile, whole_tile

# A bias of this or less masks, as minus infinity does: what is left of such a score in
# float32 is the bias alone. Far below any score, and finite, so that inf - inf is never
# computed.
LOWEST = -1e30


def allowed_pairs(call: AttentionCall, tile: Tile | None = None) -> Tensor | None:
    """Returns booleans that broadcast to `(B, N, rows, columns)`, or `None` for all.

    Args:
        call: The call.
        tile: A part of the scores; `None` for the whole.
    """
    if tile is None:
        tile = whole_tile(ops.shape(call.query)[1], ops.shape(call.key)[1])
    allowed = None
    if call.mask is not None and not (
        tile.is_static and call.mask.status(tile) == "full"
    ):
        allowed = mask_block(call.mask, tile, *call.scores_shape[:2])
    if call.bias is not None:
        bias = tile.cut_columns(tile.cut_rows(call.bias, 2), 3)
        if allowed is None:
            return bias > LOWEST
        allowed = ops.logical_and(allowed, bias > LOWEST)
    return allowed


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
