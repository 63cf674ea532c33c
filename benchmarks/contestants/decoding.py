"""Decoding with a cache: our layer and KerasHub's, with the same weights and caches.

A contestant is a function without arguments that returns the step's output and its new
cache when both are done.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_mha
from benchmarks.cases import FEATURES, HEADS, WIDTH, Step
from benchmarks.contestants import common
from keras_mha import info

# Takes a token `(1, 1, features)` and what the layer keeps; returns output and the new.
Call = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def require_peer() -> None:
    """Raises `MissingExtra` if KerasHub is not installed."""
    info.require("decoding beside KerasHub", {"keras_hub": "keras-hub"}, "benchmark")


def contestants(steps: Iterable[Step]) -> dict[str, Callable[[], object]]:
    """Makes a contestant of each step for the current backend, by the step's name."""
    backend = keras.backend.backend()
    module = importlib.import_module(f"benchmarks.contestants.{backend}")
    return {step.name: _contestant(module.decoding, step) for step in steps}


def _contestant(compiled, step):
    makers = {"keras_mha": _keras_mha, "keras_hub": _keras_hub}
    layer, call, cache = makers[step.contestant](step)
    tokens = ops.convert_to_tensor(common.random(step.count, 1, 1, FEATURES))
    return compiled(layer, call, tokens, cache, step.program)


def _keras_mha(step: Step) -> tuple[keras.Layer, Call, dict[str, Any]]:
    layer = _with_weights(keras_mha.MultiHeadAttention(HEADS, WIDTH))
    key, value = _held(step)
    length = ops.full((1,), step.token - step.count, dtype="int32")

    def call(token, cache):
        return layer(token, cache=cache, use_causal_mask=True)

    return layer, call, {"key": key, "value": value, "length": length}


def _keras_hub(step: Step) -> tuple[keras.Layer, Call, dict[str, Any]]:
    require_peer()
    from keras_hub.layers import CachedMultiHeadAttention

    layer = _with_weights(CachedMultiHeadAttention(HEADS, WIDTH))
    held = ops.stack(_held(step), axis=1)
    index = ops.convert_to_tensor(step.token - step.count, dtype="int32")

    def call(token, cache):
        # The mask and the index are left to the caller: KerasHub's decoders do this.
        held, index = cache["held"], cache["index"]
        output, held = layer(
            token,
            token,
            attention_mask=ops.arange(step.slots, dtype="int32")[None, None] <= index,
            cache=held,
            cache_update_index=index,
        )
        return output, {"held": held, "index": index + 1}

    return layer, call, {"held": held, "index": index}


def _with_weights(layer: keras.Layer) -> keras.Layer:
    """Builds a layer and gives it numbers that are the same for both."""
    layer.build((1, 1, FEATURES), (1, 1, FEATURES))
    normal = np.random.default_rng(0).normal
    layer.set_weights([normal(0, 0.05, w.shape) for w in layer.get_weights()])
    return layer


def _held(step: Step) -> tuple[Any, Any]:
    """Returns keys and values `(1, slots, heads, width)`: numbers in every slot."""
    key, value = common.random(2, 1, step.slots, HEADS, WIDTH)
    return ops.convert_to_tensor(key), ops.convert_to_tensor(value)
