"""Weights of another layer's projections, put into ours."""

import math
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_mha import _checks
from keras_mha._keras import Shape, is_symbolic
from keras_mha.layers.multi_head_attention import MultiHeadAttention

LAYOUTS = ("keras", "dense", "torch")


def set_projections(
    layer: MultiHeadAttention,
    query: Any = None,
    key: Any = None,
    value: Any = None,
    output: Any = None,
    *,
    qkv: Any = None,
    layout: str = "keras",
) -> None:
    """Gives a layer the projections of another one, from any framework.

    Each projection is a kernel or a pair of kernel and bias (what a Keras layer's
    `get_weights()` returns is one too). Without a bias, that of the layer becomes zero.
    Arrays are NumPy's or any backend's, of any floating-point dtype. With N heads, K
    key and value heads (N unless grouped) and heads' widths H and V the layouts are

    | layout | query | key | value | output | fused `qkv` |
    | --- | --- | --- | --- | --- | --- |
    | `"keras"` | (D, N, H) | (D, K, H) | (D, K, V) | (N, V, E) | (D, N + 2 K, H) |
    | `"dense"` | (D, N H) | (D, K H) | (D, K V) | (N V, E) | (D, N H + K H + K V) |
    | `"torch"` | (N H, D) | (K H, D) | (K V, D) | (E, N V) | (N H + K H + K V, D) |

    and biases have the axes of the kernel after the projection, flat or not: (N H,) and
    (N, H) are the same. A kernel of one head, (D / N, H) or in torch's layout
    (H, D / N), is shared by all: each head projects its own share of the features.

    Args:
        layer: A `MultiHeadAttention`. One that has no weights yet is built from the
            shapes of query, key and value, for inputs of shape (B, T, D).
        query: Projection of the query; those left out stay as they are.
        key: Projection of the key.
        value: Projection of the value.
        output: Projection of the heads' outputs.
        qkv: The first three in one, one after the other, in their place.
        layout: `"keras"`, `"dense"` (as of `keras.layers.Dense`) or `"torch"` (as of
            `torch.nn.Linear`).

    Raises:
        TypeError: If an argument is of a wrong type or dtype.
        ValueError: If a shape is wrong (the message says of which projection, what came
            and what is expected), or the layer is quantized or has LoRA enabled. The
            layer is then left as it was.

    Example:

    >>> layer = keras_mha.MultiHeadAttention(num_heads=8, key_dim=64)
    >>> linear = {name: torch.nn.Linear(512, 512) for name in ("query", "key", "value")}
    >>> keras_mha.interop.set_projections(
    ...     layer,
    ...     **{name: (x.weight, x.bias) for name, x in linear.items()},
    ...     layout="torch",
    ... )
    """
    if not isinstance(layer, MultiHeadAttention):
        raise TypeError(
            "`layer` must be a keras_mha.MultiHeadAttention. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    if layout not in LAYOUTS:
        _checks.choice("layout", layout, LAYOUTS)
    given = {"query": query, "key": key, "value": value, "output": output}
    given = {name: _checked(name, x) for name, x in given.items() if x is not None}
    if qkv is not None:
        given = {**_split(layer, _checked("qkv", qkv), layout, given), **given}
    if not given:
        raise ValueError(
            "`set_projections` needs at least one of `query`, `key`, `value`, `output` "
            "and `qkv`. Received none"
        )
    _check_changeable(layer)
    arranged = _Arrangement(layer, layout).arrange(given)
    if not layer.built:
        # By the kernels' first axes, which are the widths of the inputs.
        shapes = [(None, None, arranged[x].kernel.shape[0]) for x in _INPUTS]
        layer.build(*shapes)
    for name, projection in arranged.items():
        dense = getattr(layer, f"{name}_dense")
        dense.kernel.assign(projection.kernel)
        if dense.bias is not None:
            dense.bias.assign(projection.bias)


_INPUTS = ("query", "value", "key")


class Projection(NamedTuple):
    """A kernel and its bias, or `None`, as NumPy arrays."""

    kernel: np.ndarray
    bias: np.ndarray | None = None


def as_numpy(array: Any) -> np.ndarray:
    """Returns a copy of any framework's array as NumPy's, half types as float32."""
    if isinstance(array, keras.Variable):
        array = keras.ops.convert_to_numpy(array)
    elif hasattr(array, "detach"):  # torch's, where NumPy has no bfloat16
        array = array.detach().cpu()
        array = (array.float() if array.itemsize < 4 else array).numpy()
    # A copy: JAX would go on with the memory of whoever gave it, and see it change.
    array = np.asarray(array).copy()
    if "float" in array.dtype.name and array.dtype.itemsize < 4:
        array = array.astype("float32")
    return array


def _checked(name: str, given: Any) -> Projection:
    """Returns what was given for a projection as arrays, or raises."""
    if isinstance(given, tuple | list):
        if len(given) not in (1, 2) or isinstance(given[0], tuple | list):
            raise TypeError(
                f"`{name}` must be a kernel or a pair (kernel, bias) of arrays. "
                f"Received: a {type(given).__name__} of {len(given)} "
                f"{type(given[0]).__name__ if given else 'elements'}"
            )
        kernel, bias = (*given, None)[:2]
    else:
        kernel, bias = given, None
    kernel = _checked_array(f"{name}'s kernel", kernel)
    return Projection(
        kernel, None if bias is None else _checked_array(f"{name}'s bias", bias)
    )


def _checked_array(what: str, array: Any) -> np.ndarray:
    if not hasattr(array, "shape") or is_symbolic(array):
        raise TypeError(
            f"{what} must be an array. Received: {array!r} "
            f"(of type {type(array).__name__})"
        )
    array = as_numpy(array)
    if "float" not in array.dtype.name:
        raise TypeError(
            f"{what} must be of a floating-point dtype. "
            f"Received: an array of dtype {array.dtype}"
        )
    return array


def _check_changeable(layer: MultiHeadAttention) -> None:
    if not layer.built:
        _check_builds_floats(layer)
        return
    for name in (*_INPUTS, "output"):
        dense = getattr(layer, f"{name}_dense")
        if dense.quantization_mode is not None or dense.lora_enabled:
            state = "has LoRA enabled" if dense.lora_enabled else "is quantized"
            raise ValueError(
                f"`layer`'s {name} projection {state}: set the projections before. "
                f"Received: layer={layer.name!r}"
            )


def _check_builds_floats(layer: MultiHeadAttention) -> None:
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    parts = [policy.default_policy, *policy.values()] if is_map else [policy]
    quantized = [part.name for part in parts if part.quantization_mode is not None]
    if quantized:
        raise ValueError(
            "`layer`'s dtype is quantized: set the projections of one of floating "
            f"point and quantize that. Received: dtype={quantized[0]!r}"
        )


def _split(layer, fused: Projection, layout: str, others: dict) -> dict:
    """Splits a fused projection into those of query, key and value."""
    clash = [name for name in _INPUTS if name in others]
    if clash:
        raise ValueError(
            f"`qkv` stands for query, key and value. Received: `{clash[0]}` beside it"
        )
    heads, groups = layer.num_heads, layer.num_key_value_heads
    sizes = np.array([heads, groups, groups])
    features = sizes * [layer.key_dim, layer.key_dim, layer.value_dim]
    axis = 0 if layout == "torch" else 1
    total = int(features.sum())
    if layout == "keras":
        if layer.key_dim != layer.value_dim:
            raise ValueError(
                "`qkv` in the layout 'keras' needs heads of one width. Received: a "
                f"layer with key_dim={layer.key_dim} and value_dim={layer.value_dim}"
            )
        wanted: tuple = ("D", int(sizes.sum()), layer.key_dim)
    else:
        sizes = features
        wanted = (total, "D") if layout == "torch" else ("D", total)
    if not _fits(fused.kernel.shape, wanted):
        raise _wrong_shape("qkv", "kernel", layout, fused.kernel.shape, wanted)
    flat, by_heads = (total,), wanted[1:] if layout == "keras" else None
    if fused.bias is not None and fused.bias.shape not in (flat, by_heads):
        raise _wrong_shape("qkv", "bias", layout, fused.bias.shape, by_heads or flat)
    ends = np.cumsum(sizes)[:-1]
    kernels = np.split(fused.kernel, ends, axis)
    biases = [None] * 3
    if fused.bias is not None:
        rows = fused.bias.reshape(int(sizes.sum()), -1)
        biases = [part.reshape(-1) for part in np.split(rows, ends)]
    parts = map(Projection, kernels, biases)
    return dict(zip(("query", "key", "value"), parts, strict=True))


class _Arrangement:
    """Brings kernels and biases of a layout into the shapes that a layer has."""

    def __init__(self, layer: MultiHeadAttention, layout: str):
        self.layer = layer
        self.layout = layout
        heads, groups = layer.num_heads, layer.num_key_value_heads
        self.heads = {
            "query": (heads, layer.key_dim),
            "key": (groups, layer.key_dim),
            "value": (groups, layer.value_dim),
            "output": (heads, layer.value_dim),
        }

    def arrange(self, given: dict[str, Projection]) -> dict[str, Projection]:
        """Returns the projections given in Keras's layout, or raises."""
        layer, arranged = self.layer, {}
        if not layer.built:
            self._check_enough(given)
        for name in _INPUTS:
            if name in given:
                dense = getattr(layer, f"{name}_dense") if layer.built else None
                width = dense.kernel.shape[0] if dense else None
                arranged[name] = self._input(name, given[name], width)
        if "output" in given:
            if layer.built:
                outputs = tuple(layer.output_dense.kernel.shape[2:])
            else:
                query_width = arranged["query"].kernel.shape[0]
                outputs = layer.get_config()["output_shape"] or (query_width,)
            arranged["output"] = self._output(given["output"], outputs)
        return arranged

    def _check_enough(self, given: dict[str, Projection]) -> None:
        missing = [name for name in _INPUTS if name not in given]
        if missing:
            raise ValueError(
                "`layer` has no weights yet: it takes `query`, `key` and `value` (or "
                f"`qkv`) to build it, or call it before. Missing: {missing}"
            )
        if self.layer.attention_axes is not None:
            raise ValueError(
                "`layer` has `attention_axes` and no weights yet: build it with the "
                "shape of its inputs first. "
                f"Received: attention_axes={self.layer.attention_axes}"
            )

    def _input(self, name: str, given: Projection, width: int | None) -> Projection:
        heads, size = self.heads[name]
        kernel, bias = given
        is_shared = heads > 1 and self._is_of_one_head(kernel, heads, size, width)
        if is_shared:
            kernel = _blocks(kernel.T if self.layout == "torch" else kernel, heads)
            bias = bias if bias is None or bias.size != size else np.tile(bias, heads)
        else:
            wanted = {
                "keras": (width or "D", heads, size),
                "dense": (width or "D", heads * size),
                "torch": (heads * size, width or "D"),
            }[self.layout]
            if not _fits(kernel.shape, wanted):
                raise _wrong_shape(name, "kernel", self.layout, kernel.shape, wanted)
            kernel = kernel.T if self.layout == "torch" else kernel
        kernel = kernel.reshape(kernel.shape[0], heads, size)
        return Projection(kernel, self._bias(name, bias, (heads, size)))

    def _is_of_one_head(self, kernel, heads, size, width) -> bool:
        if kernel.ndim != 2:
            return False
        inputs, outputs = kernel.shape[:: -1 if self.layout == "torch" else 1]
        # A square one if the width is not known: else what is a mistake could pass.
        return outputs == size and heads * inputs == (width or heads * size)

    def _output(self, given: Projection, outputs: Shape) -> Projection:
        heads, size = self.heads["output"]
        kernel, bias = given
        wanted = {
            "keras": (heads, size, *outputs),
            "dense": (heads * size, *outputs),
            "torch": (math.prod(outputs), heads * size),
        }[self.layout]
        if kernel.shape != wanted:
            raise _wrong_shape("output", "kernel", self.layout, kernel.shape, wanted)
        kernel = kernel.T if self.layout == "torch" else kernel
        kernel = kernel.reshape(heads, size, *outputs)
        return Projection(kernel, self._bias("output", bias, outputs))

    def _bias(self, name: str, bias: np.ndarray | None, shape: Shape):
        if not self.layer.use_bias:
            if bias is not None:
                raise ValueError(
                    f"`{name}` has a bias, `layer` has none: make it with "
                    f"use_bias=True. Received: a bias of shape {bias.shape}"
                )
            return None
        if bias is None:
            return np.zeros(shape, "float32")
        if bias.shape not in (shape, (math.prod(shape),)):
            raise _wrong_shape(name, "bias", self.layout, bias.shape, shape)
        return bias.reshape(shape)


def _blocks(kernel: np.ndarray, heads: int) -> np.ndarray:
    """`(D / heads, size)` to `(D, heads, size)`, each head reading its own features."""
    return np.einsum("de,nm->ndme", kernel, np.eye(heads)).reshape(
        heads * kernel.shape[0], heads, kernel.shape[1]
    )


def _fits(shape: Shape, wanted: tuple) -> bool:
    return len(shape) == len(wanted) and all(
        size == goal or goal == "D" for size, goal in zip(shape, wanted, strict=True)
    )


def _wrong_shape(name, part, layout, shape, wanted) -> ValueError:
    wanted = f"({', '.join(map(str, wanted))}{',' if len(wanted) == 1 else ''})"
    return ValueError(
        f"`{name}`'s {part} must have the shape {wanted} in the layout {layout!r}. "
        f"Received: shape {tuple(shape)}"
    )
