"""JAX's fused kernels: of the device that a program is lowered for.

Which one that is may be known only then: a program can be traced on a CPU and exported
for a TPU. So what is traced is a call alone, and its kernel is looked up by its device.
"""

import importlib
from dataclasses import replace
from typing import Any

from keras_mha._keras import Tensor
from keras_mha.kernels import backends, blockwise
from keras_mha.kernels.backends.jax_differentiable import require_devices
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import sharing
from keras_mha.kernels.problem import Problem, call_of, positions_first, prepared
from keras_mha.kernels.thresholds import has_few_scores
from keras_mha.kernels.whole import whole

# Modules of `jax_kernels`, by kind of device, the better first. Imported when first
# asked for: each needs a library of JAX's that other devices do not.
_KERNELS = {"gpu": ("cudnn", "triton"), "tpu": ("splash",)}


def choose(call: AttentionCall) -> tuple[str | None, str]:
    """Returns the name of JAX's kernel for a call on its kind of device, `None` if none
    can run it, and why."""
    if call.device_kind not in _KERNELS:
        why = "no fused kernel on the jax backend but on NVIDIA's GPUs and on TPUs"
        return None, why
    refusals = _refusals(call)
    for kernel, why in refusals.items():
        if why is None:
            return kernel.NAME, "the backend's own kernel can run the call"
    return None, "; ".join(dict.fromkeys(refusals.values()))


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    problem, tensors = prepared(call)
    if has_few_scores(call):
        problem = replace(problem, groups_at_once=None)  # all heads in one tile
    if sharing.is_needed():
        require_devices()
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


def _refusals(call: AttentionCall) -> dict[Any, str | None]:
    """Returns the kernels of the call's device, and why each cannot run it."""
    names = _KERNELS.get(call.device_kind, ())
    package = "keras_mha.kernels.jax_kernels"
    kernels = (importlib.import_module(f"{package}.{name}") for name in names)
    return {kernel: kernel.refusal(call) for kernel in kernels}


def _of_device(problem: Problem, tensors: dict[str, Any]) -> Any:
    if problem.device not in _KERNELS:
        return blockwise
    refusals = _refusals(call_of(problem, tensors))
    return next((each for each, why in refusals.items() if why is None), blockwise)
