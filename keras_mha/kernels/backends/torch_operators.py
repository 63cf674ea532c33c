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


_made: list[Any] = []


def made(number: int) -> Any:
    """Returns the object of a `number_of`."""
    return _made[number]


def as_node(
    make: Callable[..., Kernel],
    arguments: tuple,
    tensors: list,
    reads_numbers: bool = False,
) -> Tensor:
    """Writes a kernel into the program that is being compiled.

    Args:
        make: A class or a function that makes the kernel of the arguments.
        arguments: Numbers, names and parts of masks and biases; no tensors.
        tensors: What the kernel is given.
        reads_numbers: Whether it asks for numbers of tensors, which a CUDA graph that
            is recorded does not tell.

    Returns:
        The output.
    """
    attend = _attend_reading if reads_numbers else _attend
    return attend(tensors, number_of(make, as_constants(arguments)))[0]


@torch._dynamo.assume_constant_result
def number_of(make: Callable, constants: Any) -> int:
    """Returns what a program knows an object by that is made of `as_constants`."""
    arguments = from_constants(constants)
    try:
        return _number_of_equal(make, arguments)
    except TypeError:  # what cannot be hashed is equal to itself alone
        return _number_of_equal.__wrapped__(make, arguments)


@functools.cache
def _number_of_equal(make, arguments):
    _made.append(make(*arguments))
    return len(_made) - 1


def _autograd():
    """Returns a context in which a gradient can be taken, as kernels do of pieces of
    theirs: within an operator PyTorch records nothing."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther"):
        keys = keys.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), keys
    )


def _keep(ctx, inputs, output):
    tensors, ctx.number = inputs
    ctx.save_for_backward(*tensors, *output)


def _operators(name: str, **options: Any) -> Callable:
    """Registers the operator that runs kernels, with the one of their gradients."""

    @torch.library.custom_op(f"keras_mha::{name}", mutates_args=(), **options)
    def attend(tensors: Sequence[Tensor], number: int) -> tuple[Tensor, Tensor]:
        output, kept = made(number).attend(list(tensors))
        return output.contiguous(), kept.contiguous()

    @attend.register_fake
    def _(tensors, number):
        return made(number).outlines(list(tensors))

    @torch.library.custom_op(f"keras_mha::{name}_backward", mutates_args=(), **options)
    def attend_backward(
        tensors: Sequence[Tensor],
        output: Tensor,
        kept: Tensor,
        output_gradient: Tensor,
        wanted: Sequence[int],
        number: int,
    ) -> list[Tensor]:
        with _autograd():
            found = made(number).gradients(
                list(tensors), output, kept, output_gradient, list(wanted)
            )
        return [x.contiguous() for x in found]

    @attend_backward.register_fake
    def _(tensors, output, kept, output_gradient, wanted, number):
        return [tensors[place].new_empty(tensors[place].shape) for place in wanted]

    def gradients(ctx, output_gradient, _):
        *tensors, output, kept = ctx.saved_tensors
        wanted = [i for i, is_wanted in enumerate(ctx.needs_input_grad[0]) if is_wanted]
        given = tensors, output, kept, output_gradient, wanted, ctx.number
        gradients = [None] * len(tensors)
        for place, gradient in zip(wanted, attend_backward(*given), strict=True):
            gradients[place] = gradient
        return gradients, None

    attend.register_autograd(gradients, setup_context=_keep)
    return attend


_attend = _operators("attend")
_attend_reading = _operators("attend_reading", tags=(torch.Tag.cudagraph_unsafe,))
