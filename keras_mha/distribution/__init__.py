"""Models on several devices, on the engines that exist for that."""

from keras_mha.distribution.layouts import layout_map
from keras_mha.distribution.sequence_parallel import SequenceParallel

__all__ = ["SequenceParallel", "layout_map"]
