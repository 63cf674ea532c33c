"""JAX's fused kernels: of the device that a program is lowered for.

Which one that is may be known only then: a program can be traced on a CPU and exported
for a TPU. So what is traced is a call alone, and its kernel is looked up by its device.
"""

import importlib
from dataclasses import replace
from typing import Any

from keras_mha._keras import Tensor
from keras_mha.kernels import backends, blockwise
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import Problem, call_of, positions_first, prepared
from keras_mha.kernels.thresholds import has_few_scores
from keras_mha.kernels.whole import whole

# Modules of `jax_kernels`, by kind of device. Imported when first asked for: each needs
# a library of JAX's that other devices do not.
_KERNELS = {"gpu": "cudnn", "tpu": "splash"}


def refusal(call: AttentionCall) -> str | None:
    """Returns why no kernel of JAX's can run this call on its kind of device, or `None`
    if one can."""
    kernel = _kernel(call.device_kind)
    if kernel is None:
        return "no fused kernel on the jax backend but on NVIDIA's GPUs and on TPUs"
    return kernel.refusal(call)


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    problem, tensors = prepared(call)
    if has_few_scores(call):
        problem = replace(problem, groups_at_once=None)  # all heads in one tile
    output = backends.current().with_gradient(
        forward, backward, whole, problem, tensors
    )
    return positions_first(output)


def forward(problem: Problem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends by the kernel of the problem's device; see `blockwise.forward`."""
    return _of_device(problem, tensors).forward(problem, tensors)


def backward(
    problem: Problem, tensors: dict[str, Any], *results: Tensor
) -> dict[str, Tensor]:
    """Returns the gradients by that kernel; see `blockwise.backward`."""
    return _of_device(problem, tensors).backward(problem, tensors, *results)


def _kernel(device: str) -> Any:
    name = _KERNELS.get(device)
    return name and importlib.import_module(f"keras_mha.kernels.jax_kernels.{name}")


def _of_device(problem: Problem, tensors: dict[str, Any]) -> Any:
    kernel = _kernel(problem.device)
    if kernel is None or kernel.refusal(call_of(problem, tensors)) is not None:
        return blockwise
    return kernel
