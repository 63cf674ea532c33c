"""What was drawn at random in a pass that PyTorch's checkpoints run again.

`torch.utils.checkpoint` runs a function once, keeps nothing, and runs it again in the
backward pass, with the state of torch's own random generator as it was. So a number
from that generator is the same both times, and tells which draw it was.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from keras import ops

from keras_mha._keras import draw_seed

# Draws that a backward pass may still ask for: of all layers, in all micro-batches.
_MOST = 2**14

# Whoever sets torch's seed again gets numbers again that others got.
_UNKNOWN = (
    "Dropout is computed again in a backward pass, and which attention weights it "
    "dropped the first time is not known, so that the gradients would be wrong. A "
    "checkpoint must restore torch's random state: leave `preserve_rng_state=True`."
)

_drawn: OrderedDict[int, tuple[Any, Any]] = OrderedDict()  # who drew, and what


def drawn(generator: Any, draw: Callable) -> Any:
    """Returns `draw(generator)`, or what it returned before where a gradient computes
    the same again."""
    if torch.compiler.is_compiling():
        return _drawn_by_program(generator, draw)
    token, drawer = _token(), _number_of(generator)
    if token is None:
        return draw(generator)
    if torch._C._current_graph_task_id() == -1:  # not in a backward pass
        result = draw(generator)
        _drawn[token] = drawer, result
        if len(_drawn) > _MOST:
            _drawn.popitem(last=False)
        return result
    first_drawer, result = _drawn.get(token, (None, None))
    if result is None or drawer != first_drawer:
        raise RuntimeError(_UNKNOWN)
    return result


def _number_of(generator):
    """What a program knows a generator by: only one of the two passes may be one."""
    return generator if isinstance(generator, int) else id(generator)


def _drawn_by_program(generator, draw):
    """Writes the draw into a program, which may be run again too."""
    if torch.compiler.is_exporting():  # to be run without this package
        return draw(generator)
    if generator is None:
        return _draw_of_all(torch.empty(0, device="cpu"), _ticket())
    if torch._C._are_functorch_transforms_active():
        return draw(generator)
    pair, state = _draw(generator.state.value, _number_of(generator))
    generator.state.assign(state)  # here, for Keras's `StatelessScope` to see it
    return pair


# What a program asks Python it asks once, when it is written: this it does each time.
# Where a checkpoint is part of the program, the second tag has torch's random state
# restored before the operator is run again.
_operator = functools.partial(
    torch.library.custom_op,
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.nondeterministic_seeded),
)


@_operator("keras_mha::draw")
def _draw(state: torch.Tensor, generator: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what is drawn, and the generator's state after it."""
    after = state.clone()

    def draw(seed):
        after[1] += 1  # as `keras.random.SeedGenerator.next` does
        return state.clone()

    return drawn(generator, draw).clone(), after


@_draw.register_fake
def _(state, generator):
    return torch.empty_like(state), torch.empty_like(state)


@_operator("keras_mha::draw_of_all")
def _draw_of_all(empty: torch.Tensor, ticket: int) -> torch.Tensor:
    """Draws from Keras's own generator. Equal calls a compiler takes for one: each has
    a ticket of its own. The tensor says whose random state is to be restored."""
    return drawn(None, draw_seed).to(torch.int32, copy=True)  # as declared below


@_draw_of_all.register_fake
def _(empty, ticket):
    return ops.convert_to_tensor(torch.empty(2, dtype=torch.int32))


_tickets = itertools.count()


@torch._dynamo.assume_constant_result
def _ticket() -> int:
    return next(_tickets)


def _token() -> int | None:
    """Returns a number that torch's random state decides, or `None` while a program is
    written or transformed: nothing is run again there."""
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return None
    number = torch.randint(2**62, (), device="cpu")
    return number.item() if type(number) is torch.Tensor else None
