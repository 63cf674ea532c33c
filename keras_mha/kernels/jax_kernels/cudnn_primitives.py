"""cuDNN's kernel for attention, forward and backward, as JAX has it.

`jax.nn.dot_product_attention` rounds the rows' sums to half a type, and differentiates
by running the kernel again. So its primitives are bound here, which are private: where
a version of JAX has others, `refusal` says so.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching

from keras_mha.kernels.backends import jax_manual_axes as manual_axes

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
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        known = (
            (cudnn._dot_product_attention_fwd_impl, _FORWARD),
            (cudnn._dot_product_attention_bwd_impl, _BACKWARD),
        )
        is_known = all(_names(function) == names for function, names in known)
        _bound(cudnn, "fwd"), _bound(cudnn, "bwd")
    except (ImportError, AttributeError):
        is_known = False
    if is_known:
        return None
    return f"jax {jax.__version__} does not hand out the rows' sums of cuDNN's kernel"


def _names(function):
    return tuple(inspect.signature(function).parameters)


def _bound(cudnn, name):
    return getattr(cudnn, f"_dot_product_attention_{name}_p_wrapper").bind


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
    return _mapped(partial(_attend, kernel), tensors)


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
    return _mapped(partial(_pull_back, kernel, of_bias), tensors)


def _given(**tensors):
    return {name: x for name, x in tensors.items() if x is not None}


def _attend(kernel, tensors):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    options = _options(cudnn, kernel, tensors, "bias" in tensors)
    output, sums = _bound(cudnn, "fwd")(
        *_arguments(tensors), **options, is_training=True
    )
    return output, sums


def _pull_back(kernel, of_bias, tensors):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    options = _options(cudnn, kernel, tensors, of_bias)
    others = tensors["sums"], tensors["output"], tensors["d_output"]
    return tuple(_bound(cudnn, "bwd")(*_arguments(tensors), *others, **options))


def _arguments(tensors):
    query = tensors["query"]
    none = manual_axes.cast(jnp.zeros(0, query.dtype), manual_axes.varying(query))
    lengths = (none, none)
    if "lengths" in tensors:
        rows = jnp.full_like(tensors["lengths"], query.shape[1])
        lengths = (rows, tensors["lengths"])
    named = (tensors[name] for name in ("query", "key", "value"))
    return *named, tensors.get("bias", none), *lengths, none, none, none, none


def _options(cudnn, kernel, tensors, of_bias):
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


# ------------------------------------------------------------------------ jax.vmap
# JAX's own rule of these primitives takes a bias for one of all rows and heads.


def _mapped(function, tensors):
    """Calls a function of tensors whose first axis is the batch. What `jax.vmap` maps
    becomes part of the batch."""
    names = tuple(tensors)

    @custom_batching.custom_vmap
    def call(*values):
        return function(dict(zip(names, values, strict=True)))

    @call.def_vmap
    def rule(size, is_mapped, *values):
        values = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(values, is_mapped, strict=True)
        ]
        given = dict(zip(names, values, strict=True))
        batch = given["query"].shape[1]
        shared = "bias" in given and given["bias"].shape[1] == 1 != batch
        if shared:
            shape = (size, batch, *given["bias"].shape[2:])
            given["bias"] = jnp.broadcast_to(given["bias"], shape)
        merged = {
            name: x.reshape(size * batch, *x.shape[2:]) for name, x in given.items()
        }
        found = _mapped(function, merged)
        found = [x.reshape(size, batch, *x.shape[1:]) for x in found]
        if shared and len(found) == 4:  # gradients, and the bias's is the last
            found[3] = jnp.sum(found[3], axis=1, keepdims=True)
        return tuple(found), (True,) * len(found)

    return call(*tensors.values())
