"""Dropout of a layer's call: whether, and where its numbers come from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops

from keras_mha._keras import Tensor
from keras_mha.layers.rematerialization import as_function_of_floats
from keras_mha.ops.dot_product_attention import drawn
from keras_mha.ops.tensors import known_numbers


def as_trained(layer: Any, attend: Callable, training: Any) -> Any:
    """Runs `attend`, with dropout if `training`, which a program may learn late."""
    if layer.dropout == 0:
        return attend(dropout=0.0)
    if ops.is_tensor(training):
        known = known_numbers(training)
        training = training if known is None else bool(known)
    if not ops.is_tensor(training):
        if not training:
            return attend(dropout=0.0)
        return attend(dropout=layer.dropout, seed=_seed(layer))
    seed = drawn(_seed(layer))  # a generator's state cannot leave a branch
    return ops.cond(
        training,
        lambda: attend(dropout=layer.dropout, seed=seed),
        lambda: attend(dropout=0.0),
    )


def _seed(layer):
    """Returns where dropout's numbers come from: a seed drawn already, once."""
    if layer._drawn_seed is None:
        seed = layer._dropout_layer.seed_generator
        return seed if layer._share is None else layer._share.seed(seed)
    seed, layer._drawn_seed = layer._drawn_seed, None
    return seed


def rematerializable(
    layer: Any, layer_call: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable, list[Tensor]]:
    """Returns a call as a function of floats that drops the same weights each time.

    Args:
        layer: The layer.
        layer_call: Its `call`.
        args: What it is to be called with, by position.
        kwargs: By name.

    Returns:
        The function, and the floats that it is to be called with.
    """
    training, seed = kwargs.get("training"), None
    if layer.dropout and (ops.is_tensor(training) or training):
        seed = drawn(_seed(layer))  # once, for both times

    def call(*args, **kwargs):
        layer._drawn_seed = seed
        try:
            return layer_call(*args, **kwargs)
        finally:
            layer._drawn_seed = None

    return as_function_of_floats(call, args, kwargs)
