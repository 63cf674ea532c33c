"""Models on several devices, on the engines that exist for that."""

from keras_mha.distribution.layouts import layout_map

__all__ = ["layout_map"]
