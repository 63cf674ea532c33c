"""Times functions side by side, in turns, so that a noisy machine is noisy for all."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Times(NamedTuple):
    """What a function took.

    Args:
        median: Seconds.
        low: Seconds, the first quartile.
        high: Seconds, the third quartile.
        rounds: How often it was timed.
    """

    median: float
    low: float
    high: float
    rounds: int


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 3,
    most: int = 50,
) -> dict[str, Times]:
    """Times functions in interleaved rounds: each once, then each once again.

    The order changes from round to round, since who comes after a function that fills
    the caches pays for it.

    Args:
        functions: By name; each must return only when its work is done. Each is called
            once beforehand, to compile.
        seconds: About how long to go on.
        least: Number of rounds to do however long they take.
        most: Number of rounds to stop after.

    Returns:
        The times of each function.
    """
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        order = list(functions)
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            found[name].append(time.perf_counter() - start)
    return {name: summary(times) for name, times in found.items()}


def summary(times: list[float]) -> Times:
    """Returns the median and the quartiles of some seconds."""
    low, median, high = (
        statistics.quantiles(times, n=4, method="inclusive")
        if len(times) > 1
        else times * 3
    )
    return Times(median, low, high, len(times))
