"""Derivatives beyond the first gradient on PyTorch.

Kernels that are fast or need little memory give a gradient that autograd cannot
differentiate again. Where that is asked for, or anything else than a gradient
(`torch.func`, forward mode), the *formula* is taken in their place: the same call
written with operations that have every derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def takes_formula() -> bool:
    """Whether more than a backward pass may be asked of what is computed now."""
    is_dual = forward_ad._current_level >= 0
    return is_dual or torch._C._are_functorch_transforms_active()


def of_formula(
    formula: Callable[..., Any], inputs: Sequence[Any], output_gradient: Any
) -> list[Any]:
    """Returns the gradients of the inputs in a backward pass that is differentiated.

    Args:
        formula: What gives the output of the inputs.
        inputs: Tensors as they were saved for the backward pass; of those that want no
            gradient it is `None`.
        output_gradient: That of the output.
    """
    # Nodes of their own: what is two inputs may be one tensor, or made of another.
    inputs = [x.view_as(x) for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    output = formula(*inputs)
    found = iter(
        torch.autograd.grad(
            output, wanted, output_gradient.to(output.dtype), create_graph=True
        )
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def differentiable(formula: Callable[..., Any], output: Any, *inputs: Any) -> Any:
    """Returns an output that a kernel of torch gave, with derivatives of any order.

    Args:
        formula: Gives the same output of the inputs.
        output: As the kernel gave it, with its gradient.
        inputs: What the kernel was given.
    """
    if not output.requires_grad or torch.compiler.is_compiling():
        return output
    return _Differentiable.apply(formula, output, *inputs)


class _Differentiable(torch.autograd.Function):
    """Hands its gradient on to the kernel's own, or to the formula's where the gradient
    is to be differentiated again."""

    @staticmethod
    def forward(ctx, formula, output, *inputs):
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        return output.detach()

    @staticmethod
    def backward(ctx, output_gradient):
        if not torch.is_grad_enabled():
            return None, output_gradient, *(None,) * (len(ctx.needs_input_grad) - 2)
        inputs = ctx.saved_tensors
        return None, None, *of_formula(ctx.formula, inputs, output_gradient)
