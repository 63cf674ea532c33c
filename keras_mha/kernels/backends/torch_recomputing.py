"""What was drawn at random in a pass that PyTorch's checkpoints run again.

`torch.utils.checkpoint` runs a function once, keeps nothing, and runs it again in the
backward pass, with the state of torch's own random generator as it was. So a number
from that generator is the same both times, and tells which draw it was.
"""

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
    token = _token()
    if token is None:
        return draw(generator)
    if torch._C._current_graph_task_id() == -1:  # not in a backward pass
        result = draw(generator)
        _drawn[token] = generator, result
        if len(_drawn) > _MOST:
            _drawn.popitem(last=False)
        return result
    drawer, result = _drawn.get(token, (None, None))
    if result is None or drawer != generator:
        raise RuntimeError(_UNKNOWN)
    return result


def _drawn_by_program(generator, draw):
    """Writes the draw into a program, which may be run again too."""
    if torch.compiler.is_exporting():  # to be run without this package
        return draw(generator)
    if generator is None:
        return _draw_of_all(_ticket())
    if torch._C._are_functorch_transforms_active():
        return draw(generator)
    return _draw(generator.state.value, id(generator))


# What a program asks Python it asks once, when it is written: this it does each time.
@torch.library.custom_op(
    "keras_mha::draw", mutates_args=("state",), tags=(torch.Tag.cudagraph_unsafe,)
)
def _draw(state: torch.Tensor, generator: int) -> torch.Tensor:
    def draw(seed):
        pair = state.clone()
        state[1] += 1  # as `keras.random.SeedGenerator.next` does
        return pair

    return drawn(generator, draw).clone()


@_draw.register_fake
def _(state, generator):
    return torch.empty_like(state)


@torch.library.custom_op(
    "keras_mha::draw_of_all", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _draw_of_all(ticket: int) -> torch.Tensor:
    """Draws from Keras's own generator. Equal calls without tensors a compiler takes
    for one: each has a ticket of its own."""
    return drawn(None, draw_seed).clone()


@_draw_of_all.register_fake
def _(ticket):
    return ops.convert_to_tensor(torch.empty(2, dtype=torch.int64))


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
