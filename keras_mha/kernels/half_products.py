"""Products of half types: of half operands where a device has units for these.

A CPU multiplies float16 and bfloat16 no faster than float32, and everything is cast to
float32 there. GPUs and TPUs multiply them 4 to 16 times as fast, and add up in float32:
there operands stay what they are, and softmax and sums are float32 as everywhere.
"""

import math

from keras_mha._keras import Tensor, at_least_float32, dtype_name


def keeps_halves(device: str | None) -> bool:
    """Whether operands of half types are multiplied as such on a kind of device."""
    return device not in ("cpu", None)


def as_operand(x: Tensor, device: str | None) -> Tensor:
    """Returns what is multiplied there."""
    return x if keeps_halves(device) else at_least_float32(x)


def factors_of_scale(scale: float, query: Tensor) -> tuple[float, float]:
    """Returns two factors that make the scale: of a query and of its products.

    Times a power of two a query of a half type stays what it is, but for its exponent;
    times any other number it would be rounded again.
    """
    if dtype_name(query) not in ("float16", "bfloat16"):
        return scale, 1.0
    _, exponent = math.frexp(scale)
    # No more than what takes sums over wide heads back: float16 has few small numbers.
    early = 2.0 ** min(max(exponent - 1, -8), 0)
    return early, scale / early


def times(x: Tensor, factor: float) -> Tensor:
    """Returns `x * factor`."""
    return x if factor == 1 else x * factor
