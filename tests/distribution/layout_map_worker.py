"""Trains models on one device and on eight, 2 x 4, and prints what came out as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import keras
import numpy as np

import keras_mha

B, T, D, N, H = 8, 8, 16, 8, 4
RNG = np.random.default_rng(0)
TARGETS = RNG.normal(size=(B, 3)).astype("float32")
SEQUENCES = RNG.normal(size=(B, T, D)).astype("float32")
IMAGES = RNG.normal(size=(B, 4, 2, D)).astype("float32")

FEATURES = {
    "plain": {},
    "2 key heads": {
        "num_key_value_heads": 2,
        "use_gate": True,
        "attention_sink": "learned",
        "qk_norm": "rms",
        "num_memory_key_values": 2,
    },
    "4 key heads": {
        "num_key_value_heads": 4,
        "position": keras_mha.RelativePositionBias,
        "num_memory_key_values": 2,
        "talking_heads": "both",
    },
    "RoPE-Mixed": {"position": lambda: keras_mha.MixedRotaryEmbedding(axes=2)},
    "LoRA": {"use_gate": True},
    "int8": {},
}


def made(feature):
    """A model with layers whose names are those of projections, and an optimizer."""
    options = {k: v() if callable(v) else v for k, v in FEATURES[feature].items()}
    layer = keras_mha.MultiHeadAttention(N, H, name="attention", **options)
    inputs = keras.Input(inputs_of(feature).shape[1:])
    x = layer(keras.layers.Dense(D, name="query")(inputs))
    x = keras.layers.Dense(4, name="dense")(keras.layers.Flatten()(x))
    model = keras.Model(inputs, keras.layers.Dense(3, name="key")(x))
    if feature == "LoRA":
        for dense in (layer.query_dense, layer.value_dense, layer.output_dense):
            dense.enable_lora(2)
    return model


def inputs_of(feature):
    return IMAGES if feature == "RoPE-Mixed" else SEQUENCES


def trained(feature, distribution, weights=None):
    """Returns the model, its first weights, its losses and what it predicts."""
    keras.backend.clear_session()
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model, x = made(feature), inputs_of(feature)
    if weights is None:
        draws = np.random.default_rng(1)
        weights = [draws.normal(size=w.shape) * 0.3 for w in model.get_weights()]
    model.set_weights(weights)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    losses = model.fit(x, TARGETS, batch_size=B, epochs=3, verbose=0).history["loss"]
    if feature == "int8":
        for dense in ("query", "key", "value", "output"):
            getattr(model.get_layer("attention"), f"{dense}_dense").quantize("int8")
    return model, weights, losses, model.predict(x, verbose=0)


def layouts(variables):
    return {variable.path: list(variable.value.sharding.spec) for variable in variables}


def model_parallel():
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    layout_map = keras_mha.distribution.layout_map(mesh)
    layout_map["dense/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def compared(feature):
    _, weights, losses, expected = trained(feature, None)
    distribution = model_parallel()
    model, _, shared_losses, found = trained(feature, distribution, weights)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.saving.load_model(f"{folder}/model.keras")
    again = loaded.predict(inputs_of(feature), verbose=0)
    results = {
        "losses": [losses, shared_losses],
        "error": float(np.abs(found - expected).max()),
        "error once loaded": float(np.abs(again - found).max()),
        "layouts": layouts(model.variables),
        "layouts once loaded": layouts(loaded.variables),
        "optimizer": layouts(model.optimizer.variables),
    }
    keras.distribution.set_distribution(None)
    return results


def refused():
    """What is said of six heads for four devices."""
    keras.distribution.set_distribution(model_parallel())
    layer = keras_mha.MultiHeadAttention(6, H, name="six")
    try:
        layer.build((B, T, D))
    except ValueError as error:
        return str(error)
    finally:
        keras.distribution.set_distribution(None)
    return ""


if __name__ == "__main__":
    found = {feature: compared(feature) for feature in sys.argv[1:] or FEATURES}
    print(json.dumps({"features": found, "refused": refused()}))
