"""Calls whose operations would be sent off one by one, run as one program each.

JAX looks every operation up that is run eagerly, and in a gradient differentiates it
anew. A program is looked up, and differentiated, once for all calls that differ in
nothing but their tensors.
"""

from collections.abc import Callable

from keras_mha._keras import Tensor
from keras_mha.kernels import backends
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.masks import And, Dense, Mask, Padding, Segments, is_plain_causal

_TENSORS = ("query", "key", "value", "bias", "sink", "talking_heads")
_NUMBERS = (
    "scale",
    "logit_soft_cap",
    "dropout",
    "return_scores",
    "return_lse",
    "device",
)

Kernel = Callable[[AttentionCall, Tensor | None], Attended]


def run(kernel: Kernel, call: AttentionCall, seed: Tensor | None) -> Attended:
    """Returns `kernel(call, seed)`, run as one program where that is better.

    Args:
        kernel: What computes a call without drawing a seed.
        call: The call.
        seed: What `dropout.seed_of` gave for it, or `None`.
    """
    backend = backends.current()
    if not (backend.is_better_as_program() and _is_kept(call)):
        return kernel(call, seed)
    mask, of_mask = split_tensors(call.mask)
    numbers = tuple(getattr(call, name) for name in _NUMBERS)
    tensors = tuple(getattr(call, name) for name in _TENSORS)
    static = kernel, mask, numbers
    return backend.as_one_program(_run_parts, (seed, of_mask, *tensors), static)


def _is_kept(call: AttentionCall) -> bool:
    """Whether the call's program will do for the next call too.

    What users write need not be fit for a program, and numbers such as an offset may
    change with every call.
    """
    return call.position_bias is None and _differs_in_tensors(call.mask)


def _differs_in_tensors(mask: Mask | None) -> bool:
    """Whether masks like this one differ in nothing but their tensors."""
    if type(mask) is And:
        return _differs_in_tensors(mask.left) and _differs_in_tensors(mask.right)
    is_one_of_these = type(mask) in (Dense, Padding, Segments)
    return mask is None or is_plain_causal(mask) or is_one_of_these


def _run_parts(static, seed, of_mask, *tensors):
    kernel, mask, numbers = static
    given = zip(_TENSORS + _NUMBERS, tensors + numbers, strict=True)
    call = AttentionCall(**dict(given), mask=join_tensors(mask, of_mask))
    return kernel(call, seed)
