"""Models on several devices, on the engines that exist for that."""

from keras_mha.distribution.fully_sharded import fully_shard
from keras_mha.distribution.gathering import gathered
from keras_mha.distribution.layouts import layout_map
from keras_mha.distribution.sequence_parallel import SequenceParallel
from keras_mha.distribution.tensor_parallel import parallelize

__all__ = ["SequenceParallel", "fully_shard", "gathered", "layout_map", "parallelize"]
