"""What is known of the program that a call is lowered into."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_devices: ContextVar[int | None] = ContextVar("devices", default=None)


@contextlib.contextmanager
def of_devices(count: int | None) -> Iterator[None]:
    """Sets for `device_count` how many devices the program is for."""
    token = _devices.set(count)
    try:
        yield
    finally:
        _devices.reset(token)


def device_count() -> int | None:
    """Returns how many devices the program is for; `None` while it is traced, when
    nobody knows yet, and within `jax.shard_map`."""
    return _devices.get()
