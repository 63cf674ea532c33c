"""Which device has what of a cache, under `keras.distribution`."""

from typing import Any

import keras

from keras_mha.layers.cache import Cache
from keras_mha.ops.tensors import distributed


def shared_out(layer: Any, cache: Cache) -> Cache:
    """Returns a cache of self-attention in the layout in which devices share the batch
    and the heads of the layer's projections.

    Left to itself, a compiler starts from a cache that one device has all of, and at
    each step gathers heads that it had some devices compute for all.

    Args:
        layer: The layer. One that is not built says nothing of its heads yet.
        cache: The cache, before a call or after.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or not layer.built:
        return cache
    heads = {
        name: distribution.get_variable_layout(_kernel(dense)).axes[1]
        for name, dense in (("key", layer.key_dense), ("value", layer.value_dense))
    }
    batch = distribution.get_data_layout(cache["length"].shape).axes[0]
    return {
        name: distributed(x, (batch, None, heads.get(name), None)[: len(x.shape)])
        for name, x in cache.items()
    }


def _kernel(dense):
    return next(weight for weight in dense.weights if weight.name == "kernel")
