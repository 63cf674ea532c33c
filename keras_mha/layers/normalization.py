"""Normalisation of query and key heads before their dot product.

References:
    Henry et al., 2020, Query-Key Normalization: https://arxiv.org/abs/2010.04245
    Dehghani et al., 2023, ViT-22B: https://arxiv.org/abs/2302.05442
    Zhang and Sennrich, 2019, RMSNorm: https://arxiv.org/abs/1910.07467
"""

from keras import ops

from keras_mha._keras import Tensor, at_least_float32

QK_NORMS = (None, "rms", "layer", "l2")


def normalize_heads(
    x: Tensor, kind: str, epsilon: float, scale: Tensor | None
) -> Tensor:
    """Normalises the last axis of `x`, in float32 at least.

        rms    x / sqrt(mean(x^2) + epsilon) * scale
        layer  (x - mean(x)) / sqrt(variance(x) + epsilon) * scale
        l2     x / max(|x|, epsilon)

    Args:
        x: Heads, shape `(..., H)`.
        kind: `"rms"`, `"layer"` or `"l2"`.
        epsilon: Keeps the division from zero.
        scale: The learned factor of each feature, shape `(H,)`; `None` for `"l2"`.

    Returns:
        A tensor with the shape and dtype of `x`.
    """
    dtype = x.dtype
    x = at_least_float32(x)
    if kind == "l2":
        squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
        # The square of a tiny epsilon would be 0 in float32.
        smallest = max(epsilon**2, 1e-36)
        return ops.cast(x * ops.rsqrt(ops.maximum(squares, smallest)), dtype)
    if kind == "layer":
        x = x - ops.mean(x, axis=-1, keepdims=True)
    squares = ops.mean(ops.square(x), axis=-1, keepdims=True)
    x = x * ops.rsqrt(squares + epsilon)
    return ops.cast(x * ops.cast(scale, x.dtype), dtype)
