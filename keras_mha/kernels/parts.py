"""Takes masks and bias objects apart into what can be compared, and their tensors.

A compiled program is kept for calls that differ in tensors only, and gradients pass
tensors as arguments: neither may find them hidden in an object. They are looked for in
attributes, in lists, tuples and dictionaries there, and in what functions close over.
"""

import types
from typing import Any

import keras
from keras import ops

from keras_mha._keras import Tensor
from keras_mha.biases import Bias, Positions
from keras_mha.kernels import backends
from keras_mha.kernels.static_parts import TENSOR, Function, Parts, Whole
from keras_mha.masks import Mask


def split_tensors(mask: Mask | Bias | None) -> tuple[Any, tuple[Tensor, ...]]:
    """Takes a mask or a bias object apart.

    Returns:
        What `join_tensors` makes the mask of again, given the tensors or others, and
        the tensors. Masks that differ in nothing but their tensors have equal parts.
    """
    tensors: list[Tensor] = []

    def split(value):
        if isinstance(value, keras.Variable):
            value = value.value
        if ops.is_tensor(value):
            # TensorFlow's own variables may not come into a gradient of one's own.
            tensors.append(backends.current().plain(value))
            return TENSOR
        if isinstance(value, Mask | Bias | Positions) and hasattr(value, "__dict__"):
            return Parts(type(value), _named(vars(value)))
        if type(value) is dict:
            return Parts(dict, _named(value))
        if type(value) in (list, tuple):
            return Parts(type(value), tuple(split(each) for each in value))
        if isinstance(value, types.FunctionType):
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            # A function that calls itself closes over itself.
            if all(cell is not value for cell in cells):
                held = (cells, value.__defaults__, value.__kwdefaults__)
                return Parts(Function(value), tuple(split(each) for each in held))
        return Whole(value)

    def _named(values):
        return tuple((name, split(value)) for name, value in values.items())

    return split(mask), tuple(tensors)


def join_tensors(parts: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The way back from `split_tensors`: an equal mask, not the same object."""
    rest = iter(tensors)

    def join(part):
        if part == TENSOR:
            return next(rest)
        if isinstance(part, Whole):
            return part.value
        if isinstance(part.kind, Function):
            return part.kind.holding(*(join(each) for each in part.parts))
        if part.kind in (list, tuple):
            return part.kind(join(each) for each in part.parts)
        named = {name: join(each) for name, each in part.parts}
        if part.kind is dict:
            return named
        mask = object.__new__(part.kind)
        for name, value in named.items():
            object.__setattr__(mask, name, value)
        return mask

    return join(parts)
