"""Where the tokens of a call stand, and what a layer's `position` makes of it."""

from typing import Any

from keras_mha._keras import Tensor, without_autocast
from keras_mha.biases import Bias
from keras_mha.layers.arguments import Call
from keras_mha.layers.coordinates import counted_coordinates
from keras_mha.layers.position_bias import PositionBias
from keras_mha.layers.position_ids import restarted
from keras_mha.layers.rotary_embedding import RotaryEmbedding

Ids = tuple[Tensor | None, Tensor | None]
"""Where queries and keys stand, `(B' or 1, T)`; `None` for counting from 0."""


def ids_of(call: Call, position: Any) -> Ids:
    """Returns where a call's tokens stand, given or counted."""
    if position is None:
        return None, None
    if call.position_ids is not None:
        return given_ids(call, position, call.query, call.value)
    if position.axes > 1:
        return counted_coordinates(call.axes, call.query, call.value, position.window)
    if call.segment_ids is None:
        return None, None
    ids = call.segment_ids
    query_ids = restarted(call.axes.fold_ids(ids[0], call.query))
    if ids[1] is ids[0]:
        return query_ids, query_ids
    return query_ids, restarted(call.axes.fold_ids(ids[1], call.value))


def given_ids(call: Call, position: Any, query: Tensor, key: Tensor) -> Ids:
    """Returns where the tokens of `query` and `key` stand by the call's ids, if any."""
    if call.position_ids is None:
        return None, None
    axes, ids = call.axes, call.position_ids
    fold = axes.fold_ids if position.axes == 1 else axes.fold_coordinates
    query_ids = fold(ids[0], query)
    return query_ids, query_ids if ids[1] is ids[0] else fold(ids[1], key)


def rotated(position: Any, query: Tensor, key: Tensor, ids: Ids) -> Ids:
    """Returns query and key as a rotary position turns them; others leave them."""
    if not isinstance(position, RotaryEmbedding):
        return query, key
    return position.rotate_both(query, key, *ids)


def bias_of_position(position: Any, ids: Ids) -> Bias | None:
    """Returns the bias that a position adds to the scores, if it is of that kind."""
    if not isinstance(position, PositionBias):
        return None
    with without_autocast():
        return position.bias(*ids)
