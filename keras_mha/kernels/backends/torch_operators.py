"""Kernels as one node each of the programs that `torch.compile` writes.

The compiler would unroll loops over tiles, or break the program where they are. So
they are operators registered with PyTorch, which a program calls by name. An operator
takes tensors and numbers only: what else a kernel is made of (masks without their
tensors, say) is kept here, and the program holds its number.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from keras_mha.kernels.static_parts import as_constants, from_constants


class Kernel(Protocol):
    """What can be run as a node of a program."""

    def attend(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output, and what is kept for the gradient beside it."""

    def outlines(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns tensors without numbers like those that `attend` returns."""

    def gradients(
        self,
        tensors: list[Tensor],
        output: Tensor,
        kept: Tensor,
        output_gradient: Tensor,
        wanted: list[int],
    ) -> list[Tensor]:
        """Returns the gradients of the tensors that are wanted, by their places."""


_kernels: list[Kernel] = []


def as_node(make: Callable[..., Kernel], arguments: tuple, tensors: list) -> Tensor:
    """Writes a kernel into the program that is being compiled.

    Args:
        make: A class or a function that makes the kernel of the arguments.
        arguments: Numbers, names and parts of masks and biases; no tensors.
        tensors: What the kernel is given.

    Returns:
        The output.
    """
    return _attend(tensors, _number_of(make, as_constants(arguments)))[0]


@torch._dynamo.assume_constant_result
def _number_of(make: Callable[..., Kernel], constants: Any) -> int:
    arguments = from_constants(constants)
    try:
        return _number_of_equal(make, arguments)
    except TypeError:  # what cannot be hashed is equal to itself alone
        return _number_of_equal.__wrapped__(make, arguments)


@functools.cache
def _number_of_equal(make, arguments):
    _kernels.append(make(*arguments))
    return len(_kernels) - 1


@torch.library.custom_op("keras_mha::attend", mutates_args=())
def _attend(tensors: Sequence[Tensor], number: int) -> tuple[Tensor, Tensor]:
    output, kept = _kernels[number].attend(list(tensors))
    return output.contiguous(), kept.contiguous()


@_attend.register_fake
def _(tensors, number):
    return _kernels[number].outlines(list(tensors))


def _autograd():
    """Returns a context in which a gradient can be taken, as kernels do of pieces of
    theirs: within an operator PyTorch records nothing."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther"):
        keys = keys.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), keys
    )


@torch.library.custom_op("keras_mha::attend_backward", mutates_args=())
def _attend_backward(
    tensors: Sequence[Tensor],
    output: Tensor,
    kept: Tensor,
    output_gradient: Tensor,
    wanted: Sequence[int],
    number: int,
) -> list[Tensor]:
    with _autograd():
        found = _kernels[number].gradients(
            list(tensors), output, kept, output_gradient, list(wanted)
        )
    return [x.contiguous() for x in found]


@_attend_backward.register_fake
def _(tensors, output, kept, output_gradient, wanted, number):
    return [tensors[place].new_empty(tensors[place].shape) for place in wanted]


def _keep(ctx, inputs, output):
    tensors, ctx.number = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, output_gradient, _):
    *tensors, output, kept = ctx.saved_tensors
    wanted = [i for i, is_wanted in enumerate(ctx.needs_input_grad[0]) if is_wanted]
    found = _attend_backward(tensors, output, kept, output_gradient, wanted, ctx.number)
    gradients = [None] * len(tensors)
    for place, gradient in zip(wanted, found, strict=True):
        gradients[place] = gradient
    return gradients, None


_attend.register_autograd(_gradients, setup_context=_keep)
