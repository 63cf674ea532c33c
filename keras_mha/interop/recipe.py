"""What is read from another framework's module: a layer to be made."""

from dataclasses import dataclass, field
from typing import Any

from keras_mha.interop.projections import Projection, as_numpy, set_projections
from keras_mha.layers.multi_head_attention import MultiHeadAttention


@dataclass(frozen=True)
class Recipe:
    """A layer's arguments and weights, as they were found elsewhere.

    Attributes:
        arguments: Arguments of `MultiHeadAttention`, but for `use_bias`.
        query: Kernel and bias, or `None` for no bias, of the query's projection.
        key: The same of the key's.
        value: The same of the value's.
        output: The same of the output's.
        layout: How the kernels lie, see `set_projections`.
        weights: Other weights by their attributes, such as `"sink"` or
            `"position.table"`.
    """

    arguments: dict[str, Any]
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    layout: str = "torch"
    weights: dict[str, Any] = field(default_factory=dict)


def make_layer(recipe: Recipe, **kwargs: Any) -> MultiHeadAttention:
    """Makes the layer, built and with its weights.

    Args:
        recipe: What was read.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.
    """
    projections = {
        name: getattr(recipe, name) for name in ("query", "key", "value", "output")
    }
    # Where only some projections have a bias, that of the others is zero.
    use_bias = any(x.bias is not None for x in projections.values())
    layer = MultiHeadAttention(**recipe.arguments, use_bias=use_bias, **kwargs)
    set_projections(layer, **projections, layout=recipe.layout)
    for path, array in recipe.weights.items():
        owner = layer
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, name).assign(as_numpy(array))
    return layer
