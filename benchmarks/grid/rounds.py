"""Times two functions in turns, for as long as it pays."""

import random
import time
from collections.abc import Callable, Mapping

from keras_mha.bench.timing import summary

# What suffices: so many rounds once so many seconds have passed. Slow calls take few.
ENOUGH = ((0.5, 10), (2.0, 5), (8.0, 3))
MOST = 1000


def compare(
    functions: Mapping[str, Callable[[], object]],
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Times two functions in interleaved rounds, and how many times as long the second
    takes.

    Rounds go on until there are `ENOUGH`, their order changes from one to the next.

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
    while not _suffices(clock() - begin, rounds=len(next(iter(found.values())))):
        order = list(functions)
        shuffle(order)
        for name in order:
            found[name].append(_seconds(functions[name], clock))
    result = {
        name: summary(seconds)._asdict() | {"first": first[name]}
        for name, seconds in found.items()
    }
    # Of each round: what slows the machine down for a while slows both.
    result["ratio"] = summary([b / a for a, b in zip(*found.values(), strict=True)])
    result["ratio"] = result["ratio"]._asdict()
    return {name: _rounded(numbers) for name, numbers in result.items()}


def _suffices(seconds: float, rounds: int) -> bool:
    return rounds >= MOST or any(
        seconds >= passed and rounds >= least for passed, least in ENOUGH
    )


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
