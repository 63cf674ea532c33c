"""Inputs and the two Keras layers, the same for every backend."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_mha
from benchmarks.cases import (
    FEATURES,
    GROUPS,
    HEADS,
    LONGEST_WITH_WHOLE_SCORES,
    RATE,
    WIDTH,
    WINDOW,
    Case,
)


def random(*shape: int) -> np.ndarray:
    """Returns normal float32 numbers, the same every time."""
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def inputs(case: Case) -> np.ndarray:
    """Returns `(B, T, features)`."""
    return random(case.batch, case.length, FEATURES)


def heads(case: Case) -> np.ndarray:
    """Returns `(B, T, heads, width)`."""
    return random(case.batch, case.length, HEADS, WIDTH)


def valid(case: Case) -> np.ndarray:
    """Returns booleans `(B, T)`: the last quarter is padding."""
    valid = np.arange(case.length)[None] < case.length * 3 // 4
    return np.repeat(valid, case.batch, axis=0)


def allowed(case: Case) -> np.ndarray:
    """Returns booleans `(T, T)` for peers that take no other mask."""
    rows, columns = np.ogrid[: case.length, : case.length]
    allowed = columns <= rows
    if case.kind == "window":
        allowed &= rows - columns < WINDOW
    if case.kind == "padded":
        allowed &= valid(case)[:1]
    return allowed


def bias(case: Case) -> np.ndarray:
    """Returns `(T, T)`."""
    return random(case.length, case.length)


def our_layer(case: Case) -> tuple[keras.Layer, Callable[..., Any]]:
    """Returns our layer and how the case calls it."""
    layer = keras_mha.MultiHeadAttention(
        HEADS,
        WIDTH,
        num_key_value_heads=GROUPS if case.kind == "grouped" else None,
        **_layer_options(case),
    )
    options = _call_options(case)
    if case.kind == "biased":
        options["attention_bias"] = keras.ops.convert_to_tensor(bias(case))
    return _built(layer, case, options)


def keras_layer(case: Case) -> tuple[keras.Layer, Callable[..., Any]]:
    """Returns Keras's layer and how the case calls it."""
    if case.kind == "grouped":
        layer = keras.layers.GroupQueryAttention(
            WIDTH, HEADS, GROUPS, dtype=policy(case)
        )
    else:
        layer = keras.layers.MultiHeadAttention(HEADS, WIDTH, **_layer_options(case))
    return _built(layer, case, _call_options(case))


def _layer_options(case: Case) -> dict[str, Any]:
    return {
        "dropout": RATE if case.kind == "dropout" else 0.0,
        "sliding_window": WINDOW if case.kind == "window" else None,
        "dtype": policy(case),
    }


def policy(case: Case) -> str:
    """Returns Keras's dtype policy: half types with float32 weights, or float32."""
    return case.dtype if case.dtype == "float32" else f"mixed_{case.dtype}"


def _call_options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {"use_causal_mask": True}
    if case.kind == "padded":
        options["value_mask"] = keras.ops.convert_to_tensor(valid(case))
    return options


def _built(layer, case, options):
    shape = (case.batch, case.length, FEATURES)
    layer.build(shape, shape)

    def call(x, *, training):
        return layer(x, x, training=training, **options)

    return layer, call


def has_whole_scores(case: Case) -> bool:
    """Whether peers that hold all scores can run the case on a usual machine."""
    return case.length <= LONGEST_WITH_WHOLE_SCORES


def layers(case: Case, wrap: Callable) -> dict[str, Callable]:
    """Returns makers of both Keras layers.

    Args:
        case: What is measured.
        wrap: Makes a contestant of a layer and its call.
    """
    makers = {"keras_mha": lambda case: wrap(*our_layer(case), case)}
    # Keras's layer takes no bias.
    if case.kind != "biased" and has_whole_scores(case):
        makers["keras"] = lambda case: wrap(*keras_layer(case), case)
    return makers


def our_function(query: Any, key: Any, value: Any) -> Any:
    """Our attention alone."""
    return keras_mha.dot_product_attention(
        query, key, value, mask=keras_mha.masks.Causal()
    )
