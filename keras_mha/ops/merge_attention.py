"""Joins what was attended to in parts of the keys."""

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_mha import _checks
from keras_mha._keras import Tensor, at_least_float32, is_float


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins attention to parts of the keys into attention to all of them.

        lse    = log(exp(lse_1) + ... + exp(lse_n))
        output = exp(lse_1 - lse) output_1 + ... + exp(lse_n - lse) output_n

    The keys may be split over devices, caches or documents; the queries are the same in
    every part. A sink belongs into one part only. A row that sees nothing in any part
    gets zeros.

    Args:
        parts: For each part what `dot_product_attention(..., return_lse=True)` returned
            for it: the output, shape `(B, T, N, V)`, and the logarithms of the rows'
            sums, shape `(B, N, T)`.

    Returns:
        The output and the logarithms, as of one call with all keys: they can be merged
        with further parts.

    Raises:
        TypeError: If the parts are no pairs of floating-point tensors.
        ValueError: If there are none, or their shapes do not fit together.

    Example:

    >>> query = keras.random.normal((2, 10, 8, 64))
    >>> key = value = keras.random.normal((2, 12, 8, 64))
    >>> attend = functools.partial(keras_mha.dot_product_attention, return_lse=True)
    >>> first = attend(query, key[:, :5], value[:, :5])
    >>> second = attend(query, key[:, 5:], value[:, 5:])
    >>> output, lse = keras_mha.merge_attention([first, second])
    >>> output.shape
    (2, 10, 8, 64)

    References:
        Milakov and Gimelshein, 2018, Online normalizer calculation for softmax:
            https://arxiv.org/abs/1805.02867
    """
    _check(parts)
    dtype = parts[0][0].dtype
    lse = ops.stack([at_least_float32(lse) for _, lse in parts])
    top = ops.stop_gradient(ops.max(lse, axis=0))
    # Of rows that see nothing anywhere; minus infinity less itself is no number.
    top = ops.where(ops.isfinite(top), top, ops.zeros_like(top))
    sums = ops.exp(lse - top)
    total = ops.sum(sums, axis=0)
    seen = total > 0
    total = ops.where(seen, total, ops.ones_like(total))
    shares = ops.transpose(sums / total, (0, 1, 3, 2))[..., None]  # (n, B, T, N, 1)
    outputs = ops.stack([at_least_float32(output) for output, _ in parts])
    output = ops.sum(ops.cast(shares, outputs.dtype) * outputs, axis=0)
    nothing = ops.full_like(total, float("-inf"))
    return ops.cast(output, dtype), ops.where(seen, top + ops.log(total), nothing)


def _check(parts: Any) -> None:
    if not isinstance(parts, Sequence):
        raise TypeError(
            "`parts` must be a list of pairs (output, lse). "
            f"Received: parts of type {type(parts).__name__}"
        )
    if not parts:
        raise ValueError("`parts` must hold at least one part. Received: parts=[]")
    for part in parts:
        is_pair = isinstance(part, tuple | list) and len(part) == 2
        if not is_pair or not all(hasattr(x, "dtype") and is_float(x) for x in part):
            raise TypeError(
                "`parts` must be pairs of floating-point tensors, (output, lse), as "
                "dot_product_attention(..., return_lse=True) returns them. "
                f"Received: a part of type {type(part).__name__}"
            )
    shapes = [(tuple(output.shape), tuple(lse.shape)) for output, lse in parts]
    if not all(_fit(*shape, *shapes[0]) for shape in shapes):
        raise ValueError(
            "`parts` must be outputs of one shape (B, T, N, V), and their logarithms "
            f"of shape (B, N, T). Received: shapes {shapes}"
        )


def _fit(output: tuple, lse: tuple, first: tuple, first_lse: tuple) -> bool:
    if len(output) != 4 or len(lse) != 3:
        return False
    batch, rows, heads, _ = output
    pairs = zip((*output, *lse), (*first, batch, heads, rows), strict=True)
    return len(first) == 4 and all(_checks.same(*pair) for pair in pairs)
