"""Reads what attention is called with: checks it, and fills in the defaults."""

from typing import Any

import keras
from keras import ops
from keras.random import SeedGenerator

from keras_mha import _checks, masks
from keras_mha._keras import (
    Shape,
    Tensor,
    as_tensor,
    dtype_name,
    is_float,
    is_symbolic,
)
from keras_mha.biases import Bias
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.dropout import DrawnSeed, SeedOfHeads


def checked_call(
    query,
    key,
    value,
    *,
    mask,
    bias,
    position_bias,
    scale,
    logit_soft_cap,
    sink,
    talking_heads=None,
    dropout=0.0,
    seed=None,
    return_scores=False,
    return_lse=False,
) -> AttentionCall:
    """Checks the arguments, fills in the defaults and returns them as one call.

    The arguments are those of `dot_product_attention`.
    """
    query, key, value = as_float_tensors(query, key, value)
    _check_shapes(query, key, value)
    query, key, value = _promoted(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    call = AttentionCall(
        query,
        key,
        value,
        mask=None if mask is None else _as_mask(mask),
        bias=None if bias is None else _as_bias(bias),
        position_bias=None
        if position_bias is None
        else _checked_position_bias(position_bias),
        scale=_checks.number("scale", scale),
        logit_soft_cap=None
        if logit_soft_cap is None
        else _checks.positive_number("logit_soft_cap", logit_soft_cap),
        sink=None if sink is None else _as_sink(sink, query.shape[2]),
        talking_heads=(None, None)
        if talking_heads is None
        else _as_talking_heads(talking_heads, query.shape[2]),
        dropout=_checks.dropout_rate("dropout", dropout),
        seed=seed,
        return_scores=_checks.boolean("return_scores", return_scores),
        return_lse=_checks.boolean("return_lse", return_lse),
    )
    if call.return_lse and call.talking_heads[1] is not None:
        raise ValueError(
            "`return_lse` must be False with `talking_heads` after softmax, whose rows "
            "have no sum of their own. Received: return_lse=True"
        )
    if seed is not None:
        _check_seed(seed)
    if isinstance(call.mask, masks.Mask):
        call.mask.check(call.scores_shape)
    elif call.mask is not None:
        masks.check_dense_shape("mask", tuple(call.mask.shape), call.scores_shape)
    if call.bias is not None and not _checks.broadcasts_to(
        tuple(call.bias.shape), call.scores_shape
    ):
        raise ValueError(
            "`bias` must broadcast to the scores, (B, N, T, S) = "
            f"{call.scores_shape}. Received: bias of shape {tuple(bias.shape)}"
        )
    if call.position_bias is not None:
        call.position_bias.check(call.scores_shape)
    return call


def _checked_position_bias(bias: Any) -> Bias:
    if isinstance(bias, Bias):
        return bias
    raise TypeError(
        "`position_bias` must be a bias object, such as `keras_mha.ALiBi(8).bias()`; a "
        "tensor of numbers is a `bias`. "
        f"Received: position_bias={bias!r} (of type {type(bias).__name__})"
    )


def _as_float_tensor(name: str, x: Any) -> Tensor:
    tensor = x if is_symbolic(x) or ops.is_tensor(x) else as_tensor(x)
    if tensor is None and hasattr(x, "dtype"):  # complex numbers, or text
        raise TypeError(
            f"`{name}` must hold floating-point numbers. "
            f"Received: {name} of dtype {x.dtype}"
        )
    if tensor is None:
        raise TypeError(
            f"`{name}` must be a tensor of floating-point numbers. "
            f"Received: {name}={x!r} (of type {type(x).__name__})"
        )
    if not is_float(tensor):
        raise TypeError(
            f"`{name}` must hold floating-point numbers. "
            f"Received: {name} of dtype {dtype_name(tensor)}"
        )
    return tensor


def as_float_tensors(*inputs: Any) -> list[Tensor]:
    """Returns query, key and value as tensors of floating-point numbers, or raises."""
    names = "query", "key", "value"
    return [_as_float_tensor(name, x) for name, x in zip(names, inputs, strict=True)]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    problem = _shape_problem(query.shape, key.shape, value.shape)
    if problem is not None:
        shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
        received = ", ".join(
            f"{name} of shape {tuple(s)}" for name, s in shapes.items()
        )
        raise ValueError(f"{problem} Received: {received}")


def _shape_problem(query: Shape, key: Shape, value: Shape) -> str | None:
    if not len(query) == len(key) == len(value) == 4:
        shapes = {"query": query, "key": key, "value": value}
        name = next(name for name, shape in shapes.items() if len(shape) != 4)
        return f"`{name}` must have the shape (B, length, N, width)."
    (qb, _, qn, qh), (kb, ks, kn, kh), (vb, vs, vn, _) = query, key, value
    same = _checks.same
    if not qb == kb == vb and not (same(qb, kb) and same(qb, vb) and same(kb, vb)):
        return "`query`, `key` and `value` must have the same batch size."
    if ks != vs and not same(ks, vs):
        return "`key` and `value` must have the same length."
    if kn != vn:
        return "`key` and `value` must have the same number of heads."
    if qn % kn:
        return "The heads of `query` must be a multiple of those of `key`."
    if qh != kh:
        return "`query` and `key` must have the same width (last axis)."
    return None


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors of different dtypes to the one they promote to."""
    if len({x.dtype for x in tensors}) == 1:
        return tensors
    dtypes = {dtype_name(x) for x in tensors}
    dtype = keras.backend.result_type(*dtypes)
    return tuple(ops.cast(x, dtype) for x in tensors)


def _as_mask(mask: Any) -> Any:
    """Returns a Mask; a placeholder of a Functional model stays as it is."""
    if is_symbolic(mask):
        return mask
    tensor = None if isinstance(mask, masks.Mask) else as_tensor(mask)
    return masks.as_mask(
        mask if tensor is None else masks.as_booleans("mask", tensor, warn=True)
    )


def _as_bias(bias: Any) -> Tensor:
    """Returns the bias with four axes."""
    bias = _as_float_tensor("bias", bias)
    if len(bias.shape) > 4:
        raise ValueError(
            "`bias` must have at most four axes, (B, N, T, S). "
            f"Received: bias of shape {tuple(bias.shape)}"
        )
    if is_symbolic(bias):
        return bias
    return ops.reshape(bias, (1,) * (4 - len(bias.shape)) + tuple(ops.shape(bias)))


def _as_sink(sink: Any, heads: int) -> Tensor:
    """Returns the sink as one logit a head, shape `(N,)`."""
    if not hasattr(sink, "shape"):
        return ops.full((heads,), _checks.number("sink", sink), dtype="float32")
    sink = _as_float_tensor("sink", sink)
    if tuple(sink.shape) not in ((), (1,), (heads,)):
        raise ValueError(
            f"`sink` must be a number or have the shape (N,) = ({heads},). "
            f"Received: sink of shape {tuple(sink.shape)}"
        )
    return sink


def _as_talking_heads(pair: Any, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Returns the two matrices that heads are mixed by."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            "`talking_heads` must be a pair of matrices (or None), one for before and "
            "one for after softmax. "
            f"Received: talking_heads={pair!r} (of type {type(pair).__name__})"
        )
    first, second = (
        None if x is None else _as_float_tensor("talking_heads", x) for x in pair
    )
    for mixing in (first, second):
        if mixing is not None and tuple(mixing.shape) != (heads, heads):
            raise ValueError(
                f"`talking_heads` must be matrices of shape (N, N) = {heads, heads}. "
                f"Received: a matrix of shape {tuple(mixing.shape)}"
            )
    return first, second


def _check_seed(seed: Any) -> None:
    if isinstance(seed, SeedGenerator | DrawnSeed | SeedOfHeads):
        return
    if not 0 <= _checks.integer("seed", seed) < 2**32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1. Received: seed={seed}")
