"""Readers of the modules of decoders."""

from typing import Any

from keras_mha.interop.huggingface.parts import (
    projection,
    projections,
    recipe,
    split,
    split_heads,
)
from keras_mha.interop.huggingface.rotary import rotary
from keras_mha.interop.projections import as_numpy
from keras_mha.interop.recipe import Recipe
from keras_mha.layers.position_bias import ALiBi


def gpt2(module: Any) -> Recipe:
    """Of a GPT2Attention, for self- or cross-attention."""
    fused = projection(module, "c_attn")
    size = module.num_heads * module.head_dim
    if module.is_cross_attention:
        inputs = [projection(module, "q_attn"), *split(fused, size, size)]
    else:
        inputs = split(fused, size, size, size)
    scale = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    if module.scale_attn_by_inverse_layer_idx:
        scale /= module.layer_idx + 1
    return recipe(
        *inputs,
        projection(module, "c_proj"),
        width=module.head_dim,
        dropout=module.attn_dropout.p,
        scale=scale,
    )


def bloom(module: Any) -> Recipe:
    """Of a BloomAttention; its residual stays outside."""
    fused = projection(module, "query_key_value")
    return recipe(
        *split_heads(fused, module.num_heads),
        projection(module, "dense"),
        width=module.head_dim,
        dropout=module.attention_dropout.p,
        position=ALiBi(),
    )


def llama(module: Any) -> Recipe:
    """Of a LlamaAttention: grouped heads and rotary positions."""
    return _rotary_heads(module)


def mistral(module: Any) -> Recipe:
    """Of a MistralAttention: every layer has the window."""
    return _rotary_heads(module, sliding_window=module.config.sliding_window)


def qwen2(module: Any) -> Recipe:
    """Of a Qwen2Attention: some layers have a window."""
    return _rotary_heads(module, sliding_window=module.sliding_window)


def qwen3(module: Any) -> Recipe:
    """Of a Qwen3Attention: with normalised heads."""
    return _rotary_heads(
        module,
        sliding_window=module.sliding_window,
        qk_norm="rms",
        qk_norm_epsilon=module.q_norm.variance_epsilon,
        weights=_norm_scales(module, 0.0),
    )


def gemma2(module: Any) -> Recipe:
    """Of a Gemma2Attention: with capped scores."""
    return _rotary_heads(
        module,
        sliding_window=module.sliding_window,
        logit_soft_cap=module.attn_logit_softcapping,
    )


def gemma3(module: Any) -> Recipe:
    """Of a Gemma3Attention: normalised heads, by scales that are stored less 1.

    It has a soft cap as an attribute, but makes no use of it.
    """
    return _rotary_heads(
        module,
        sliding_window=module.sliding_window,
        qk_norm="rms",
        qk_norm_epsilon=module.q_norm.eps,
        weights=_norm_scales(module, 1.0),
    )


def gpt_oss(module: Any) -> Recipe:
    """Of a GptOssAttention: with learned sinks."""
    return _rotary_heads(
        module,
        sliding_window=module.sliding_window,
        attention_sink="learned",
        weights={"sink": module.sinks},
    )


def phi3(module: Any) -> Recipe:
    """Of a Phi3Attention: fused, and part of the features may rotate."""
    fused, output = projections(module, "qkv_proj", "o_proj")
    width = module.head_dim
    groups = module.num_key_value_heads * width
    return recipe(
        *split(fused, len(fused.kernel) - 2 * groups, groups, groups),
        output,
        width=width,
        dropout=module.attention_dropout,
        position=rotary(module, can_be_partial=True),
        sliding_window=_checked_window(module, module.config.sliding_window),
    )


def _rotary_heads(module: Any, sliding_window: int | None = None, **options) -> Recipe:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return recipe(
        *projections(module, *names),
        width=module.head_dim,
        dropout=module.attention_dropout,
        scale=module.scaling,
        position=rotary(module),
        sliding_window=_checked_window(module, sliding_window),
        **options,
    )


def _checked_window(module: Any, window: int | None) -> int | None:
    """Returns the window, or raises where it is counted otherwise."""
    if window is not None and not getattr(module.config, "is_causal", True):
        raise ValueError(
            "`module` must not have a window without a causal mask, which transformers "
            f"then makes wider by one. Received: sliding_window={window} and "
            "is_causal=False in the configuration"
        )
    return window


def _norm_scales(module: Any, offset: float) -> dict[str, Any]:
    return {
        "query_norm_scale": as_numpy(module.q_norm.weight) + offset,
        "key_norm_scale": as_numpy(module.k_norm.weight) + offset,
    }
