"""The arguments of a call, read once.

Lists become tensors, everything is checked against the layer, defaults are filled in,
and the shapes that follow are worked out. What comes after asks a `Call`, and checks
nothing again.
"""

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
            setattr(self, name, from_list(getattr(self, name)))
        if self.query_mask is None:
            # Keras fills masks in by itself only when there are several inputs.
            self.query_mask = get_keras_mask(self.query)
        for name in ("return_attention_scores", "use_causal_mask"):
            _checks.boolean(name, getattr(self, name))
        if self.cache is not None:
            self._check_cache(layer)
        self.axes = layer._axes_of(self.query)
        shapes = self._checked_shapes(layer)
        self.keys_shape = self._keys_shape(layer._sliding_window)
        self.scores_shape = self.axes.scores_shape(
            self.query.shape, self.keys_shape, layer.num_heads
        )
        input_checks.check_masks(self.axes, shapes, self.scores_shape, vars(self))
        if self.segment_ids is not None:
            self.segment_ids = input_checks.checked_segment_ids(
                self.segment_ids, shapes["query"], shapes["value"]
            )
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
        self.query, self.value, self.key = (
            x if x is None or is_float(x) else ops.cast(x, dtype)
            for x in (self.query, self.value, self.key)
        )
        for name in ("query_mask", "value_mask", "key_mask"):
            setattr(self, name, as_booleans(name, getattr(self, name)))
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


_MAY_BE_LISTS = (
    "query_mask",
    "value_mask",
    "key_mask",
    "attention_mask",
    "segment_ids",
    "position_ids",
    "attention_bias",
)


def from_list(x: Any) -> Any:
    """Makes a tensor of a Python list of numbers, and leaves everything else alone."""
    is_list = isinstance(x, list) and x and isinstance(x[0], list | int | float)
    return to_tensor(x) if is_list else x


def filled(query: Shape, value: Shape | None, key: Shape | None) -> tuple[Shape, ...]:
    """Fills in the shapes that are left out, as a call fills in its tensors."""
    value = query if value is None else value
    key = value if key is None else key
    return tuple(query), tuple(value), tuple(key)
