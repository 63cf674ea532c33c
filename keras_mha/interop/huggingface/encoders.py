"""Readers of the modules of encoders, and of models with an encoder and a decoder."""

from typing import Any

import numpy as np

from keras_mha.interop.huggingface.parts import projection, projections, recipe
from keras_mha.interop.projections import Projection
from keras_mha.interop.recipe import Recipe
from keras_mha.layers.position_bias import RelativePositionBias


def bert(module: Any) -> Recipe:
    """Of a BertAttention; its residual and LayerNorm stay outside."""
    return bert_heads(module.self, projection(module, "output.dense"))


def bert_heads(module: Any, output: Projection | None = None) -> Recipe:
    """Of a BertSelfAttention or BertCrossAttention, which have no output projection."""
    kind = getattr(module, "position_embedding_type", None) or "absolute"
    if kind != "absolute":  # only before version 5 of transformers
        raise ValueError(
            "`module` must have no relative positions, which MultiHeadAttention has in "
            f"T5's form only. Received: position_embedding_type={kind!r}"
        )
    inputs = projections(module, "query", "key", "value")
    if output is None:
        output = Projection(np.eye(len(inputs[2].kernel), dtype="float32"))
    return recipe(
        *inputs,
        output,
        width=module.attention_head_size,
        dropout=module.dropout.p,
    )


def distilbert(module: Any) -> Recipe:
    """Of a DistilBertSelfAttention."""
    names = ("q_lin", "k_lin", "v_lin", "out_lin")
    return recipe(
        *projections(module, *names),
        width=module.attention_head_size,
        dropout=module.dropout.p,
    )


def bart(module: Any) -> Recipe:
    """Of a BartAttention and its like; Whisper's key has no bias."""
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return recipe(
        *projections(module, *names), width=module.head_dim, dropout=module.dropout
    )


def vit(module: Any) -> Recipe:
    """Of a ViTAttention."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return recipe(
        *projections(module, *names),
        width=module.head_dim,
        dropout=module.attention_dropout,
    )


def swin(module: Any) -> Recipe:
    """Of a SwinAttention, whose tokens are those of a window, row by row."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    bias = module.relative_position_bias
    return recipe(
        *projections(module, *names),
        width=module.head_dim,
        dropout=module.attention_dropout,
        position=RelativePositionBias(window=tuple(bias.window_size)),
        weights={"position.table": bias.relative_position_bias_table},
    )


def t5(module: Any, position: RelativePositionBias | None = None) -> Recipe:
    """Of a T5Attention, with its own table of positions or the one that it shares."""
    weights = {}
    if module.has_relative_attention_bias:
        if position is not None:
            raise ValueError(
                "`position` must not be given for a module with a table of its own. "
                f"Received: position={position!r}, with a {type(module).__name__} "
                "that has a relative_attention_bias"
            )
        position = RelativePositionBias(**_t5_options(module))
        weights["position.table"] = module.relative_attention_bias.weight
    elif position is not None:
        _check_shared(module, position)
    return recipe(
        *projections(module, "q", "k", "v", "o"),
        width=module.key_value_proj_dim,
        dropout=module.dropout,
        scale=1.0,
        position=position,
        weights=weights,
    )


def _t5_options(module: Any) -> dict[str, Any]:
    return {
        "num_buckets": module.relative_attention_num_buckets,
        "max_distance": module.relative_attention_max_distance,
        "bidirectional": not module.is_decoder,
    }


def _check_shared(module: Any, position: Any) -> None:
    """Raises unless a position can be that of the stack that a module is from."""
    if not isinstance(position, RelativePositionBias):
        raise TypeError(
            "`position` must be a RelativePositionBias, that of the layer made of the "
            f"first block. Received: position={position!r} (of type "
            f"{type(position).__name__})"
        )
    wanted = _t5_options(module)
    found = {name: getattr(position, name) for name in wanted}
    if found != wanted:
        raise ValueError(
            "`position` must be that of the layer made of the same stack's first "
            f"block, with {wanted}. Received: a position with {found}"
        )
