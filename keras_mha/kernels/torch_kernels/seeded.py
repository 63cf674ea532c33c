"""A device's random generator, for a while in the hands of a seed."""

import contextlib
from collections.abc import Iterator

import torch

_ODD = 0x9E3779B1


def number_of(pair: torch.Tensor) -> int:
    """Returns one number of a seed's two int32, other ones of others.

    The generator must be told from the host: on a GPU this waits for the numbers, as
    Keras's own dropout does with a seed.
    """
    first, second = pair.tolist()
    # A CPU's generator, in tests, looks at the lower half alone: both are in it.
    return (first % 2**32) << 32 | (second + first * _ODD) % 2**32


@contextlib.contextmanager
def seeded(device: torch.device, number: int | None) -> Iterator[None]:
    """Within, PyTorch draws on the device what the number says; then what it would
    have drawn otherwise. With `None` nothing is changed."""
    if number is None:
        yield
        return
    generator = _generator(device)
    state = generator.get_state()
    generator.manual_seed(number)
    try:
        yield
    finally:
        generator.set_state(state)


def is_held(device: torch.device) -> bool:
    """Whether the generator cannot be told anything: while a CUDA graph is recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _generator(device):
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
