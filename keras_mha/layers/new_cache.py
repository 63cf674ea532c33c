"""A layer's cache before its first call."""

from typing import Any

import keras

from keras_mha import _checks
from keras_mha._keras import Tensor
from keras_mha.layers import cache as kv_cache
from keras_mha.layers.cache import Cache
from keras_mha.layers.cache_checks import check_one_axis
from keras_mha.layers.cache_layout import shared_out
from keras_mha.layers.memory import projected_memory


def new_cache(
    layer: Any,
    batch_size: int | None,
    max_length: int | None,
    dtype: str | None,
    memory: Tensor | tuple[Tensor, Tensor] | None,
    value_mask: Tensor | None,
) -> Cache:
    """Returns what `MultiHeadAttention.init_cache` does, for its arguments."""
    check_one_axis(layer._position_axes)
    dtype = keras.backend.standardize_dtype(dtype or layer.compute_dtype)
    if "float" not in dtype:
        raise TypeError(
            f"`dtype` of a cache must be a floating-point one. Received: dtype={dtype}"
        )
    if memory is not None:
        if batch_size is not None or max_length is not None:
            raise ValueError(
                "`memory` has a batch size and a length of its own. Received: "
                f"batch_size={batch_size}, max_length={max_length} beside `memory`"
            )
        return projected_memory(layer, memory, value_mask, dtype)
    if value_mask is not None:
        raise ValueError("`value_mask` belongs to a `memory`, which is not given.")
    batch_size = _checks.positive_integer("batch_size", batch_size)
    slots = _checks.positive_integer("max_length", max_length)
    if layer._sliding_window is not None:
        slots = min(slots, layer._sliding_window)
    widths = layer.key_dim, layer.value_dim
    cache = kv_cache.empty(batch_size, slots, layer.num_key_value_heads, widths, dtype)
    return shared_out(layer, cache)
