"""Learned keys and values that join those of every sequence: persistent memory.

They come last, once keys are placed and cached and masks and biases are made of a
call: as keys with no position, which no mask hides.

References:
    Sukhbaatar et al., 2019, Augmenting Self-attention with Persistent Memory:
        https://arxiv.org/abs/1907.01470
"""

from typing import Any

import keras
from keras import ops

from keras_mha._keras import Tensor, dtype_name
from keras_mha.layers.projections import copy_of, normalized
from keras_mha.memory_columns import (
    BiasBesideMemory,
    bias_beside_memory,
    mask_beside_memory,
)
from keras_mha.ops.tensors import splits_sequences

Heads = tuple[Tensor, Tensor, Tensor]
"""Query `(B, T, N, H)`, key `(B, S, K, H)` and value `(B, S, K, V)`."""


def add_weights(layer: Any, count: int | None) -> None:
    """Gives a layer `memory_key` and `memory_value`, `None` without a `count`.

    Args:
        layer: The attention layer.
        count: How many keys and values each of its key heads learns.
    """
    layer.memory_key = layer.memory_value = None
    if count is None:
        return
    widths = {"memory_key": layer.key_dim, "memory_value": layer.value_dim}
    for name, width in widths.items():
        weight = layer.add_weight(
            name=name,
            shape=(count, layer.num_key_value_heads, width),
            initializer=copy_of(layer._kernel_initializer),
        )
        setattr(layer, name, weight)


def joined(
    layer: Any, heads: Heads, arguments: dict[str, Any]
) -> tuple[Heads, dict[str, Any]]:
    """Joins a layer's learned keys and values, if it has any, to what is attended to.

    Args:
        layer: The attention layer.
        heads: Of the call.
        arguments: Of `dot_product_attention`; `mask`, `bias` and `position_bias` speak
            of the sequence alone.

    Returns:
        Both with a column for each learned key in front of the sequence's.
    """
    if layer.memory_key is None:
        return heads, arguments
    key = normalized(layer, layer.memory_key, layer.key_norm_scale)
    if splits_sequences():
        raise ValueError(
            "`num_memory_key_values` must be None within torch's context_parallel, "
            "where each process would count the learned keys again. "
            f"Received: num_memory_key_values={key.shape[0]}"
        )
    query, keys, values = heads
    batch, rows, query_heads, _ = query.shape
    count, length = key.shape[0], ops.shape(keys)[1]
    shape = batch, query_heads, rows, keys.shape[1]
    bias, position_bias = arguments["bias"], arguments["position_bias"]
    beside = {
        "mask": mask_beside_memory(arguments["mask"], count, length, shape),
        "bias": None if bias is None else bias_beside_memory(bias, count, length),
        "position_bias": None
        if position_bias is None
        else BiasBesideMemory(count, length, position_bias),
    }
    heads = query, _in_front(key, keys), _in_front(layer.memory_value, values)
    return heads, {**arguments, **beside}


def _in_front(learned: Tensor, x: Tensor) -> Tensor:
    """`(n, K, width)` and `(B, S, K, width)` to `(B, n + S, K, width)`."""
    learned = ops.broadcast_to(learned[None], (ops.shape(x)[0], *learned.shape))
    # A cache may hold another type than the layer computes in.
    dtype = keras.backend.result_type(dtype_name(learned), dtype_name(x))
    both = ops.cast(learned, dtype), ops.cast(x, dtype)
    return ops.concatenate(both, axis=1)
