"""What the heads of a call attend with: projected, normalised, placed.

There are three kinds: of a plain call, with the projected memory of cross-attention,
and with a cache that grows. The layer asks which and then does not care.
"""

import functools
from typing import Any, NamedTuple

from keras import ops

from keras_mha._keras import Tensor
from keras_mha.biases import Bias
from keras_mha.layers import cache as kv_cache
from keras_mha.layers.arguments import Call
from keras_mha.layers.cache import Cache
from keras_mha.layers.cache_layout import shared_out
from keras_mha.layers.call_masks import mask_of_keys, spread
from keras_mha.layers.placing import bias_of_position, given_ids, ids_of, rotated
from keras_mha.layers.projections import key_heads, query_heads, value_heads
from keras_mha.masks import Mask, Padding


class Operands(NamedTuple):
    """Query, key and value as heads, and what follows from where their tokens stand.

    Args:
        query: Shape `(B', T, N, H)`.
        key: Shape `(B', S, K, H)`.
        value: Shape `(B', S, K, V)`.
        mask: Which keys each query sees by where they stand and which are real.
        position_bias: What the position adds to the scores.
        cache: The cache after the call.
        new_tokens: Those that went into it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    position_bias: Bias | None = None
    cache: Cache | None = None
    new_tokens: kv_cache.NewTokens | None = None


def operands_of(layer: Any, call: Call) -> Operands:
    """Projects what a layer is called with, and places it."""
    if call.cache is None:
        return _plain(layer, call)
    return _of_memory(layer, call) if call.has_memory else _of_cache(layer, call)


def _plain(layer, call):
    ids = ids_of(call, layer.position)
    query, key = query_heads(layer, call.query), key_heads(layer, call.key)
    query, key = rotated(layer.position, query, key, ids)
    value = value_heads(layer, call.value)
    mask = mask_of_keys(call, layer._sliding_window)
    return Operands(query, key, value, mask, bias_of_position(layer.position, ids))


def _of_memory(layer, call):
    """Key and value are in the cache, projected, and keys not rotated yet."""
    cache = call.cache
    ids = given_ids(call, layer.position, call.query, cache["key"])
    query = query_heads(layer, call.query)
    query, key = rotated(layer.position, query, cache["key"], ids)
    mask = Padding(cache["mask"]) if "mask" in cache else None
    bias = bias_of_position(layer.position, ids)
    return Operands(query, key, cache["value"], mask, bias, cache)


def _of_cache(layer, call):
    """The new tokens go into the cache, and attend to what it then holds."""
    position, causal = layer.position, call.use_causal_mask
    new = _new_tokens(layer, call)
    ids = new.positions
    if call.position_ids is not None:
        ids, _ = given_ids(call, position, call.query, call.value)
    query, key = query_heads(layer, call.query), key_heads(layer, call.key)
    value = value_heads(layer, call.value)
    if layer._rotates_later:
        step = new.write(key, value, causal)
        query, key = rotated(position, query, step.key, (ids, step.key_positions))
    else:
        query, key = rotated(position, query, key, (ids, ids))
        step = new.write(key, value, causal)
        key = step.key
    bias = bias_of_position(position, (ids, step.key_positions))
    return Operands(query, key, step.value, step.mask, bias, step.cache, new)


def _new_tokens(layer, call):
    masks = [spread(mask, call.query) for mask in call.masks if mask is not None]
    masks = [ops.cast(mask, "bool") for mask in masks]
    valid = functools.reduce(ops.logical_and, masks) if masks else None
    length = ops.shape(call.query)[1]
    share_out = functools.partial(shared_out, layer)
    return kv_cache.NewTokens(
        call.cache, length, valid, layer._sliding_window, share_out
    )
