"""Checks of a call with a `cache`: the cache itself, and what goes with it.

As in `input_checks`, only shapes and dtypes are looked at.
"""

from collections.abc import Mapping
from typing import Any

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor, dtype_name, is_float
from keras_mha.layers import cache as kv_cache
from keras_mha.layers.cache import Cache
from keras_mha.masks import Mask

_SELF, _MEMORY = {"key", "value", "length"}, {"key", "value"}


def check_cached_call(
    query: Tensor,
    arguments: Mapping[str, Any],
    *,
    heads: int,
    widths: tuple[int, int],
    window: int | None,
    takes_ids: bool,
) -> None:
    """Raises if a call cannot be made with its cache.

    Args:
        query: The call's query.
        arguments: The call's other arguments, by name.
        heads: Key and value heads of the layer, K.
        widths: Of a key head and of a value head, `(H, V)`.
        window: The layer's sliding window.
        takes_ids: Whether new tokens can be placed without the earlier ones' ids.
    """
    cache = arguments["cache"]
    _check_structure(cache, query.shape[0], heads, widths)
    if arguments["training"]:
        raise ValueError(
            "`cache` is for decoding: what earlier calls computed gets no gradients. "
            "Train on whole sequences, without it. Received: training=True"
        )
    if len(query.shape) != 3:
        raise ValueError(
            "`cache` needs inputs with one axis of positions, (B, T, D). "
            f"Received: query of shape {tuple(query.shape)}"
        )
    if arguments["segment_ids"] is not None:
        raise ValueError(
            "`segment_ids` cannot be given beside a `cache`, whose rows hold one "
            "sequence each."
        )
    if kv_cache.is_memory(cache):
        _check_beside_memory(arguments)
        return
    _check_room(cache, query, arguments["value"], window)
    _check_masks(cache, arguments, window)
    if arguments["position_ids"] is not None:
        _check_ids(arguments["position_ids"], takes_ids)


def check_one_axis(axes: int) -> None:
    """Raises where a `position` has several axes, along which a cache cannot count."""
    if axes > 1:
        raise ValueError(
            "`cache` counts new tokens along one axis, and cannot be had with a "
            f"`position` over several. Received: a position of {axes} axes"
        )


def _check_structure(
    cache: Any, batch_size: int | None, heads: int, widths: tuple[int, int]
) -> None:
    """Raises unless a cache is one of this layer, for a batch of this size."""
    names = set(cache) if isinstance(cache, dict) else None
    if names is None or names - {"mask"} not in (_SELF, _MEMORY) or names > _SELF:
        received = f"a {type(cache).__name__}" if names is None else sorted(names)
        raise ValueError(
            "`cache` must be what `init_cache` or an earlier call returned: a "
            f"dictionary with {sorted(_SELF)}, or with {sorted(_MEMORY)} and maybe "
            f"'mask'. Received: {received}"
        )
    for name, x in cache.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(
                f"`cache[{name!r}]` must be a tensor. "
                f"Received: {x!r} (of type {type(x).__name__})"
            )
    slots = cache["key"].shape[1] if len(cache["key"].shape) == 4 else None
    for name, width in zip(("key", "value"), widths, strict=True):
        x = cache[name]
        _check_part(f"cache[{name!r}]", x, (batch_size, slots, heads, width))
        if not is_float(x):
            raise TypeError(
                f"`cache[{name!r}]` must hold floating-point numbers. "
                f"Received: dtype {dtype_name(x)}"
            )
    if slots is None:
        raise ValueError(
            "`cache` must have a known number of slots (axis 1). "
            f"Received: cache['key'] of shape {tuple(cache['key'].shape)}"
        )
    if "mask" in cache:
        _check_part("cache['mask']", cache["mask"], (batch_size, slots))
    if "length" in cache:
        _check_part("cache['length']", cache["length"], (batch_size,))
        if dtype_name(cache["length"]) != "int32":
            raise TypeError(
                "`cache['length']` must be of dtype int32. "
                f"Received: dtype {dtype_name(cache['length'])}"
            )


def _check_part(name: str, x: Tensor, expected: Shape) -> None:
    shape = tuple(x.shape)
    if len(shape) != len(expected) or not all(map(_checks.same, shape, expected)):
        raise ValueError(
            f"`{name}` must have the shape {expected} for this layer and this query "
            f"(batch size first). Received: shape {shape}"
        )


def _check_beside_memory(arguments: Mapping[str, Any]) -> None:
    names = "value", "key", "value_mask", "key_mask"
    given = [name for name in names if arguments[name] is not None]
    if given:
        raise ValueError(
            "`cache` holds the projected memory already: its key, value and mask are "
            f"given to `init_cache(memory=...)`. Received: {', '.join(given)}"
        )
    if arguments["use_causal_mask"]:
        raise ValueError(
            "`use_causal_mask` must be False beside a `cache` of a memory, in which "
            "nothing comes before or after the query. Received: use_causal_mask=True"
        )


def _check_room(
    cache: Cache, query: Tensor, value: Tensor | None, window: int | None
) -> None:
    length, slots = query.shape[1], kv_cache.slots(cache)
    if value is not None and not _checks.same(value.shape[1], length):
        raise ValueError(
            "With a `cache` of self-attention `value` must be as long as `query`, "
            "both being the new tokens; a memory is given to "
            "`init_cache(memory=...)`. Received: "
            f"query of shape {tuple(query.shape)}, value of shape {tuple(value.shape)}"
        )
    if length is None or kv_cache.is_ring(cache, window) or length <= slots:
        return
    raise ValueError(
        f"`cache` has room for max_length={slots} positions and cannot take {length}. "
        f"Received: query of shape {tuple(query.shape)}"
    )


def _check_masks(
    cache: Cache, arguments: Mapping[str, Any], window: int | None
) -> None:
    is_ring = kv_cache.is_ring(cache, window)
    for name in ("attention_mask", "attention_bias"):
        if arguments[name] is not None and is_ring:
            raise ValueError(
                f"`{name}` cannot be given beside the `cache` of a layer with "
                "`sliding_window`, whose slots are used again for later tokens."
            )
    if isinstance(arguments["attention_mask"], Mask):
        raise ValueError(
            "`attention_mask` must be booleans with a column for each slot beside a "
            "`cache`: a mask object counts the queries from 0. "
            f"Received: attention_mask={arguments['attention_mask']!r}"
        )


def _check_ids(position_ids: Any, takes_ids: bool) -> None:
    if not takes_ids:
        raise ValueError(
            "`position_ids` cannot be given beside a `cache` of self-attention "
            "with a bias or a dynamic scaling for `position`: where the earlier "
            "tokens stand is counted. Received: position_ids of shape "
            f"{getattr(position_ids, 'shape', None)}"
        )
    if isinstance(position_ids, tuple | list):
        raise ValueError(
            "`position_ids` must be one tensor beside a `cache` of self-attention. "
            f"Received: {len(position_ids)} tensors"
        )
