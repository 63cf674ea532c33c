"""Tells which layer that knows of heads makes its weights now, to who shares them."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_current = threading.local()


@contextlib.contextmanager
def building(layer: Any) -> Iterator[None]:
    """Says in this thread that a layer makes its weights, which belong to heads."""
    before, _current.layer = current(), layer
    try:
        yield
    finally:
        _current.layer = before


def current() -> Any:
    """Returns the innermost such layer, or `None`."""
    return getattr(_current, "layer", None)
