"""Checks of arguments: each names the argument, what came and what is expected."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_mha._keras import Shape


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """Returns `value` as an int, or raises if it is none or below `minimum`."""
    expected = "an integer" if minimum is None else f"an integer of at least {minimum}"
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(
            f"`{name}` must be {expected}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    value = operator.index(value)
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value}")
    return value


def integers(name: str, value: Any, minimum: int | None = None) -> list[int]:
    """Returns one integer or several as a list, or raises as `integer` does."""
    several = [value] if np.ndim(value) == 0 else value
    return [integer(name, each, minimum) for each in several]


def positive_integer(name: str, value: Any) -> int:
    """Returns `value` as an int of at least one, or raises."""
    return integer(name, value, minimum=1)


def boolean(name: str, value: Any) -> bool:
    """Returns `value` as a bool, or raises; 0 and 1 pass, as they do in Keras."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_ | int) and value in (0, 1):
        return bool(value)
    raise TypeError(
        f"`{name}` must be True or False. "
        f"Received: {name}={value!r} (of type {type(value).__name__})"
    )


def number(name: str, value: Any) -> float:
    """Returns `value` as a finite float, or raises."""
    is_real = type(value) is float or (
        isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    )
    if not is_real:
        raise TypeError(
            f"`{name}` must be a number. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    if not abs(value) < math.inf:  # `torch.compile` reads no `math.isfinite`
        raise ValueError(f"`{name}` must be finite. Received: {name}={value}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Returns `value` as a finite float above zero, or raises."""
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be above 0. Received: {name}={value}")
    return value


def dropout_rate(name: str, value: Any) -> float:
    """Returns `value` as a float from 0 to 1, or raises."""
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(
            f"`{name}` must be from 0 to 1 (the share of attention weights to drop). "
            f"Received: {name}={value}"
        )
    return value


def choice(name: str, value: Any, options: Sequence[Any]) -> Any:
    """Returns `value` if it is one of `options`, or raises."""
    if not (value is None or isinstance(value, str)) or value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(
            f"`{name}` must be one of {listed}. Received: {name}={value!r}"
        )
    return value


def same(a: int | None, b: int | None) -> bool:
    """Whether two lengths agree as far as they are known."""
    return a is None or b is None or a == b


def broadcasts_to(shape: Shape, target: Shape) -> bool:
    """Whether `shape` broadcasts to `target`, aligned at the right, as NumPy does."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(
        size == 1 or same(size, goal) for size, goal in zip(shape, tail, strict=True)
    )
