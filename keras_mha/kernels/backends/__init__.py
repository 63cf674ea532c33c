"""What the blockwise kernel needs of a backend and `keras.ops` does not give.

Each module here offers the same functions: loops that do not unroll, arrays of tiles
that are written in place where the backend can, matrix products of transposed operands
and a gradient of one's own.
"""

import importlib
from types import ModuleType

import keras


def current() -> ModuleType:
    """Returns the module for the backend that Keras runs on."""
    return importlib.import_module(f"{__name__}.{keras.backend.backend()}")
