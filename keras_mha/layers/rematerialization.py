"""A call as a function of floats alone, as what runs it again for a gradient needs it.

`keras.RematScope` hands a layer's call to the backend's own rematerialization. JAX then
traces whatever is among its arguments, booleans and mask objects too; TensorFlow
differentiates by positional arguments alone, by all of them, and in graphs takes no
others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_mha._keras import Tensor, get_keras_mask, is_float, set_keras_mask


def as_function_of_floats(
    call: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable, list[Tensor]]:
    """Returns a function, and the floats that it is to be called with.

    Args:
        call: A layer's `call`.
        args: What it is to be called with, by position.
        kwargs: By name.
    """
    arguments = tuple(args), dict(kwargs)
    leaves = keras.tree.flatten(arguments)
    indices = [
        i for i, leaf in enumerate(leaves) if ops.is_tensor(leaf) and is_float(leaf)
    ]

    def function(*floats):
        given = list(leaves)
        for index, x in zip(indices, floats, strict=True):
            given[index] = x
            # It may be another tensor, which carries no mask.
            if (mask := get_keras_mask(leaves[index])) is not None:
                set_keras_mask(x, mask)
        args, kwargs = keras.tree.pack_sequence_as(arguments, given)
        return call(*args, **kwargs)

    return function, [leaves[i] for i in indices]
