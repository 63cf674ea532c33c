"""What the layer is made with: checks of its constructor's arguments."""

from collections.abc import Callable
from typing import Any

import keras

from keras_mha import _checks
from keras_mha.layers import input_checks
from keras_mha.layers.position_bias import PositionBias
from keras_mha.layers.rotary_embedding import RotaryEmbedding

ATTENTION_SINKS = (None, "zero", "learned")
TALKING_HEADS = (None, "pre", "post", "both")


def checked_position(
    position: Any,
    attention_axes: tuple[int, ...] | None,
    key_dim: int,
    heads: int,
    key_value_heads: int,
) -> RotaryEmbedding | PositionBias | None:
    """Returns a `position` that fits the layer it is given to, or raises."""
    if position is None:
        return None
    if not isinstance(position, RotaryEmbedding | PositionBias):
        raise TypeError(
            "`position` must be a RotaryEmbedding, an ALiBi or a "
            "RelativePositionBias (a layer, not its class). "
            f"Received: position={position!r} (of type {type(position).__name__})"
        )
    if attention_axes is not None:
        input_checks.check_position_axes(position, attention_axes)
    if isinstance(position, RotaryEmbedding):
        position.check_width(key_dim)
        position.set_heads(key_value_heads)
    else:
        position.set_heads(heads)
    return position


def optional(check: Callable, name: str, value: Any) -> Any:
    """Returns what `check(name, value)` does, or `None` for `None`."""
    return None if value is None else check(name, value)


def checked_key_value_heads(value: Any, num_heads: int) -> int | None:
    """Returns `num_key_value_heads`, or raises."""
    if value is None:
        return None
    value = _checks.positive_integer("num_key_value_heads", value)
    if num_heads % value:
        raise ValueError(
            "`num_key_value_heads` must divide `num_heads`. Received: "
            f"num_key_value_heads={value}, num_heads={num_heads}"
        )
    return value


def checked_output_shape(value: Any) -> tuple[int, ...] | None:
    """Returns `output_shape` as a tuple, or raises."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        value = (value,)
    sizes = tuple(_checks.positive_integer("output_shape", size) for size in value)
    return sizes or None  # Keras's layer takes an empty shape for none given


def checked_talking_heads(value: Any, flash_attention: bool | None) -> str | None:
    """Returns `talking_heads`, or raises."""
    value = _checks.choice("talking_heads", value, TALKING_HEADS)
    if value is not None and flash_attention:
        raise ValueError(
            "`talking_heads` must be None with `flash_attention=True`: they need the "
            "scores of all heads at once, which no flash kernel has. "
            f"Received: talking_heads={value!r}, flash_attention=True"
        )
    return value


def implementation_of(flash_attention: bool | None) -> str:
    """Returns the implementation that `flash_attention` asks for."""
    if flash_attention is None:
        flash_attention = keras.config.is_flash_attention_enabled()
        # Keras's switch can turn fused kernels off; on is what happens anyway.
        return "reference" if flash_attention is False else "auto"
    return "flash" if flash_attention else "reference"
