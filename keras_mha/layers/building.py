"""Tells which attention layer makes its weights now, to whoever lays them out."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_current = threading.local()


@contextlib.contextmanager
def building(layer: Any) -> Iterator[None]:
    """Says in this thread that a layer makes its weights."""
    before, _current.layer = current(), layer
    try:
        yield
    finally:
        _current.layer = before


def current() -> Any:
    """Returns the innermost attention layer that makes its weights, or `None`."""
    return getattr(_current, "layer", None)
