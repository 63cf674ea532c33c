"""Takes masks and bias objects apart into what can be compared, and their tensors.

A compiled program is kept for calls that differ in tensors only, and gradients pass
tensors as arguments: neither may find them hidden in an object. They are looked for in
attributes, in lists, tuples and dictionaries there, and in what functions close over.
"""

import types
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_mha._keras import Tensor
from keras_mha.biases import Bias, Positions
from keras_mha.kernels import backends
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
            return _TENSOR
        if isinstance(value, Mask | Bias | Positions) and hasattr(value, "__dict__"):
            return _Parts(type(value), _named(vars(value)))
        if type(value) is dict:
            return _Parts(dict, _named(value))
        if type(value) in (list, tuple):
            return _Parts(type(value), tuple(split(each) for each in value))
        if isinstance(value, types.FunctionType):
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            # A function that calls itself closes over itself.
            if all(cell is not value for cell in cells):
                held = (cells, value.__defaults__, value.__kwdefaults__)
                return _Parts(_Function(value), tuple(split(each) for each in held))
        return _Whole(value)

    def _named(values):
        return tuple((name, split(value)) for name, value in values.items())

    return split(mask), tuple(tensors)


def join_tensors(parts: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The way back from `split_tensors`: an equal mask, not the same object."""
    rest = iter(tensors)

    def join(part):
        if part is _TENSOR:
            return next(rest)
        if isinstance(part, _Whole):
            return part.value
        if isinstance(part.kind, _Function):
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


_TENSOR = "a tensor"


class _Parts(NamedTuple):
    """A mask, a container or a function, and what it holds."""

    kind: Any
    parts: tuple


class _Function:
    """A function without what it closes over and its defaults; equal for equal code."""

    def __init__(self, function: types.FunctionType):
        self._function = function
        self._key = function.__code__, id(function.__globals__)

    def holding(
        self, values: tuple, defaults: tuple | None, keyword_defaults: dict | None
    ) -> types.FunctionType:
        """Returns the function closed over these values, with these defaults."""
        old = self._function
        cells = tuple(types.CellType(value) for value in values)
        new = types.FunctionType(
            old.__code__, old.__globals__, old.__name__, defaults, cells
        )
        new.__kwdefaults__ = keyword_defaults
        return new

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and self._key == other._key


class _Whole:
    """A value that is compared by itself if it can be hashed, else by identity; NumPy
    arrays by what they hold."""

    def __init__(self, value: Any):
        self.value = value
        if isinstance(value, np.ndarray):
            self._key = "array", value.shape, value.dtype.str, value.tobytes()
            return
        try:
            hash(value)
            self._key = type(value), value
        except TypeError:
            self._key = "object", id(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Whole) and self._key == other._key
