"""The features of the layer: how a layer that has one is made, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

import keras_mha
from keras_mha import masks

B, T, S, D, N, H = 4, 20, 23, 6, 2, 4  # B is halved, and shared by two devices
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Feature:
    """A row of tests.

    Args:
        column: Of the README's table, which has one for several features.
        layer: Arguments of the layer; what can be called is called for each layer.
        call: Arguments of the call that are no tensors.
        tensors: Arguments of the call that are, as NumPy arrays, the batch first.
            Where `query` is not among them it is `QUERY`.
        before: What happens to the query first.
        decodes: Whether the call goes on with a cache.
    """

    column: str
    layer: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    before: Any = None
    decodes: bool = False


class Dilated(masks.Mask):
    """A mask as a user writes one."""

    def allowed(self, rows, columns):
        return (rows - columns) % 3 != 1


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


skip_zeros = keras.layers.Masking()


def rotary_over_axes():
    return keras_mha.RotaryEmbedding(axes=2)


def alibi_over_axes():
    return keras_mha.ALiBi(axes=2, distance="euclidean")


def in_window():
    return keras_mha.RelativePositionBias(window=(4, 5))


QUERY = normal(B, T, D)
IMAGES = np.random.default_rng(1).normal(size=(B, 4, 5, D)).astype("float32")
COORDINATES = np.random.default_rng(1).integers(0, 9, size=(B, T, 2))
VALID = np.arange(T) < np.array([[T], [11], [17], [3]])
LONGER_VALID = np.arange(S) < np.array([[7], [S], [18], [0]])  # a row sees nothing
IDS = np.sort(RNG.integers(0, 3, size=(B, T)), axis=1).astype("int32")
CAUSAL = {"use_causal_mask": True}
ATTENTION_MASK = RNG.uniform(size=(B, T, T)) < 0.6
MEMORY = {"value": normal(B, S, D + 1), "key": normal(B, S, D + 2)}

FEATURES = {
    "plain": Feature("self, cross"),
    "cross-attention": Feature("self, cross", {"value_dim": 3}, {}, MEMORY),
    "several axes": Feature("self, cross", tensors={"query": normal(B, 4, 5, D)}),
    "causal": Feature("causal, window", {}, CAUSAL),
    "window": Feature("causal, window", {"sliding_window": 5}, CAUSAL),
    "padding": Feature("padding", {}, {}, {"query_mask": VALID}),
    "padding, causal": Feature("padding", {}, CAUSAL, {"query_mask": VALID}),
    "padding of the value": Feature(
        "padding", {}, {}, {**MEMORY, "value_mask": LONGER_VALID}
    ),
    "Keras mask": Feature(
        "padding", {}, {}, {"query": QUERY * VALID[..., None]}, before=skip_zeros
    ),
    "attention_mask": Feature("masks", {}, {}, {"attention_mask": ATTENTION_MASK}),
    "mask objects": Feature(
        "masks",
        {},
        {"attention_mask": masks.Causal() & ~masks.SlidingWindow(3) | masks.Prefix(2)},
    ),
    "a mask of one's own": Feature("masks", {}, {"attention_mask": Dilated()}),
    "segment_ids": Feature("segments", {}, CAUSAL, {"segment_ids": IDS}),
    "attention_bias": Feature("bias", {}, {}, {"attention_bias": normal(B, N, T, T)}),
    "RotaryEmbedding": Feature(
        "positions", {"position": keras_mha.RotaryEmbedding}, CAUSAL
    ),
    "ALiBi": Feature("positions", {"position": keras_mha.ALiBi}, CAUSAL),
    "RelativePositionBias": Feature(
        "positions", {"position": keras_mha.RelativePositionBias}
    ),
    "position_ids": Feature(
        "positions",
        {"position": keras_mha.RotaryEmbedding},
        {},
        {"position_ids": np.cumsum(RNG.integers(0, 3, size=(B, T)), axis=1)},
    ),
    "position_ids of a bias": Feature(
        "positions",
        {"position": keras_mha.RelativePositionBias},
        {},
        {"position_ids": np.cumsum(RNG.integers(0, 3, size=(B, T)), axis=1)},
    ),
    "RotaryEmbedding over axes": Feature(
        "positions", {"position": rotary_over_axes}, {}, {"query": IMAGES}
    ),
    "MixedRotaryEmbedding over axes": Feature(
        "positions",
        {"position": keras_mha.MixedRotaryEmbedding, "num_key_value_heads": 1},
        {},
        {"query": IMAGES},
    ),
    "ALiBi over axes": Feature(
        "positions", {"position": alibi_over_axes}, {}, {"query": IMAGES}
    ),
    "RelativePositionBias over axes": Feature(
        "positions", {"position": in_window}, {}, {"query": IMAGES}
    ),
    "position_ids over axes": Feature(
        "positions",
        {"position": rotary_over_axes},
        {},
        {"position_ids": COORDINATES},
    ),
    "grouped heads": Feature("heads", {"num_key_value_heads": 1}),
    "gate": Feature("heads", {"use_gate": True}),
    "qk_norm": Feature("heads", {"qk_norm": "rms"}),
    "sink of zero": Feature("sink, cap", {"attention_sink": "zero"}),
    "learned sink": Feature("sink, cap", {"attention_sink": "learned"}),
    "learned keys and values": Feature(
        "heads",
        {"num_memory_key_values": 3, "sliding_window": 5},
        CAUSAL,
        {"query_mask": VALID},
    ),
    "talking heads": Feature("heads", {"talking_heads": "both"}, CAUSAL),
    "soft cap": Feature("sink, cap", {"logit_soft_cap": 2.0}),
    "dropout": Feature("dropout", {"dropout": 0.3}, {"training": True}),
    "scores": Feature("scores", {}, {"return_attention_scores": True}),
    "cache": Feature("cache", {"num_key_value_heads": 1}, CAUSAL, decodes=True),
    "cache, positions": Feature(
        "cache",
        {"position": keras_mha.RotaryEmbedding, "sliding_window": 9},
        CAUSAL,
        decodes=True,
    ),
    "bfloat16": Feature("bfloat16", {"dtype": "mixed_bfloat16"}, CAUSAL),
    "all together": Feature(
        "together",
        {
            "num_key_value_heads": 1,
            "position": keras_mha.RotaryEmbedding,
            "sliding_window": 9,
            "qk_norm": "layer",
            "attention_sink": "learned",
            "logit_soft_cap": 5.0,
            "use_gate": True,
            "num_memory_key_values": 2,
            "dropout": 0.2,
        },
        CAUSAL | {"training": True},
        {
            "query_mask": VALID,
            "segment_ids": IDS,
            "attention_bias": normal(B, N, T, T),
        },
    ),
}
COLUMNS = tuple(dict.fromkeys(feature.column for feature in FEATURES.values()))
