"""Times two functions in turns, for as long as it pays."""

import math
import random
import time
from collections.abc import Callable, Mapping

from keras_mha.bench.timing import summary

# What suffices: so many rounds once so many seconds have passed. Slow calls take few.
ENOUGH = ((0.5, 10), (2.0, 5), (8.0, 3))
# Until then they go on while the ratio's median is not known to a hundredth: calls of a
# millisecond scatter by a tenth and more.
PATIENCE = 8.0  # seconds
KNOWN = 0.01
MOST = 1000


def compare(
    functions: Mapping[str, Callable[[], object]],
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Times two functions in interleaved rounds, and how many times as long the second
    takes.

    Rounds go on until there are `ENOUGH` and the median is known or `PATIENCE` at its
    end; their order changes from one to the next.

    Args:
        functions: Two, by name; each must return only when its work is done.
        warm_ups: Integer, how often each is called beforehand, which the first time
            compiles it.
        clock: Returns the seconds now.

    Returns:
        For each name its `Times` and `"first"`, the seconds of its first call; for
        `"ratio"` median and quartiles of the rounds' ratios.
    """
    first = {name: _seconds(function, clock) for name, function in functions.items()}
    for function in list(functions.values()) * (warm_ups - 1):
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0).shuffle
    begin = clock()
    while not _suffices(clock() - begin, ratios := _ratios(found)):
        order = list(functions)
        shuffle(order)
        for name in order:
            found[name].append(_seconds(functions[name], clock))
    result = {
        name: summary(seconds)._asdict() | {"first": first[name]}
        for name, seconds in found.items()
    }
    result["ratio"] = summary(ratios)._asdict()
    return {name: _rounded(numbers) for name, numbers in result.items()}


def _ratios(found: Mapping[str, list[float]]) -> list[float]:
    """Of each round: what slows the machine down for a while slows both."""
    return [b / a for a, b in zip(*found.values(), strict=True)]


def _suffices(seconds: float, ratios: list[float]) -> bool:
    rounds = len(ratios)
    if rounds >= MOST:
        return True
    enough = any(seconds >= passed and rounds >= least for passed, least in ENOUGH)
    return enough and (seconds >= PATIENCE or _is_known(ratios))


def _is_known(ratios: list[float]) -> bool:
    """Whether the median's standard error is small, from the quartiles as if the ratios
    were normally distributed: 1.25 standard deviations by the root of the number."""
    median, low, high, rounds = summary(ratios)
    error = 1.25 * (high - low) / 1.35 / math.sqrt(rounds)
    return error <= KNOWN * median


def _seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    function()
    return clock() - begin


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    """Four digits say more than was measured."""
    return {
        key: x if isinstance(x, int) else float(f"{x:.4g}")
        for key, x in numbers.items()
    }
