"""Lets `keras_mha.attention_maps` watch how layers attend while a model runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

# By thread: another one that runs the same model is not watched. A dictionary and no
# context variable, since compilers can see that it is empty.
_watchers: dict[int, Callable] = {}


@contextlib.contextmanager
def watching(watcher: Callable[..., None]) -> Iterator[None]:
    """Has `watcher(layer, query, key, value, **arguments)` called before each attention
    of a layer in this thread, with the arguments of `dot_product_attention`."""
    thread = threading.get_ident()
    before = _watchers.get(thread)
    _watchers[thread] = watcher
    try:
        yield
    finally:
        del _watchers[thread]
        if before is not None:
            _watchers[thread] = before


def note(layer: Any, *heads: Any, **arguments: Any) -> None:
    """Tells this thread's watcher, if there is one, of a layer's attention."""
    if is_on():
        _watchers[threading.get_ident()](layer, *heads, **arguments)


def is_on() -> bool:
    """Whether this thread has a watcher."""
    return bool(_watchers) and threading.get_ident() in _watchers
