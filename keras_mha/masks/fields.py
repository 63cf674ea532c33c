"""What masks are made with: arguments made tensors, and checked."""

import warnings
from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import (
    Shape,
    Tensor,
    as_tensor,
    dtype_name,
    is_float,
    is_integer,
    is_symbolic,
)
from keras_mha.ops.tensors import known_numbers


def as_booleans(name: str, mask: Tensor | None, warn: bool = False) -> Tensor | None:
    """Returns a mask of floating-point numbers as booleans, and any other as it is.

    Args:
        name: Of the argument, for the message.
        mask: A tensor of any kind.
        warn: Whether to warn that floats may not mean what they are taken for.

    Raises:
        ValueError: If numbers, where they are known, are negative: such a mask is made
            to be added to the scores, and as booleans would show what it shall hide.
    """
    # Integers are not looked at: 0 and 1 of a tokenizer come with every call.
    if mask is None or not is_float(mask):
        return mask
    if known_numbers(ops.any(mask < 0)):
        raise ValueError(
            f"`{name}` must not hold negative numbers: a mask that is added to the "
            "scores belongs in `attention_bias` (`bias` of `dot_product_attention`), "
            f'and in `{name}` non-zero means "may attend". '
            f"Received: {name} of dtype {dtype_name(mask)} with a lowest number of "
            f"{float(known_numbers(ops.cast(ops.min(mask), 'float32'))):g}"
        )
    if warn:
        warnings.warn(
            "A mask of floating-point numbers is taken as booleans: non-zero means "
            '"may attend". A mask that is to be added to the scores belongs in '
            "`attention_bias` (`bias` of `dot_product_attention`).",
            stacklevel=5,
        )
    return ops.cast(mask, "bool")


def check_dense_shape(name: str, shape: Shape, scores_shape: Shape) -> None:
    """Raises if booleans of this shape cannot mask scores of shape `(B, N, T, S)`."""
    full = (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape
    if len(shape) < 2 or not _checks.broadcasts_to(full, scores_shape):
        raise ValueError(
            f"`{name}` must have the shape (T, S), (B, T, S) or (B, N, T, S) and "
            f"broadcast to the scores, (B, N, T, S) = {tuple(scores_shape)}. "
            f"Received: {name} of shape {tuple(shape)}"
        )


def hold_tensor(mask: Any, name: str, rank: int | None = None) -> None:
    """Makes the field `name` a tensor, once, and checks what can be seen of it."""
    kind, value = type(mask).__name__, getattr(mask, name)
    if is_symbolic(value):
        raise TypeError(
            f"`{name}` of {kind} cannot be a KerasTensor: a Functional model does not "
            "look inside mask objects. Give the layer the tensor itself, as "
            "`attention_mask=`, `query_mask=`, `value_mask=` or `segment_ids=`."
        )
    tensor = as_tensor(value)
    if tensor is None:
        raise TypeError(
            f"`{name}` of {kind} must be an array or a tensor of booleans or numbers. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    value = tensor
    if rank is not None and len(value.shape) != rank:
        raise ValueError(
            f"`{name}` of {kind} must have {rank} axes. "
            f"Received: shape {tuple(value.shape)}"
        )
    object.__setattr__(mask, name, value)


def check_shape(mask: Any, name: str, value: Tensor, expected: Shape) -> None:
    if not _checks.broadcasts_to(tuple(value.shape), expected):
        raise ValueError(
            f"`{name}` of {type(mask).__name__} must have the shape {expected}. "
            f"Received: shape {tuple(value.shape)}"
        )


def check_int_or_vector(mask: Any, name: str, minimum: int | None = None) -> None:
    value = getattr(mask, name)
    if hasattr(value, "shape") and len(value.shape) > 0:
        hold_tensor(mask, name, rank=1)
        if not is_integer(getattr(mask, name)):
            raise TypeError(
                f"`{name}` of {type(mask).__name__} must hold whole numbers. "
                f"Received: dtype {dtype_name(value)}"
            )
    else:
        object.__setattr__(mask, name, _checks.integer(name, value, minimum))


def check_vector(mask: Any, name: str, scores_shape: Shape) -> None:
    value = getattr(mask, name)
    if not isinstance(value, int):
        check_shape(mask, name, value, scores_shape[:1])
