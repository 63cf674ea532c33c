"""What the kernels need of a backend and `keras.ops` does not give.

Each module here offers the same functions: loops that do not unroll, arrays of tiles
that are written in place where the backend can, matrix products of transposed operands
and a gradient of one's own.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import keras

_NAMES = ("jax", "tensorflow", "torch")
_NAME = keras.backend.backend()
# Looked up once: TensorFlow's AutoGraph would follow an import inside of a function.
_CURRENT = importlib.import_module(f"{__name__}.{_NAME}") if _NAME in _NAMES else None


def as_written(function: Callable) -> Callable:
    """Returns the function, which no compiler is to translate from its source."""
    return function if _CURRENT is None else _CURRENT.as_written(function)


def current() -> ModuleType:
    """Returns the module for the backend that Keras runs on."""
    if _CURRENT is None:
        raise ImportError(
            f"keras_mha runs on the backends {', '.join(_NAMES)}. "
            f"Keras is set to {_NAME!r} (environment variable KERAS_BACKEND)."
        )
    return _CURRENT
