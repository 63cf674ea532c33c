"""cuDNN's kernel for attention, forward and backward, as JAX has it.

`jax.nn.dot_product_attention` rounds the rows' sums to half a type, and differentiates
by running the kernel again. So what it is made of is called here, which is private:
where a version of JAX has something else, `refusal` says so.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from keras_mha.kernels.backends import jax_manual_axes as manual_axes
from keras_mha.kernels.jax_kernels.sharing import as_one_call

_TENSORS = (
    *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen"),
    *("q_offsets", "kv_offsets", "page_table_k", "page_table_v"),
)
_OPTIONS = (
    *("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout"),
    "sliding_window_length",
)
_FORWARD = (*_TENSORS, *_OPTIONS, "is_training")
_BACKWARD = (*_TENSORS, "activation", "fwd_output", "grad_output", *_OPTIONS)


@dataclass(frozen=True)
class Kernel:
    """What of a call of the kernel is no tensor.

    Args:
        scale: Factor of the dot products.
        causal: Whether query `i` sees the keys `j <= i` only, also where there are
            more of one than of the other.
        window: Query `i` sees the keys `j > i - window` only; `None` for all.
    """

    scale: float
    causal: bool = False
    window: int | None = None


def refusal() -> str | None:
    """Returns why this version of JAX cannot be asked for the kernel, or `None`."""
    try:
        forward, backward = _kernels()
        is_known = _names(forward) == _FORWARD and _names(backward) == _BACKWARD
    except (ImportError, AttributeError):
        is_known = False
    if is_known:
        return None
    return f"jax {jax.__version__} does not hand out the rows' sums of cuDNN's kernel"


def _names(function):
    return tuple(inspect.signature(function).parameters)


def _kernels():
    """Returns JAX's own functions, forward and backward."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn._dot_product_attention_fwd_impl, cudnn._dot_product_attention_bwd_impl


def attend(
    kernel: Kernel,
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    lengths: Any = None,
) -> tuple[Any, Any]:
    """Attends.

    Args:
        kernel: What is to be computed.
        query: Shape `(B, T, N, H)`, of half a type.
        key: Shape `(B, S, K, H)`; query head `n` reads key head `n // (N / K)`.
        value: Shape `(B, S, K, H)`.
        bias: Added to the scaled scores; of the query's type and of shape
            `(B, N, T, S)`, where the first two lengths may be 1.
        lengths: How many of the keys are there, int32 of shape `(B,)`, at least one of
            each row's; `None` for all.

    Returns:
        The output `(B, T, N, H)`, and the logarithm of each row's sum of exponentials,
        float32 of shape `(B, N, T)`.
    """
    tensors = {"query": query, "key": key, "value": value}
    tensors |= _given(bias=bias, lengths=lengths)
    return as_one_call(partial(_attend, kernel), tensors, ("output", "sums"))


def pull_back(
    kernel: Kernel,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    lengths: Any,
    sums: Any,
    output: Any,
    d_output: Any,
    of_bias: bool = False,
) -> tuple[Any, ...]:
    """Returns the gradients of query, key and value, and of the bias if asked for.

    Args:
        kernel: As of `attend`.
        query: As of `attend`.
        key: As of `attend`.
        value: As of `attend`.
        bias: As of `attend`.
        lengths: As of `attend`.
        sums: The logarithms that `attend` returned.
        output: What `attend` returned.
        d_output: The gradient of the output.
        of_bias: Whether the bias's gradient is asked for too. cuDNN then holds numbers
            of half a type for all scores.
    """
    tensors = {"query": query, "key": key, "value": value}
    tensors |= _given(bias=bias, lengths=lengths)
    tensors |= {"sums": sums, "output": output, "d_output": d_output}
    found = ("query", "key", "value", "bias") if of_bias else ("query", "key", "value")
    return as_one_call(partial(_pull_back, kernel, of_bias), tensors, found)


def _given(**tensors):
    return {name: x for name, x in tensors.items() if x is not None}


def _attend(kernel, tensors):
    run, _ = _kernels()
    options = _options(kernel, tensors, of_bias=False)
    return tuple(run(*_arguments(tensors), **options, is_training=True))


def _pull_back(kernel, of_bias, tensors):
    _, run = _kernels()
    options = _options(kernel, tensors, of_bias)
    others = tensors["sums"], tensors["output"], tensors["d_output"]
    return tuple(run(*_arguments(tensors), *others, **options))


def _arguments(tensors):
    query = tensors["query"]
    none = manual_axes.cast(jnp.zeros(0, query.dtype), manual_axes.varying(query))
    lengths = (none, none)
    if "lengths" in tensors:
        rows = jnp.full_like(tensors["lengths"], query.shape[1])
        lengths = (rows, tensors["lengths"])
    named = (tensors[name] for name in ("query", "key", "value"))
    return *named, tensors.get("bias", none), *lengths, none, none, none, none


def _options(kernel, tensors, of_bias):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    kind = cudnn.MaskType.CAUSAL if kernel.causal else cudnn.MaskType.NO_MASK
    if "lengths" in tensors:
        padded = cudnn.MaskType.PADDING_CAUSAL, cudnn.MaskType.PADDING
        kind = padded[0] if kernel.causal else padded[1]
    return {
        "scale": kernel.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": ("bias" in tensors, of_bias),
        "mask_type": kind,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": kernel.window,
    }
