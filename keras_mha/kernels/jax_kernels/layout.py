"""Between the layout that tiles have and that of kernels with positions before heads.

Here a query, an output and their gradients have the shape `(B, T, N, width)`, and keys
and values `(B, S, K, width)`. Query head `n` reads key head `n // (N / K)`.
"""

import math
from typing import Any

import jax.numpy as jnp

from keras_mha.kernels.problem import positions_first as positions_first

# The sum of a row that sees nothing, for a gradient: weights are exactly 0 against it,
# also of keys that a kernel takes to be seen.
NO_SUM = 1e30

# Scores of hidden keys are from minus half of this to minus this. With more, rounding
# in a kernel could leave differences of two such scores that are far from 0.
HIDDEN = 2.0**24

# The largest exponent of two in float16.
_MOST = 15


def keys_first(x: Any) -> Any:
    """`(B, K, width, S) -> (B, S, K, width)`."""
    return x.transpose(0, 3, 1, 2)


def heads_first(x: Any, groups: int) -> Any:
    """`(B, T, N, width) -> (B, K, width, G, T)`."""
    batch, rows, heads, width = x.shape
    x = x.reshape(batch, rows, groups, heads // groups, width)
    return x.transpose(0, 2, 4, 3, 1)


def multiple(of: int, number: int) -> int:
    """Returns the least multiple that is no less than a number."""
    return -(-number // of) * of


def padded(x: Any, axis: int, length: int, value: Any = 0) -> Any:
    """Returns `x` with values behind it, up to a length of this axis."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, missing)
    return jnp.pad(x, padding, constant_values=jnp.asarray(value, x.dtype))


def zero_unless(seen: Any, x: Any) -> Any:
    """Returns `x` with zeros where booleans of its leading axes are not `True`."""
    seen = seen.reshape(*seen.shape, *(1,) * (x.ndim - seen.ndim))
    return jnp.where(seen, x, jnp.zeros((), x.dtype))


# ------------------------------------------------------------------------ hidden keys


def hiding_exponent(scale: float) -> int | None:
    """Returns the exponent of the power of two that takes a hidden key's product with
    any query to a score of `HIDDEN`; `None` where half types have none."""
    if not 2.0**-12 <= scale <= 2.0**12:
        return None
    return min(math.floor(math.log2(HIDDEN / scale)), 2 * _MOST)


def with_hiding_feature(
    query: Any, key: Any, visible: Any, exponent: int
) -> tuple[Any, Any]:
    """Adds a feature by which a query's product with keys that are not visible is minus
    two to the power of the exponent, and exactly 0 with all others."""
    half = exponent // 2
    feature = jnp.full_like(query[..., :1], 2.0**half)
    other = jnp.where(visible, 0.0, -(2.0 ** (exponent - half))).astype(key.dtype)
    other = jnp.broadcast_to(other[:, :, None, None], (*key.shape[:3], 1))
    return (
        jnp.concatenate([query, feature], axis=3),
        jnp.concatenate([key, other], axis=3),
    )


# ---------------------------------------------------------- what a kernel returned


def finished(
    output: Any, sums: Any, seen: Any, sink: Any, groups: int
) -> tuple[Any, Any]:
    """Returns what `blockwise.forward` does of what a kernel made.

    Args:
        output: Shape `(B, T, N, V)`.
        sums: The logarithms of the rows' sums, shape `(B, N, T)`.
        seen: Which queries see anything; booleans that broadcast to `(B, N, T)`, `None`
            for all. What the kernel made of others is not looked at.
        sink: Shape `(K, G)`, or `None`.
        groups: Number of key heads.
    """
    if seen is not None:
        output = zero_unless(jnp.swapaxes(seen, 1, 2), output)
        sums = jnp.where(seen, sums, math.inf)
    output = heads_first(output, groups)
    sums = sums.reshape(output.shape[0], groups, 1, *output.shape[3:])
    return (output, sums) if sink is None else _with_sink(output, sums, sink)


def _with_sink(output, sums, sink):
    """Returns the output and the sums of a softmax that a sink joined."""
    sink = sink.astype(sums.dtype)[:, None, :, None]
    sums = jnp.where(sums == math.inf, -math.inf, sums)
    joined = jnp.logaddexp(sums, sink)
    joined = jnp.where(joined == -math.inf, math.inf, joined)
    # Where nothing else is seen the output is 0 already.
    return (output * jnp.exp(sums - joined)).astype(output.dtype), joined


def for_gradient(
    output: Any, lse: Any, d_output: Any, seen: Any, length: int, width: int
) -> tuple[Any, Any, Any]:
    """Returns the rows' sums, the output and its gradient for a kernel's own gradient.

    With the sums of a softmax that a sink joined, it is that softmax's.

    Args:
        output: As of `blockwise.backward`.
        lse: As there.
        d_output: As there.
        seen: As of `finished`.
        length: How many queries the kernel takes; those behind the last see nothing.
        width: How wide its heads are.
    """
    batch, groups, _, shared, rows = lse.shape
    sums = lse.reshape(batch, groups * shared, rows)
    output, d_output = (
        positions_first(x) for x in (output, d_output.astype(output.dtype))
    )
    if seen is not None:
        sums = jnp.where(seen, sums, NO_SUM)
    output, d_output = (
        padded(padded(x, 3, width), 1, length) for x in (output, d_output)
    )
    return padded(sums, 2, length, NO_SUM), output, d_output


def gradient_of_sink(sink: Any, output: Any, lse: Any, d_output: Any) -> Any:
    """Returns the gradient of a sink, given what `blockwise.backward` is given."""
    share = jnp.sum(
        d_output.astype("float32") * output.astype("float32"), axis=2, keepdims=True
    )
    weights = jnp.exp(sink.astype("float32")[:, None, :, None] - lse)
    return -jnp.sum(weights * share, axis=(0, 2, 4))
