"""Checks of what a `MultiHeadAttention` layer is built with and called with.

They look at shapes and dtypes only, so they see the same in a symbolic call, while a
Functional model is made, as in a real one.
"""

from collections.abc import Mapping
from typing import Any

from keras_mha import _checks
from keras_mha._keras import (
    Shape,
    Tensor,
    dtype_name,
    entry_layer,
    is_float,
    is_integer,
)
from keras_mha.layers.axes import AttentionAxes
from keras_mha.masks import Mask
from keras_mha.ops.tensors import are_taken_over, devices_along


def check_build_shapes(query: Shape, value: Shape, key: Shape) -> None:
    """Raises unless a layer can be built for inputs of these shapes."""
    shapes = {"query_shape": query, "value_shape": value, "key_shape": key}
    received = ", ".join(f"{name}={shape}" for name, shape in shapes.items())
    for name, shape in shapes.items():
        if len(shape) < 3:
            raise ValueError(
                f"`{name}` must have at least three axes, (batch, positions, "
                f"features). Received: {received}"
            )
        if shape[-1] is None:
            raise ValueError(
                f"The last axis of `{name}` (features) must be known. "
                f"Received: {received}"
            )
    if not len(query) == len(value) == len(key):
        raise ValueError(
            "`query`, `value` and `key` must have the same number of axes. "
            f"Received: {received}"
        )


def check_input_shapes(
    axes: AttentionAxes, query: Shape, value: Shape, key: Shape
) -> None:
    """Raises unless the inputs fit together: batch axes, and key with value."""
    if not all(map(_checks.same, value[:-1], key[:-1])):
        raise ValueError(
            "All axes of `value` and `key` but the last must be equal. "
            f"Received: value of shape {value}, key of shape {key}"
        )
    for axis in axes.batch:
        if not _checks.same(query[axis], value[axis]):
            name = "batch size" if axis == 0 else f"length of axis {axis}"
            raise ValueError(
                f"`query` and `value` must have the same {name}"
                f"{' (it is not an attention axis)' if axis else ''}. "
                f"Received: query of shape {query}, value of shape {value}"
            )


def check_feature_widths(expected: dict[str, int], shapes: dict[str, Shape]) -> None:
    """Raises unless each input has the width that its projection was built for."""
    for name, shape in shapes.items():
        width = expected[name]
        if shape[-1] != width:
            raise ValueError(
                f"`{name}` must have {width} features (its last axis), as when the "
                f"layer was built. Received: {name} of shape {shape}"
            )


def check_numbers(name: str, x: Tensor) -> None:
    """Raises unless an input holds what can be cast to floating-point numbers."""
    if not (is_float(x) or is_integer(x) or dtype_name(x) == "bool"):
        raise TypeError(
            f"`{name}` must hold floating-point numbers, integers or booleans. "
            f"Received: {name} of dtype {dtype_name(x)}"
        )


def check_ranks(rank: int, shapes: dict[str, Shape]) -> None:
    """Raises unless each input has as many axes as the layer was built for."""
    for name, shape in shapes.items():
        if len(shape) != rank:
            raise ValueError(
                f"`{name}` must have {rank} axes, as when the layer was built. "
                f"Received: {name} of shape {shape}"
            )


def check_weights_are_trained(layer: Any, kernel: Any) -> None:
    """Raises where something has taken over a layer's weights and `kernel`, a variable,
    has not noticed."""
    taken = are_taken_over(layer, entry_layer())
    if taken and not getattr(kernel, "follows_a_module", False):
        raise ValueError(
            "torch's `fully_shard` does not know of Keras's variables, which would "
            "go on with weights that nobody trains. Use "
            "keras_mha.distribution.fully_shard in its place. "
            f"Received: a call of {layer.name!r}"
        )


def check_shared_heads(kernel: Tensor, heads: int) -> None:
    """Raises where the devices cannot share few key heads, `kernel` `(D, K, H)`."""
    devices = devices_along(kernel, axis=1)
    if heads % devices:
        raise ValueError(
            "`num_key_value_heads` must be a multiple of the devices that the kernels "
            "of `key_dense` and `value_dense` are sharded over; replicate these, and "
            "shard those of the query and the output. Received: "
            f"num_key_value_heads={heads}, sharded over {devices} devices"
        )


def check_position_axes(position: Any, attended: tuple[int, ...]) -> None:
    """Raises unless a `position` can say where along the attended axes tokens stand."""
    if position.axes == 1 < len(attended):
        raise ValueError(
            "`position` counts along one axis, and attention runs over several. Make "
            f"it for that many, as in RotaryEmbedding(axes={len(attended)}), choose "
            "one with `attention_axes`, or leave `position` out. "
            f"Received: attention_axes={attended}"
        )


def check_masks(
    axes: AttentionAxes,
    shapes: dict[str, Shape],
    scores_shape: Shape,
    arguments: Mapping[str, Any],
) -> None:
    """Raises unless masks and bias fit the inputs and the scores.

    Args:
        axes: Of the inputs.
        shapes: Of the inputs, by name.
        scores_shape: As `AttentionAxes.scores_shape` gives it.
        arguments: What the call was given, by name.
    """
    for name, owner in (
        ("query_mask", "query"),
        ("value_mask", "value"),
        ("key_mask", "key"),
    ):
        if arguments[name] is not None:
            check_positions_mask(name, arguments[name], owner, shapes[owner])
    if arguments["attention_mask"] is not None:
        check_attention_mask(arguments["attention_mask"], axes, scores_shape)
    if arguments["attention_bias"] is not None:
        check_attention_bias(arguments["attention_bias"], scores_shape)


def check_positions_mask(name: str, mask: Tensor, owner: str, shape: Shape) -> None:
    """Raises unless a mask of positions, `(B, T)`, fits the input it belongs to."""
    _require_shape(name, mask)
    expected, received = tuple(shape[:-1]), tuple(mask.shape)
    leading = expected[: len(received)]
    if not received or len(received) > len(expected):
        fits = False
    else:
        fits = all(map(_checks.same, received, leading))
    if not fits:
        raise ValueError(
            f"`{name}` must have the shape of `{owner}` without its features axis, "
            f"{expected}. Received: {name} of shape {received}"
        )


def check_attention_mask(mask: Any, axes: AttentionAxes, scores_shape: Shape) -> None:
    """Raises unless `attention_mask` can mask scores of this shape."""
    if isinstance(mask, Mask):
        if axes.is_plain:  # else it fits the folded scores, which the kernels see
            mask.check(scores_shape)
        return
    _require_shape("attention_mask", mask, "a boolean tensor or a `keras_mha.masks`")
    shape = tuple(mask.shape)
    expanded = axes.expand_mask(shape)
    fits = len(shape) >= 2 * len(axes.attended)
    if not (fits and _checks.broadcasts_to(expanded, scores_shape)):
        raise ValueError(
            "`attention_mask` must broadcast to the attention scores, "
            f"{scores_shape}; without all axes it has no heads axis, as in (B, T, S) "
            f"or (T, S). Received: attention_mask of shape {shape}"
        )


def check_attention_bias(bias: Any, scores_shape: Shape) -> None:
    """Raises unless `attention_bias` can be added to scores of this shape."""
    _require_shape("attention_bias", bias)
    if not is_float(bias):
        raise TypeError(
            "`attention_bias` must hold floating-point numbers; booleans belong in "
            f"`attention_mask`. Received: attention_bias of dtype {dtype_name(bias)}"
        )
    if not _checks.broadcasts_to(tuple(bias.shape), scores_shape):
        raise ValueError(
            "`attention_bias` must broadcast to the attention scores, "
            f"{scores_shape}, aligned at the right: one of three axes is (N, T, S). "
            f"Received: attention_bias of shape {tuple(bias.shape)}"
        )


def checked_segment_ids(
    segment_ids: Any, query: Shape, value: Shape
) -> tuple[Tensor, Tensor]:
    """Returns the segment ids of the query's side and the key's side, or raises."""
    if isinstance(segment_ids, tuple | list):
        if len(segment_ids) != 2:
            raise ValueError(
                "`segment_ids` must be one tensor or a pair (query's, key's). "
                f"Received: {len(segment_ids)} tensors"
            )
        query_ids, key_ids = segment_ids
    else:
        query_ids = key_ids = segment_ids
    for ids, owner, shape in (
        (query_ids, "query", query),
        (key_ids, "value", value),
    ):
        _require_shape("segment_ids", ids)
        if not is_integer(ids):
            raise TypeError(
                "`segment_ids` must hold whole numbers. "
                f"Received: segment_ids of dtype {dtype_name(ids)}"
            )
        expected = tuple(shape[:-1])
        fits = len(ids.shape) == len(expected) and _checks.broadcasts_to(
            tuple(ids.shape), expected
        )
        if not fits:
            raise ValueError(
                f"`segment_ids` must have the shape of `{owner}` without its features "
                f"axis, {expected}; where the two sides differ, give a pair (query's, "
                f"key's). Received: segment_ids of shape {tuple(ids.shape)}"
            )
    return query_ids, key_ids


def _require_shape(name: str, x: Any, expected: str = "a tensor") -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(
            f"`{name}` must be {expected}. "
            f"Received: {name}={x!r} (of type {type(x).__name__})"
        )
