"""Weights from other layers and frameworks, and back.

A neighbour's package is imported when its function is called, not before.
"""

from keras_mha.interop.convert_model import ConversionReport, convert_model
from keras_mha.interop.flax import from_flax
from keras_mha.interop.huggingface import from_huggingface
from keras_mha.interop.keras import from_keras
from keras_mha.interop.projections import set_projections
from keras_mha.interop.torch import from_torch, to_torch

__all__ = [
    "ConversionReport",
    "convert_model",
    "from_flax",
    "from_huggingface",
    "from_keras",
    "from_torch",
    "set_projections",
    "to_torch",
]
