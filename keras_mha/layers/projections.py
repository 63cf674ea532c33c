"""The layer's projections, sublayers of the names and shapes that Keras's layer has."""

import functools
import string
from typing import Any

import keras
from keras import ops

from keras_mha._keras import (
    Shape,
    Tensor,
    dtype_name,
    is_called_otherwise,
    kernel_variable,
)
from keras_mha.layers import input_checks
from keras_mha.layers.normalization import normalize_heads
from keras_mha.ops.tensors import is_better_multiplied, is_called_plainly, multiplied


def add_projections(
    layer: Any, query_shape: Shape, value_shape: Shape, key_shape: Shape
) -> None:
    """Gives a layer its sublayers, built for inputs of these shapes."""
    heads, groups = layer.num_heads, layer.num_key_value_heads
    # In the order of Keras's layer, which files of LoRA weights and equal initial
    # weights from equal seeds both count on.
    layer.query_dense = _to_heads(layer, "query", query_shape, heads, layer.key_dim)
    layer.key_dense = _to_heads(layer, "key", key_shape, groups, layer.key_dim)
    if layer._use_gate:
        layer._gate_dense = _to_heads(
            layer, "gate", query_shape, heads, layer.value_dim, activation="sigmoid"
        )
    layer.value_dense = _to_heads(layer, "value", value_shape, groups, layer.value_dim)
    layer._dropout_layer = keras.layers.Dropout(
        layer.dropout, dtype=layer.dtype_policy, seed=layer.seed
    )
    layer.output_dense = _from_heads(layer, query_shape)


def _to_heads(layer, name, shape, heads, width, activation=None):
    """Makes `(B, *positions, D) -> (B, *positions, heads, width)`."""
    positions = string.ascii_lowercase[: len(shape) - 1]
    dense = keras.layers.EinsumDense(
        f"{positions}X,XYZ->{positions}YZ",
        output_shape=(None,) * (len(shape) - 2) + (heads, width),
        bias_axes="YZ" if layer.use_bias else None,
        activation=activation,
        name=name,
        **_arguments(layer, name),
    )
    # It need not warn that it loses the input's mask; the layer keeps it.
    dense.supports_masking = True
    dense.build(shape)
    return dense


def _from_heads(layer, query_shape):
    """Makes `(B, *positions, N, V) -> (B, *positions, *output_shape)`."""
    positions = string.ascii_lowercase[: len(query_shape) - 1]
    output_shape = layer._output_shape or (query_shape[-1],)
    outputs = string.ascii_uppercase[: len(output_shape)]
    dense = keras.layers.EinsumDense(
        f"{positions}YZ,YZ{outputs}->{positions}{outputs}",
        output_shape=(None,) * (len(query_shape) - 2) + output_shape,
        bias_axes=outputs if layer.use_bias else None,
        name="attention_output",
        **_arguments(layer, "attention_output"),
    )
    dense.build((*query_shape[:-1], layer.num_heads, layer.value_dim))
    return dense


def _arguments(layer, name):
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        # Its own part of the map, which quantization can then change.
        policy = policy[f"{layer.path}/{name}"]
    return {
        # A copy each: the same initializer twice would give the same weights.
        "kernel_initializer": copy_of(layer._kernel_initializer),
        "bias_initializer": copy_of(layer._bias_initializer),
        "kernel_regularizer": layer._kernel_regularizer,
        "bias_regularizer": layer._bias_regularizer,
        "activity_regularizer": layer._activity_regularizer,
        "kernel_constraint": layer._kernel_constraint,
        "bias_constraint": layer._bias_constraint,
        "dtype": policy,
    }


def copy_of(initializer: keras.initializers.Initializer) -> Any:
    """Returns an initializer like another, for a weight of its own."""
    return initializer.__class__.from_config(initializer.get_config())


def projected(dense: keras.Layer, x: Tensor) -> Tensor:
    """Returns `dense(x)`.

    Eagerly Keras takes as long to call a layer as a short sequence to be multiplied.
    Where a projection is a product and nothing more, it is only computed.
    """
    axes = _summed_axes(dense, x) if is_better_multiplied(x) else None
    if axes is None:
        return dense(x)
    bias = None if dense.bias is None else ops.convert_to_tensor(dense.bias)
    y = multiplied(x, ops.convert_to_tensor(dense.kernel), bias, axes)
    is_linear = dense.activation in (None, keras.activations.linear)
    return y if is_linear else dense.activation(y)


def _summed_axes(dense, x):
    """Returns over how many axes a layer that is a product sums; `None` where a call of
    it is more, or may be."""
    is_plain = (
        type(dense) is keras.layers.EinsumDense
        and dense.quantization_mode is None
        and dense.activity_regularizer is None
        and dense.compute_dtype == dtype_name(x)
        and not is_called_otherwise(dense)
        and is_called_plainly(dense)
    )
    return _axes_of_product(dense.equation, dense.bias_axes) if is_plain else None


@functools.cache
def _axes_of_product(equation, bias_axes):
    """Returns how many axes `(*lead, *summed)` and `(*summed, *out)` are summed over;
    `None` if the equation is of another kind."""
    inputs, output = equation.split("->")
    x, kernel = inputs.split(",")
    for axes in range(1, len(kernel)):
        lead, summed = x[:-axes], x[-axes:]
        out = kernel[axes:]
        if kernel == summed + out and output == lead + out:
            return axes if bias_axes in (None, out) else None
    return None


def query_heads(layer: Any, query: Tensor) -> Tensor:
    """Returns a query as normalised heads, `(B', T, N, H)`."""
    heads = projected(layer.query_dense, query)
    heads = normalized(layer, heads, layer.query_norm_scale)
    return layer._axes.fold(heads)


def key_heads(layer: Any, key: Tensor) -> Tensor:
    """Returns a key as normalised heads, `(B', S, K, H)`."""
    if layer.num_key_value_heads < layer.num_heads:
        kernel = kernel_variable(layer.key_dense).value
        input_checks.check_shared_heads(kernel, layer.num_key_value_heads)
    heads = normalized(layer, projected(layer.key_dense, key), layer.key_norm_scale)
    return layer._axes.fold(heads)


def value_heads(layer: Any, value: Tensor) -> Tensor:
    """Returns a value as heads, `(B', S, K, V)`."""
    return layer._axes.fold(projected(layer.value_dense, value))


def normalized(layer: Any, heads: Tensor, scale: Tensor | None) -> Tensor:
    """Returns heads as the layer's `qk_norm` has them."""
    if layer._qk_norm is None:
        return heads
    return normalize_heads(heads, layer._qk_norm, layer._qk_norm_epsilon, scale)


def quantized_dtype(layer: Any) -> dict[str, Any]:
    """Returns the dtype policy with what `quantize()` has made of the projections, as
    a config has it; nothing where none is quantized."""
    projections = [
        part
        for part in layer._flatten_layers(include_self=False)
        if isinstance(part, keras.layers.EinsumDense)
    ]
    if all(dense.quantization_mode is None for dense in projections):
        return {}
    policy = layer.dtype_policy
    policies = keras.dtype_policies.DTypePolicyMap(
        default_policy=getattr(policy, "default_policy", policy)
    )
    for dense in projections:
        # By a pattern: the layer's path may be another one when it is loaded.
        policies[f".*/{dense.name}"] = dense.dtype_policy
    return {"dtype": keras.dtype_policies.serialize(policies)}
