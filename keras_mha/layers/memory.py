"""The memory of cross-attention, projected once for all steps of decoding."""

from typing import Any

from keras import ops

from keras_mha._keras import Tensor, get_keras_mask
from keras_mha.layers import input_checks
from keras_mha.layers.arguments import from_list
from keras_mha.layers.cache import Cache
from keras_mha.layers.projections import key_heads, value_heads
from keras_mha.masks import as_booleans
from keras_mha.ops import padding


def projected_memory(
    layer: Any,
    memory: Tensor | tuple[Tensor, Tensor],
    value_mask: Tensor | None,
    dtype: str,
) -> Cache:
    """Returns the cache of a memory's projected keys and values.

    Args:
        layer: The layer, which has been built.
        memory: Shape `(B, S, D_v)`, or a pair `(value, key)`.
        value_mask: Which of its tokens are real, `(B, S)`.
        dtype: Of the cache.
    """
    is_pair = isinstance(memory, tuple | list)
    if is_pair and len(memory) != 2:
        raise ValueError(
            "`memory` must be a tensor or a pair (value, key). "
            f"Received: {len(memory)} tensors"
        )
    value, key = memory if is_pair else (memory, memory)
    if layer._sliding_window is not None:
        raise ValueError(
            "`memory` cannot be kept for a layer with `sliding_window`, which "
            "counts from the first query. Received: "
            f"sliding_window={layer._sliding_window}"
        )
    if not layer.built:
        raise ValueError(
            "`memory` can only be projected once the layer is built: call it, or "
            "its `build(query_shape, value_shape)`, first."
        )
    if value_mask is None:
        value_mask = get_keras_mask(value)
    for x in (value, key):
        input_checks.check_numbers("memory", ops.convert_to_tensor(x))
    value, key = (
        ops.cast(ops.convert_to_tensor(x), layer.compute_dtype) for x in (value, key)
    )
    shapes = {"value": tuple(value.shape), "key": tuple(key.shape)}
    input_checks.check_ranks(3, shapes)
    input_checks.check_feature_widths(layer._widths, shapes)
    input_checks.check_input_shapes(layer._axes, shapes["value"], *shapes.values())
    if value_mask is not None:
        value_mask = from_list(value_mask)
        input_checks.check_positions_mask(
            "value_mask", value_mask, "value", shapes["value"]
        )
        value_mask = as_booleans("value_mask", value_mask)
        value, key = (padding.zero_unless(value_mask, x) for x in (value, key))
    cache = {
        "key": ops.cast(key_heads(layer, key), dtype),
        "value": ops.cast(value_heads(layer, value), dtype),
    }
    if value_mask is not None:
        cache["mask"] = ops.cast(value_mask, "bool")
    return cache
