"""A call as a function of floats alone, as what runs it again for a gradient needs it.

`keras.RematScope` hands a layer's call to the backend's own rematerialization. JAX then
traces whatever is among its arguments, booleans and mask objects too; TensorFlow
differentiates by positional arguments alone, by all of them, and in graphs takes no
others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from keras_mha._keras import Tensor, is_float


def as_function_of_floats(
    call: Callable, arguments: Mapping[str, Any]
) -> tuple[Callable, list[Tensor]]:
    """Returns a function, and the floats that it is to be called with.

    Args:
        call: A layer's `call`.
        arguments: What it is to be called with, by name.
    """
    leaves = keras.tree.flatten(dict(arguments))
    indices = [
        i for i, leaf in enumerate(leaves) if ops.is_tensor(leaf) and is_float(leaf)
    ]

    def function(*tensors):
        given = list(leaves)
        for index, tensor in zip(indices, tensors, strict=True):
            given[index] = tensor
        return call(**keras.tree.pack_sequence_as(dict(arguments), given))

    return function, [leaves[i] for i in indices]
