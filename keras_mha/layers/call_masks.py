"""The mask and the bias of a call, folded for the kernels."""

from keras import ops

from keras_mha._keras import Tensor, dtype_name
from keras_mha._lengths import shape_of
from keras_mha.layers.arguments import Call
from keras_mha.masks import (
    Causal,
    Dense,
    Mask,
    Padding,
    Segments,
    SlidingWindow,
    as_booleans,
    intersect,
)


def mask_of(call: Call) -> Mask | None:
    """Returns who may attend to whom by the masks given and the query's tokens."""
    return intersect(_attention_mask(call), _query_mask(call))


def mask_of_keys(call: Call, window: int | None) -> Mask | None:
    """Returns who may attend to whom by where tokens stand and which keys are real."""
    return intersect(
        _padding(call.value_mask, call),
        _padding(call.key_mask, call),
        _segments(call),
        SlidingWindow(window) if window else None,
        Causal() if call.use_causal_mask else None,
    )


def bias_of(call: Call, dtype: str) -> Tensor | None:
    """Returns what is added to the scores, which are computed for the type `dtype`."""
    bias = call.attention_bias
    if bias is None:
        return None
    if dtype_name(bias) == "float64" != dtype:
        # More than the scores have, and torch would compute all in it.
        bias = ops.cast(bias, "float32")
    if call.axes.is_plain:
        return bias
    return call.axes.fold_scores(bias, call.query, call.value)


def spread(mask: Tensor, x: Tensor) -> Tensor:
    """Gives a mask of the leading axes of `x` all its axes but the last."""
    missing = len(x.shape) - 1 - len(mask.shape)
    if missing == 0:
        return mask
    mask = ops.reshape(mask, (*shape_of(mask), *(1,) * missing))
    return ops.broadcast_to(mask, shape_of(x)[:-1])


def _attention_mask(call):
    mask, axes = call.attention_mask, call.axes
    if mask is None or isinstance(mask, Mask):
        return mask
    mask = as_booleans("attention_mask", mask, warn=True)
    if not axes.is_plain:
        mask = ops.reshape(mask, axes.expand_mask(tuple(shape_of(mask))))
        mask = axes.fold_scores(mask, call.query, call.value)
    return Dense(mask)


def _query_mask(call):
    if call.query_mask is None:
        return None
    valid = call.axes.fold_positions(spread(call.query_mask, call.query))
    valid = ops.expand_dims(ops.cast(valid, "bool"), -1)
    return Dense(ops.expand_dims(valid, 1))


def _padding(mask, call):
    if mask is None:
        return None
    return Padding(call.axes.fold_positions(spread(mask, call.value)))


def _segments(call):
    if call.segment_ids is None:
        return None
    inputs = call.query, call.value
    return Segments(*map(call.axes.fold_ids, call.segment_ids, inputs))
