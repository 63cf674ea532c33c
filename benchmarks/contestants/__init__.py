"""Who is measured: ours and its peers, as functions that return when all is done.

A contestant is a pair of functions without arguments, `(forward, training)`. Training
is the forward pass and the gradients of inputs and weights.
"""

import importlib
from collections.abc import Callable

import keras

from benchmarks.cases import Case

Contestant = tuple[Callable[[], object], Callable[[], object]]


def contestants(case: Case, only: str | None = None) -> dict[str, Contestant]:
    """Makes the contestants of a case for the current backend.

    Args:
        case: What is measured.
        only: String, the one contestant wanted; `None` for all.
    """
    backend = keras.backend.backend()
    module = importlib.import_module(f"benchmarks.contestants.{backend}")
    makers = module.makers(case)
    return {
        name: make(case)
        for name, make in makers.items()
        if only is None or name == only
    }
