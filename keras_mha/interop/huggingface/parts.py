"""What the readers of Hugging Face's modules have in common."""

import math
from operator import attrgetter
from typing import Any

import numpy as np

from keras_mha.interop.projections import Projection, as_numpy
from keras_mha.interop.recipe import Recipe

LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"  # GPT-2's linear layer


def projections(module: Any, *names: str) -> list[Projection]:
    """Returns a module's linear layers, found by their attributes' names."""
    return [projection(module, name) for name in names]


def projection(module: Any, name: str) -> Projection:
    """Returns one linear layer as a projection in the layout `"torch"`.

    Raises:
        ValueError: If it is of a subclass or something in its place: what adapters add
            and what quantized weights mean cannot be seen from the weights.
    """
    part = attrgetter(name)(module)
    kind = f"{type(part).__module__}.{type(part).__qualname__}"
    if kind not in (LINEAR, CONV1D):
        raise ValueError(
            f"`module`'s {name} must be a torch.nn.Linear as transformers makes it. "
            "Merge adapters and undo quantization first. "
            f"Received: {name} of type {kind}"
        )
    kernel = as_numpy(part.weight)
    bias = None if part.bias is None else as_numpy(part.bias)
    return Projection(kernel.T if kind == CONV1D else kernel, bias)


def split(fused: Projection, *sizes: int) -> list[Projection]:
    """Splits a fused projection into parts with so many outputs each."""
    ends = np.cumsum(sizes)[:-1]
    kernels = np.split(fused.kernel, ends)
    biases = [None] * len(sizes) if fused.bias is None else np.split(fused.bias, ends)
    return list(map(Projection, kernels, biases))


def split_heads(fused: Projection, heads: int) -> list[Projection]:
    """Splits a projection in which query, key and value alternate head by head."""

    def parts(array):
        array = array.reshape(heads, 3, -1, *array.shape[1:])
        return [array[:, i].reshape(-1, *array.shape[3:]) for i in range(3)]

    biases = [None] * 3 if fused.bias is None else parts(fused.bias)
    return list(map(Projection, parts(fused.kernel), biases))


def recipe(
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection,
    *,
    width: int,
    dropout: float,
    scale: float | None = None,
    weights: dict[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """Returns the recipe of a layer.

    Args:
        query: Projection of the query, in the layout `"torch"`, as the others.
        key: Projection of the key.
        value: Projection of the value.
        output: Projection of the heads' outputs.
        width: Of each head; how many there are follows from the kernels.
        dropout: Of the attention weights.
        scale: Factor of the dot products.
        weights: Other weights, as `Recipe` has them.
        **options: Further arguments of `MultiHeadAttention`.
    """
    heads, groups = (len(x.kernel) // width for x in (query, key))
    inputs, outputs = query.kernel.shape[1], len(output.kernel)
    # Left out where they are what the layer would take by itself.
    if scale is not None and math.isclose(scale, width**-0.5):
        scale = None
    arguments = {
        "num_heads": heads,
        "key_dim": width,
        "num_key_value_heads": None if groups == heads else groups,
        "output_shape": None if outputs == inputs else outputs,
        "dropout": dropout,
        "scale": scale,
        **options,
    }
    return Recipe(arguments, query, key, value, output, weights=weights or {})
