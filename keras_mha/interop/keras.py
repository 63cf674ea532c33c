"""From Keras's own attention layers."""

from collections.abc import Iterator
from typing import Any

import keras

from keras_mha.interop.model_copy import copy_rules, name_scopes, value_of
from keras_mha.layers.multi_head_attention import MultiHeadAttention

# Exactly these: a subclass may change what its parent's weights mean.
KERAS_LAYERS = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def from_keras(layer: keras.layers.Layer) -> MultiHeadAttention:
    """Makes our layer of Keras's `MultiHeadAttention` or `GroupQueryAttention`.

    Its whole configuration and state are taken over: name, dtype policies, weights,
    trainable flags, LoRA, int8 weights, and the state of its dropout's seed.
    Only `flash_attention` is not: ours chooses the implementation by itself.

    Args:
        layer: The layer, which stays as it is. One without weights gives one without.

    Returns:
        A `MultiHeadAttention`, built if `layer` is.

    Raises:
        TypeError: If `layer` is neither of them, or of a subclass.
        ValueError: If it is quantized otherwise than to int8 or float8.

    Example:

    >>> old = keras.layers.MultiHeadAttention(num_heads=8, key_dim=64)
    >>> new = keras_mha.interop.from_keras(old)
    """
    if type(layer) not in KERAS_LAYERS:
        raise TypeError(
            "`layer` must be a keras.layers.MultiHeadAttention or "
            "keras.layers.GroupQueryAttention, not of a subclass. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    new = MultiHeadAttention.from_config(_config_of(layer))
    if layer.built:
        with name_scopes(layer.path):
            new.build_from_config(layer.get_build_config())
        _copy_state(layer, new)
    return new


def _config_of(layer: keras.layers.Layer) -> dict[str, Any]:
    config = layer.get_config()
    if type(layer) is keras.layers.GroupQueryAttention:
        config["num_heads"] = config.pop("num_query_heads")
        config["key_dim"] = config.pop("head_dim")
    is_map = isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap)
    projections = projections_of(layer)
    if projections and (is_map or any(x.quantization_mode for x in projections)):
        config["dtype"] = _policies(layer, projections)
    return config


def _policies(layer, projections) -> keras.dtype_policies.DTypePolicyMap:
    """Returns what each projection computes in, wherever the copy's path leads."""
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=_policy_of(layer))
    for dense in projections:
        if dense.quantization_mode not in (None, "int8", "float8"):
            raise ValueError(
                "`layer` must not be quantized otherwise than to int8 or float8. "
                f"Received: {dense.name!r} quantized to {dense.quantization_mode}"
            )
        policies[f".*/{dense.name}"] = _policy_of(dense)
    return policies


def _policy_of(layer: keras.layers.Layer) -> keras.dtype_policies.DTypePolicy:
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[layer.path] if is_map else policy


def projections_of(layer: keras.layers.Layer) -> list[keras.layers.EinsumDense]:
    """Returns the projections that a layer has, in one order for all."""
    names = ("_query_dense", "_key_dense", "_value_dense", "_gate_dense")
    found = [getattr(layer, name, None) for name in (*names, "_output_dense")]
    return [dense for dense in found if dense is not None]


def _copy_state(old: keras.layers.Layer, new: MultiHeadAttention) -> None:
    for dense, copy in zip(projections_of(old), projections_of(new), strict=True):
        if dense.lora_enabled:
            # Keras before 3.9 has no `lora_alpha`.
            alpha = getattr(dense, "lora_alpha", None)
            more = {} if alpha is None else {"lora_alpha": alpha}
            copy.enable_lora(dense.lora_rank, **more)
        copy.trainable = dense.trainable
    for part, copy in pairs_of_parts(old, new):
        if isinstance(part, keras.Variable):
            copy.assign(value_of(part))
            copy.trainable = part.trainable
            copy_rules(part, copy)


def pairs_of_parts(
    old: keras.layers.Layer, new: MultiHeadAttention
) -> Iterator[tuple[Any, Any]]:
    """Yields the sublayers and variables of Keras's layer, each with its copy."""
    if not old.built:
        return
    sublayers = (*projections_of(old), old._dropout_layer)
    copies = (*projections_of(new), new._dropout_layer)
    for sublayer, copy in zip(sublayers, copies, strict=True):
        yield sublayer, copy
        variables = {variable.name: variable for variable in copy.variables}
        for variable in sublayer.variables:
            yield variable, variables[variable.name]
