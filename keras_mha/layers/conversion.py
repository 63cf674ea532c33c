"""What a call's arguments become: tensors, and floats in the layer's compute dtype."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_mha._keras import (
    Tensor,
    get_keras_mask,
    is_symbolic,
    set_keras_mask,
    to_tensor,
    without_autocast,
)
from keras_mha.ops.tensors import constant, is_read_by_compiler


def converted(
    layer: keras.layers.Layer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    uncast: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Converts arguments as Keras does, but for one that keeps its precision.

    A model under construction keeps what it was given: each run of it comes here again.

    Args:
        layer: The layer called.
        args: By position.
        kwargs: By name.
        uncast: The name of the argument that is made a tensor and not cast.

    Returns:
        The new `args` and `kwargs`.
    """
    policy, dtype = layer.dtype_policy, layer.input_dtype
    is_building = _any_symbolic((*args, *kwargs.values()))

    def convert(x, autocast=layer.autocast):
        if x is None or (is_building and not isinstance(x, np.ndarray)):
            return x
        if isinstance(x, np.ndarray):
            x = _with_its_dtype(x)
        y = policy.convert_input(x, autocast, dtype)
        mask = None if y is x else get_keras_mask(x)
        if mask is not None:
            set_keras_mask(y, mask)
        return y

    args = tuple(_mapped(convert, x) for x in args)
    others = {name: _mapped(convert, x) for name, x in kwargs.items() if name != uncast}
    if uncast not in kwargs:
        return args, others
    with without_autocast():
        return args, {**others, uncast: convert(kwargs[uncast], autocast=False)}


def _with_its_dtype(x: np.ndarray) -> Tensor:
    """Makes whole numbers and booleans a tensor of such, which Keras may not."""
    if is_read_by_compiler():
        return constant(x)
    return to_tensor(x) if x.dtype.kind in "biu" else x


def _any_symbolic(values: Sequence[Any]) -> bool:
    return any(
        any(map(is_symbolic, keras.tree.flatten(x)))
        if isinstance(x, list | tuple | dict)
        else is_symbolic(x)
        for x in values
    )


def _mapped(function: Callable, x: Any) -> Any:
    if isinstance(x, list | tuple | dict):
        return keras.tree.map_structure(function, x)
    return function(x)
