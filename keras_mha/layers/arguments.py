"""The arguments of a call, read once.

Lists become tensors, everything is checked against the layer, defaults are filled in,
and the shapes that follow are worked out. What comes after asks a `Call`, and checks
nothing again.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, Tensor, get_keras_mask, is_float, to_tensor
from keras_mha.layers import cache as kv_cache
from keras_mha.layers import input_checks
from keras_mha.layers.axes import AttentionAxes
from keras_mha.layers.cache import Cache
from keras_mha.layers.cache_checks import check_cached_call, check_one_axis
from keras_mha.layers.coordinates import (
    check_can_be_counted,
    checked_pair_of_coordinates,
)
from keras_mha.layers.position_ids import checked_position_ids
from keras_mha.masks import Mask, as_booleans
from keras_mha.ops.tensors import is_computed_now


@dataclass(eq=False)
class Call:
    """What a layer is called with, in the order of `MultiHeadAttention.call`.

    `read` makes tensors of the arguments, pairs of `segment_ids` and `position_ids`,
    and adds the last four; `fill` casts and fills in what is left out.

    Args:
        query: Shape `(B, *positions, D)`, and so on: see the layer's call arguments.
        axes: Which axes attention runs over.
        keys_shape: Batch and position axes of what is attended to.
        scores_shape: As `AttentionAxes.scores_shape` gives it.
        has_memory: Whether `cache` is that of cross-attention.
    """

    query: Tensor
    value: Tensor | None = None
    key: Tensor | None = None
    query_mask: Tensor | None = None
    value_mask: Tensor | None = None
    key_mask: Tensor | None = None
    attention_mask: Mask | Tensor | None = None
    return_attention_scores: bool = False
    training: Any = None
    use_causal_mask: bool = False
    attention_bias: Tensor | None = None
    segment_ids: Any = None
    position_ids: Any = None
    cache: Cache | None = None
    axes: AttentionAxes = field(init=False)
    keys_shape: Shape = field(init=False)
    scores_shape: Shape = field(init=False)
    has_memory: bool = field(init=False, default=False)

    def read(self, layer: Any) -> "Call":
        """Checks the call against a layer, and returns it."""
        for name in _MAY_BE_LISTS:
            given = getattr(self, name)
            if given is not None:
                setattr(self, name, from_list(given))
        if self.query_mask is None:
            # Keras fills masks in by itself only when there are several inputs.
            self.query_mask = get_keras_mask(self.query)
        for name in ("return_attention_scores", "use_causal_mask"):
            _checks.boolean(name, getattr(self, name))
        if self.cache is not None:
            self._check_cache(layer)
        self.axes = layer._axes_of(self.query)
        shapes = self._read_shapes(layer)
        if any(getattr(self, name) is not None for name in _MASKS):
            input_checks.check_masks(self.axes, shapes, self.scores_shape, vars(self))
        if self.segment_ids is not None:
            self.segment_ids = input_checks.checked_segment_ids(
                self.segment_ids, shapes["query"], shapes["value"]
            )
        if self.position_ids is not None or layer._position_axes > 1:
            self._read_position_ids(layer.position, layer._position_axes)
        if layer._flash_attention and self.return_attention_scores:
            raise ValueError(
                "`return_attention_scores=True` needs all scores in memory, which "
                "`flash_attention=True` forbids. Use `flash_attention=None`."
            )
        return self

    def _check_cache(self, layer):
        check_one_axis(layer._position_axes)
        check_cached_call(
            self.query,
            vars(self),
            heads=layer.num_key_value_heads,
            widths=(layer.key_dim, layer.value_dim),
            window=layer._sliding_window,
            takes_ids=layer._rotates and not layer._rotates_later,
        )
        self.has_memory = kv_cache.is_memory(self.cache)

    def _read_shapes(self, layer):
        """Checks the inputs, works out what follows from their shapes, and returns the
        shapes of those that take part."""
        work_out = functools.partial(self._work_out_shapes, layer)
        if self.cache is None and layer.built and is_computed_now(self.query):
            inputs = self.query, self.value, self.key
            shapes, *others = layer._remembered.of(inputs, work_out)
        else:
            shapes, *others = work_out()
        self.keys_shape, self.scores_shape = others
        return shapes

    def _work_out_shapes(self, layer):
        shapes = self._checked_shapes(layer)
        keys_shape = self._keys_shape(layer._sliding_window)
        query_shape, heads = self.query.shape, layer.num_heads
        scores_shape = self.axes.scores_shape(query_shape, keys_shape, heads)
        return shapes, keys_shape, scores_shape

    def _checked_shapes(self, layer):
        """Checks the inputs and returns the shapes of those that take part."""
        inputs = self.query, self.value, self.key
        for name, x in zip(("query", "value", "key"), inputs, strict=True):
            if x is not None:
                input_checks.check_numbers(name, x)
        query, value, key = filled(*(None if x is None else x.shape for x in inputs))
        shapes = {"query": query}
        if not self.has_memory:
            shapes |= {"value": value, "key": key}
        if layer.built:
            input_checks.check_ranks(self.axes.rank, shapes)
            input_checks.check_feature_widths(layer._widths, shapes)
        else:  # a symbolic call may come before there are weights
            input_checks.check_build_shapes(query, value, key)
        if not self.has_memory:
            input_checks.check_input_shapes(self.axes, query, value, key)
        return shapes

    def _keys_shape(self, window):
        if self.cache is None:
            return (self.query if self.value is None else self.value).shape
        columns = kv_cache.columns(self.cache, self.query.shape[1], window)
        return self.query.shape[0], columns

    def _read_position_ids(self, position, count):
        if self.position_ids is not None and position is None:
            raise ValueError(
                "`position_ids` are for a layer made with `position=...`; this one has "
                "no use of them."
            )
        keys = self.keys_shape
        if self.cache is not None and not self.has_memory:
            keys = self.query.shape  # the new tokens'
        sides = self.axes, tuple(self.query.shape), tuple(keys)
        if self.position_ids is None:
            if count > 1:
                check_can_be_counted(*sides, count, position.window)
        elif count == 1:
            self.position_ids = checked_position_ids(self.position_ids, *sides)
        else:
            self.position_ids = checked_pair_of_coordinates(
                self.position_ids, *sides, count
            )

    def fill(self, dtype: str) -> "Call":
        """Casts inputs and masks, fills in what is left out, and returns the call."""
        for name in ("query", "value", "key"):
            x = getattr(self, name)
            if x is not None and not is_float(x):
                setattr(self, name, ops.cast(x, dtype))
        for name in ("query_mask", "value_mask", "key_mask"):
            mask = getattr(self, name)
            if mask is not None:
                setattr(self, name, as_booleans(name, mask))
        if self.value is None:
            self.value = self.query
            if self.value_mask is None:
                self.value_mask = self.query_mask
        if self.key is None:
            self.key = self.value
        return self

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        """The masks of the query's, the value's and the key's tokens."""
        return self.query_mask, self.value_mask, self.key_mask


# What `input_checks.check_masks` looks at.
_MASKS = ("query_mask", "value_mask", "key_mask", "attention_mask", "attention_bias")
_MAY_BE_LISTS = (*_MASKS, "segment_ids", "position_ids")


class Remembered:
    """What was worked out of inputs before, by their shapes and dtypes.

    What was right once is right again, and to check it eagerly in every call would take
    longer than to attend in a short sequence.
    """

    MOST = 1000

    def __init__(self) -> None:
        self._known: dict[tuple, Any] = {}

    def of(self, inputs: tuple, work_out: Callable[[], Any]) -> Any:
        """Returns what `work_out` returned for such inputs before, or else does."""
        kinds = tuple([None if x is None else (x.shape, x.dtype) for x in inputs])
        found = self._known.get(kinds)
        if found is None:
            if len(self._known) >= self.MOST:
                self._known.clear()
            found = self._known[kinds] = work_out()
        return found


def from_list(x: Any) -> Any:
    """Makes a tensor of a Python list of numbers, and leaves everything else alone."""
    is_list = isinstance(x, list) and x and isinstance(x[0], list | int | float)
    return to_tensor(x) if is_list else x


def filled(query: Shape, value: Shape | None, key: Shape | None) -> tuple[Shape, ...]:
    """Fills in the shapes that are left out, as a call fills in its tensors."""
    value = query if value is None else value
    key = value if key is None else key
    return tuple(query), tuple(value), tuple(key)
