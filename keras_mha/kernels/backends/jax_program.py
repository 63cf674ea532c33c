"""What is known of the program that a call is lowered into."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple


class Program(NamedTuple):
    """A program that calls are lowered into.

    Args:
        devices: How many devices it is for; `None` while it is traced, when nobody
            knows yet, and within `jax.shard_map`.
        is_kept: Whether it is exported, to be run by later versions too.
    """

    devices: int | None = None
    is_kept: bool = False


_TRACED = Program()
_program: ContextVar[Program] = ContextVar("program", default=_TRACED)


@contextlib.contextmanager
def lowering_into(program: Program) -> Iterator[None]:
    """Sets what `current` returns."""
    token = _program.set(program)
    try:
        yield
    finally:
        _program.reset(token)


def current() -> Program:
    """Returns what is known of the program."""
    return _program.get()
