"""Attention by the kernel that the backend ships, where it is exact and faster.

Today that is torch's `scaled_dot_product_attention`. TensorFlow ships none, and
`jax.nn.dot_product_attention` builds all T x S scores on a CPU, as the reference does.
"""

import keras

from keras_mha._keras import Tensor
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.masking import allowed_pairs
from keras_mha.masks import Causal, Mask


def refusal(call: AttentionCall) -> str | None:
    """Returns why the fused kernel cannot run this call, or `None` if it can."""
    backend = keras.backend.backend()
    if backend != "torch":
        return f"no fused kernel on the {backend} backend"
    if call.return_scores:
        return "the fused kernel does not return the scores"
    if call.dropout > 0:
        return "the fused kernel's dropout does not follow the layer's seed"
    if call.logit_soft_cap is not None:
        return "the fused kernel has no soft cap"
    if call.sink is not None:
        return "the fused kernel has no sink"
    return None


def attend(call: AttentionCall) -> tuple[Tensor, None]:
    """Runs one call of attention.

    Returns:
        The output, shape `(B, T, N, V)`, and `None`: there are no scores to return.
    """
    import torch

    # With a negative scale torch's own causal mask gives NaN; a mask of booleans not.
    causal = call.bias is None and call.scale > 0 and _is_causal(call.mask)
    mask, seen = (None, None) if causal else _torch_mask(call)
    output = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (call.query, call.key, call.value)),
        attn_mask=mask,
        is_causal=causal,
        scale=call.scale,
        enable_gqa=call.query.shape[2] != call.key.shape[2],
    )
    if seen is not None:
        output = torch.where(seen, output, 0.0)
    return output.transpose(1, 2), None


def _is_causal(mask: Mask | None) -> bool:
    return isinstance(mask, Causal) and isinstance(mask.offset, int) and not mask.offset


def _torch_mask(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """Returns torch's `attn_mask` and which rows see any key at all.

    A row that sees none is opened to all keys, so that no softmax is taken over
    nothing, and its output is set to zero afterwards, which also stops its gradients.
    """
    import torch

    allowed = allowed_pairs(call)
    if allowed is None:
        return None, None
    seen = allowed.any(dim=-1, keepdim=True)
    if call.bias is None:
        return allowed | ~seen, seen
    dtype = call.query.dtype
    # Finite, since a float32 bias may be out of the range of float16.
    bias = call.bias.clamp(min=torch.finfo(dtype).min).to(dtype)
    hidden = torch.where(seen, -torch.inf, 0.0).to(dtype)
    return torch.where(allowed, bias, hidden), seen
