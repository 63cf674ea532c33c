"""What of a mask or a bias object is no tensor: compared by what it is.

`parts.split_tensors` makes these, and compilers keep programs for equal ones.
"""

import types
from typing import Any, NamedTuple

import numpy as np


def as_constants(part: Any) -> Any:
    """Returns parts as tuples of values that are what they are to every compiler:
    `torch.compile` does not hand objects that are made in its program to others."""
    if isinstance(part, Whole):
        return _WHOLE, _settled(part.value)
    if isinstance(part, Function):
        return _FUNCTION, part.function
    if isinstance(part, Parts):
        return _PARTS, as_constants(part.kind), as_constants(part.parts)
    if isinstance(part, tuple):
        return _TUPLE, *(as_constants(each) for each in part)
    return _settled(part)


def _settled(value):
    """Returns a value, as a number that is one where a compiler left it open: what is
    in a set must be known."""
    return next(iter({value})) if type(value) in (int, float) else value


def from_constants(constants: Any) -> Any:
    """The way back from `as_constants`."""
    if not isinstance(constants, tuple):
        return constants
    kind, *values = constants
    if kind == _WHOLE:
        return Whole(*values)
    if kind == _FUNCTION:
        return Function(*values)
    values = [from_constants(each) for each in values]
    return Parts(*values) if kind == _PARTS else tuple(values)


TENSOR = "a tensor"
_WHOLE, _FUNCTION, _PARTS, _TUPLE = "a whole", "a function", "parts", "a tuple"


class Parts(NamedTuple):
    """A mask, a container or a function, and what it holds."""

    kind: Any
    parts: tuple


class Function:
    """A function without what it closes over and its defaults; equal for equal code."""

    def __init__(self, function: types.FunctionType):
        self.function = function
        self._key = function.__code__, id(function.__globals__)

    def holding(
        self, values: tuple, defaults: tuple | None, keyword_defaults: dict | None
    ) -> types.FunctionType:
        """Returns the function closed over these values, with these defaults."""
        old = self.function
        cells = tuple(types.CellType(value) for value in values)
        new = types.FunctionType(
            old.__code__, old.__globals__, old.__name__, defaults, cells
        )
        new.__kwdefaults__ = keyword_defaults
        return new

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self._key == other._key


class Whole:
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
        return isinstance(other, Whole) and self._key == other._key


def is_of_package(part: Any) -> bool:
    """Whether parts are of masks and biases of this package only, and hold nothing that
    a user wrote."""
    if isinstance(part, Whole):
        values = int, float, str, np.ndarray, np.generic, type(None)
        return isinstance(part.value, values)
    if isinstance(part, Parts):
        module = getattr(part.kind, "__module__", "")
        is_known = module.partition(".")[0] in ("keras_mha", "builtins")
        return isinstance(part.kind, type) and is_known and is_of_package(part.parts)
    if isinstance(part, tuple):
        return all(map(is_of_package, part))
    return part is None or isinstance(part, str)
