"""Tensors that are kept from call to call."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def kept(most: int) -> Callable[[Callable], Callable]:
    """Returns a decorator of functions that make tensors: as `functools.lru_cache`, but
    what is kept can be used everywhere.

    Tensors made within `torch.inference_mode` could not be used in training, and those
    made where PyTorch only pretends to compute (`FakeTensorMode`) hold no numbers.
    """

    def decorator(function):
        cached = functools.lru_cache(maxsize=most)(function)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            with torch.inference_mode(False):
                if is_in_torch_dispatch_mode():
                    return function(*arguments)
                return cached(*arguments)

        return call

    return decorator
