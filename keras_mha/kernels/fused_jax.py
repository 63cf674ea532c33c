"""JAX's fused kernels: of the device that a program is lowered for.

Which one that is may be known only then: a program can be traced on a CPU and exported
for a TPU. So what is traced is a call alone, and its kernel is looked up by its device.
"""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from keras_mha._keras import Tensor
from keras_mha.kernels import backends, blockwise
from keras_mha.kernels.backends import jax_program
from keras_mha.kernels.backends.jax_differentiable import require_devices
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import sharing
from keras_mha.kernels.problem import Problem, call_of, positions_first, prepared
from keras_mha.kernels.thresholds import has_few_scores
from keras_mha.kernels.whole import whole

# From so many queries and keys on a program that is written on a CPU is to hold them.
FEWEST = 128

# Modules of `jax_kernels`, by kind of device, the better first. Imported when first
# asked for: each needs a library of JAX's that other devices do not.
_KERNELS = {"gpu": ("cudnn", "triton"), "tpu": ("splash",)}


def choose(call: AttentionCall) -> tuple[str | None, str]:
    """Returns the name of JAX's kernel for a call on its kind of device, `None` if none
    can run it, and why."""
    if call.device_kind not in _KERNELS:
        why = "no fused kernel on the jax backend but on NVIDIA's GPUs and on TPUs"
        return None, why
    refusals = []
    for kernel in _kernels(call.device_kind):
        why = kernel.refusal(call)
        if why is None:
            can = f"{kernel.NAME}, the backend's own kernel, can run the call"
            return kernel.NAME, "; ".join([*refusals, can])
        refusals.append(why)
    return None, "; ".join(dict.fromkeys(refusals))


def is_left_to_lowering(call: AttentionCall) -> bool:
    """Whether a call of a half type, of few scores, is to be run by what its program is
    lowered for, and not by the formula."""
    if call.device_kind != "cpu":
        return True  # in one tile, whose gradient multiplies half operands too
    if min(call.scores_shape[2:]) < FEWEST:
        return False
    others = (replace(call, device=device) for device in _KERNELS)
    return any(choose(other)[0] is not None for other in others)


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    problem, tensors = prepared(call)
    if has_few_scores(call):
        problem = replace(problem, groups_at_once=None, tile=None)  # all in one tile
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


def _kernels(device: str) -> Iterator[Any]:
    for name in _KERNELS.get(device, ()):
        yield importlib.import_module(f"keras_mha.kernels.jax_kernels.{name}")


def _of_device(problem: Problem, tensors: dict[str, Any]) -> Any:
    if problem.device not in _KERNELS:
        return blockwise
    if problem.device == "gpu" and jax_program.current().is_kept:
        return blockwise  # JAX promises later versions none of a GPU's kernels
    call = call_of(problem, tensors)
    kernels = _kernels(problem.device)
    return next((each for each in kernels if each.refusal(call) is None), blockwise)
