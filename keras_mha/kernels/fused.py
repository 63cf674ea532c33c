"""Attention by the kernel that the backend ships, where it is exact and faster.

torch's `scaled_dot_product_attention` everywhere, and its `flex_attention` on NVIDIA's
GPUs; through JAX cuDNN's and a Pallas kernel on NVIDIA's GPUs, and splash attention on
TPUs. TensorFlow ships none, and on a CPU `jax.nn.dot_product_attention` builds all
T x S scores, as the reference does.
"""

import importlib

import keras

from keras_mha._keras import dtype_name
from keras_mha.kernels import backends, blockwise
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.problem import MIXES_HEADS

_BACKENDS = ("torch", "jax")
_NAME = keras.backend.backend()
_KERNEL = (
    importlib.import_module(f"keras_mha.kernels.fused_{_NAME}")
    if _NAME in _BACKENDS
    else None
)


def choose(call: AttentionCall) -> tuple[str | None, str]:
    """Returns the name of the fused kernel for a call, `None` if none can run it, and
    why."""
    if call.mixes_heads:
        return None, MIXES_HEADS
    if _KERNEL is None:
        return None, f"no fused kernel on the {_NAME} backend"
    if call.return_lse:
        return None, "the fused kernel does not return the rows' sums"
    if call.return_scores:
        return None, "the fused kernel does not return the scores"
    return _KERNEL.choose(call)


def refusal_of_parts(call: AttentionCall) -> str | None:
    """Returns why the fused kernel cannot run this call where each process has a part
    of the sequences (`backends.splits_sequences`), or `None` if it can."""
    return _KERNEL.refusal_of_parts(call)


def attend(call: AttentionCall) -> Attended:
    """Runs one call of attention."""
    return Attended(_KERNEL.attend(call))


def is_left_to_lowering(call: AttentionCall) -> bool:
    """Whether a call of few scores, that no fused kernel of the device runs on which
    its program is written, is better off with what the program is lowered for."""
    if not backends.current().LOWERS_LATER or call.return_lse:
        return False
    half = dtype_name(call.query) in ("float16", "bfloat16")
    return half and _KERNEL.is_left_to_lowering(call)


def attend_where_lowered(call: AttentionCall) -> Attended:
    """Runs one call of attention by the fused kernel of the device that its program
    turns out to be lowered for, and in tiles where that has none for the call."""
    if backends.current().LOWERS_LATER:
        return Attended(_KERNEL.attend(call))
    return blockwise.attend(call)
