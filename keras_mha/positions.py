"""Layers that say where tokens stand, for the argument `position` of the attention."""

from keras_mha.biases import Bias
from keras_mha.layers.mixed_rotary import MixedRotaryEmbedding
from keras_mha.layers.position_bias import ALiBi, PositionBias, RelativePositionBias
from keras_mha.layers.rotary_embedding import RotaryEmbedding

__all__ = [
    "ALiBi",
    "Bias",
    "MixedRotaryEmbedding",
    "PositionBias",
    "RelativePositionBias",
    "RotaryEmbedding",
]
