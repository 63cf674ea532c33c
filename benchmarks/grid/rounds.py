"""Times functions of two kinds in turns, for as long as it pays."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from keras_mha.bench.timing import summary

# What suffices: so many rounds once so many seconds have passed. Slow calls take few.
ENOUGH = ((0.5, 10), (2.0, 5), (8.0, 3))
# Until then they go on while the ratio's median is not known to a hundredth (of several
# copies to as many times less): calls of a millisecond scatter by a tenth and more.
PATIENCE = 8.0  # seconds
KNOWN = 0.01
MOST = 1000


def compare(
    functions: Mapping[str, Sequence[Callable[[], object]]],
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Times functions of two names in interleaved rounds, and how many times as long
    those of the second take.

    A round calls all, in an order that changes, and takes the median of each name's.
    With `n` functions a name, rounds go on until there are `ENOUGH` of them and either
    the ratio's median is known to `KNOWN / n` or `n * PATIENCE` has passed, or until
    there are `MOST`.

    Args:
        functions: By name one function or several that do the same, of both names as
            many; each must return only when its work is done.
        warm_ups: Integer, how often each is called beforehand, which the first time
            compiles it.
        clock: Returns the seconds now.

    Returns:
        For each name the `Times` of its rounds and `"first"`, the seconds of the first
        call of its first function; for `"ratio"` median and quartiles of the rounds'
        ratios, and `"copies"`, the number of functions a name.
    """
    (copies,) = {len(each) for each in functions.values()}
    every = [(name, each) for name in functions for each in functions[name]]
    first: dict[str, float] = {}
    for name, function in every:
        first.setdefault(name, _seconds(function, clock))
    for _, function in every * (warm_ups - 1):
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0).shuffle
    begin = clock()
    while not _suffices(clock() - begin, ratios := _ratios(found), copies):
        shuffle(every)
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for name, function in every:
            taken[name].append(_seconds(function, clock))
        for name, seconds in taken.items():
            found[name].append(statistics.median(seconds))
    result = {
        name: summary(seconds)._asdict() | {"first": first[name]}
        for name, seconds in found.items()
    }
    result["ratio"] = summary(ratios)._asdict() | {"copies": copies}
    return {name: _rounded(numbers) for name, numbers in result.items()}


def _ratios(found: Mapping[str, list[float]]) -> list[float]:
    """Of each round: what slows the machine down for a while slows both."""
    return [b / a for a, b in zip(*found.values(), strict=True)]


def _suffices(seconds: float, ratios: list[float], copies: int) -> bool:
    rounds = len(ratios)
    if rounds >= MOST:
        return True
    enough = any(seconds >= passed and rounds >= least for passed, least in ENOUGH)
    patience, known = PATIENCE * copies, KNOWN / copies
    return enough and (seconds >= patience or _error(ratios) <= known)


def _error(ratios: list[float]) -> float:
    """The median's standard error as a part of it, from the quartiles as if the ratios
    were normally distributed: 1.25 standard deviations by the root of the number."""
    median, low, high, rounds = summary(ratios)
    return 1.25 * (high - low) / 1.35 / math.sqrt(rounds) / median


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
