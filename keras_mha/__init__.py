"""Multi-head attention for Keras 3, correct on TensorFlow, JAX and PyTorch."""

import keras_mha._keras  # noqa: F401  first, to say what to do without a backend
from keras_mha import distribution, interop, masks, positions
from keras_mha.callbacks import AttentionRecorder
from keras_mha.inspect import attention_maps
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.ops.dot_product_attention import dot_product_attention, plan_attention
from keras_mha.ops.merge_attention import merge_attention
from keras_mha.plotting import plot_attention, plot_heads_over_image, plot_mask
from keras_mha.positions import (
    ALiBi,
    MixedRotaryEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
)
from keras_mha.summary import attention_summary

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "AttentionRecorder",
    "MixedRotaryEmbedding",
    "MultiHeadAttention",
    "RelativePositionBias",
    "RotaryEmbedding",
    "__version__",
    "attention_maps",
    "attention_summary",
    "distribution",
    "dot_product_attention",
    "interop",
    "masks",
    "merge_attention",
    "plan_attention",
    "plot_attention",
    "plot_heads_over_image",
    "plot_mask",
    "positions",
]
