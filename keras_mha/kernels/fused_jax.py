"""JAX's fused kernel: cuDNN's, for half types on NVIDIA's GPUs."""

import jax

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import is_plain_causal

_WIDTHS = range(8, 129, 8)


def refusal(call: AttentionCall) -> str | None:
    """Returns why cuDNN cannot run this call, or `None` if it can."""
    if call.dropout > 0:
        return "the fused kernel's dropout does not follow the layer's seed"
    if call.logit_soft_cap is not None:
        return "the fused kernel has no soft cap"
    if call.sink is not None:
        return "the fused kernel has no sink"
    if not _has_cudnn():
        return "no fused kernel on the jax backend without an NVIDIA GPU"
    if dtype_name(call.query) not in ("float16", "bfloat16"):
        return "cuDNN's kernel takes float16 and bfloat16 only"
    if call.query.shape[3] not in _WIDTHS or call.value.shape[3] != call.query.shape[3]:
        return "cuDNN's kernel takes heads of one width, a multiple of 8 up to 128"
    if call.has_bias:
        return "a bias is not handed to cuDNN's kernel"
    if call.mask is not None and not is_plain_causal(call.mask):
        return "cuDNN's kernel takes no mask but the causal one"
    if any(not _even(x.shape[1]) for x in (call.query, call.key)):
        return "cuDNN's kernel takes even lengths only"
    return None


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    return jax.nn.dot_product_attention(
        call.query,
        call.key,
        call.value,
        scale=call.scale,
        is_causal=call.mask is not None,
        implementation="cudnn",
    )


def _has_cudnn() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return "cuda" in jax.devices()[0].client.platform_version.lower()


def _even(length: object) -> bool:
    return isinstance(length, int) and length > 0 and length % 2 == 0
