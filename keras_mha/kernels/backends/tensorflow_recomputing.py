"""What was drawn at random in a pass that `tf.recompute_grad` runs again.

It runs a function once, keeps nothing, and runs it again for the gradient. Nothing
tells the function so, but both runs have a dictionary in common, of the keyword
arguments; it is found in the frames that call it. What the first run drew is noted on
the first tensor among the arguments, and lives as long.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import tensorflow as tf

_FILE = tf.recompute_grad.__code__.co_filename
_FIRST, _AGAIN = "inner", "inner_recompute_grad"  # the functions that run it
_EAGER = "_eager_mode_decorator"  # what calls the first of them eagerly
_NOTES = "_keras_mha_drawn"
_MOST = 2**12  # runs noted on one tensor, of which a gradient may still be asked for

_UNKNOWN = (
    "Dropout is computed again for a gradient (`tf.recompute_grad` or "
    "`keras.RematScope`), and which attention weights it drops the first time cannot "
    "be known, since that is decided in a `tf.function` or a loop within the function "
    "that is run again. Put the `tf.function` around it instead."
)


@dataclass
class _Draws:
    """What the first run of one function drew, in order.

    Args:
        run: An object that belongs to this first run alone.
        results: What was drawn.
        tape: That of the run for the gradient now going on.
        position: How many it has asked for.
    """

    run: Any
    results: list = field(default_factory=list)
    tape: Callable = lambda: None
    position: int = 0

    def next(self, tape: Any) -> Any:
        """Returns what comes next in the run that this tape records."""
        if self.tape() is not tape:  # a run of its own
            self.tape, self.position = weakref.ref(tape), 0
        result = self.results[self.position]
        self.position += 1
        return result


def drawn(generator: Any, draw: Callable) -> Any:
    """Returns `draw(generator)`, or what it returned before where a gradient computes
    the same again."""
    first_runs = []
    for frame in _runs():
        if frame.f_code.co_name == _AGAIN:
            result = _drawn_before(frame)
            break
        first_runs.append(_draws_of_first_run(frame))
    else:
        result = draw(generator)
    # A function run again within another's first run is run again for itself too.
    for draws in first_runs:
        draws.results.append(result)
    return result


def _runs() -> Iterator[FrameType]:
    """Yields the frames of both kinds of runs, from the innermost on."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in (_FIRST, _AGAIN) and code.co_filename == _FILE:
            yield frame
        frame = frame.f_back


def _drawn_before(frame: FrameType) -> Any:
    draws = _notes(_first_tensor(frame)).get(id(frame.f_locals["kwargs"]))
    try:
        return draws.next(frame.f_locals["t"])
    except (AttributeError, IndexError):  # no notes, or too few
        raise RuntimeError(_UNKNOWN) from None


def _draws_of_first_run(frame: FrameType) -> _Draws:
    x, caller = _first_tensor(frame), frame.f_back
    if not _is_in_program_of(x, caller):
        raise RuntimeError(_UNKNOWN)
    # The dictionary of an earlier run may have had the same address.
    run, key = caller.f_locals["variable_watcher"], id(frame.f_locals["kwargs"])
    notes = _notes(x)
    if key not in notes or notes[key].run is not run:
        notes.pop(key, None)  # so that the new one stands last
        notes[key] = _Draws(run)
        if len(notes) > _MOST:
            del notes[next(iter(notes))]
    return notes[key]


def _is_in_program_of(x: tf.Tensor, caller: FrameType) -> bool:
    """Whether the function runs eagerly as its caller does, or in the same graph."""
    if caller.f_code.co_name == _EAGER:
        return tf.executing_eagerly()
    return getattr(x, "graph", None) is tf.compat.v1.get_default_graph()


def _first_tensor(frame: FrameType) -> tf.Tensor:
    arguments = frame.f_locals["args"], frame.f_locals["kwargs"]
    for x in tf.nest.flatten(arguments):
        if isinstance(x, tf.Tensor):
            return x
    raise RuntimeError(
        "Dropout in a function that `tf.recompute_grad` or `keras.RematScope` runs "
        "again needs a tensor among the function's arguments. "
        f"Received: {arguments}"
    )


def _notes(x: tf.Tensor) -> dict[int, _Draws]:
    """Returns what is noted on a tensor, by the address of the keyword arguments."""
    if not hasattr(x, _NOTES):
        setattr(x, _NOTES, {})
    return getattr(x, _NOTES)
