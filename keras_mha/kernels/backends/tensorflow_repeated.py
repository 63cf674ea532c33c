"""Eager calls on TensorFlow that come again are run as programs.

Over the tiles of a long sequence Python sends off operations one by one, which takes
twice as long as their program does. Tracing that may take a second, too long for a
length that never comes again, as where a text grows: it is done the second time.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_mha.kernels.static_parts import is_of_package

FEWEST_SCORES = 512**2  # of one head: of fewer little time is lost
MOST_PROGRAMS = 32  # the latest are kept


def repeated(function: Callable, problem: Any, tensors: dict, *others: Any) -> Any:
    """Returns `function(problem, tensors, *others)`, by a program where it was called
    eagerly before with such tensors.

    Args:
        function: `blockwise.forward`, `blockwise.backward` or another kernel's.
        problem: What is to be computed. What users wrote in it runs eagerly.
        tensors: By name, as the function takes them.
        *others: More tensors.
    """
    if not (tf.executing_eagerly() and _pays(problem, tensors)):
        return function(problem, tensors, *others)
    every = tf.nest.flatten((tensors, others))
    given = tuple((tuple(x.shape), x.dtype) for x in every)
    names = tuple(sorted(tensors))  # as `tf.nest` orders them
    return _runner(function, problem, names, given)(tensors, *others)


def _pays(problem, tensors):
    scores = tensors["query"].shape[4] * tensors["key"].shape[3]
    parts = problem.mask, problem.position_bias
    return scores >= FEWEST_SCORES and all(map(is_of_package, parts))


@functools.lru_cache(MOST_PROGRAMS)
def _runner(function, problem, names, given):
    return _Runner(functools.partial(function, problem))


class _Runner:
    """A function that is traced the second time that it is called."""

    def __init__(self, function: Callable):
        self._function, self._program = function, None

    def __call__(self, *tensors: Any) -> Any:
        if self._program is None:
            self._program = tf.function(self._function, autograph=False)
            return self._function(*tensors)
        return self._program(*tensors)
