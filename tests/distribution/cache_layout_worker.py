"""Decodes with a cache on one device and on eight, and prints what came out as JSON."""

from __future__ import annotations

import json
import os
import re
from collections import Counter

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np

import keras_mha

B, D, PROMPT, STEPS = 4, 16, 5, 10
VALID = np.arange(PROMPT) < np.array([[5], [3], [4], [2]])
SENT = r"= .* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"

FEATURES = {
    "8 key heads": {},
    "4 key heads": {"num_key_value_heads": 4, "position": keras_mha.RotaryEmbedding},
    "2 key heads": {
        "num_key_value_heads": 2,
        "sliding_window": 6,
        "position": keras_mha.RelativePositionBias,
        "use_gate": True,
    },
}
MESHES = {"2x4": (2, 4), "1x8": (1, 8)}


def made(feature):
    options = {k: v() if callable(v) else v for k, v in FEATURES[feature].items()}
    layer = keras_mha.MultiHeadAttention(8, 4, name="attention", **options)
    layer.build((B, 1, D))
    draws = np.random.default_rng(1)
    layer.set_weights([draws.normal(size=w.shape) * 0.3 for w in layer.weights])
    return layer


def decoded(feature, distribution=None):
    """Returns what a prompt with padding and some tokens more give, the caches' layouts
    before and after, and what devices send each other for a token."""
    keras.distribution.set_distribution(distribution)
    layer = made(feature)
    weights = [v.value for v in layer.trainable_variables]
    x = np.random.default_rng(0).normal(size=(B, PROMPT + STEPS, D)).astype("float32")

    @jax.jit
    def step(weights, x, cache, mask=None):
        arguments = {"cache": cache, "query_mask": mask, "use_causal_mask": True}
        return layer.stateless_call(weights, [], x, **arguments)[0]

    def put(x):
        if distribution is None:
            return x
        return jax.device_put(x, distribution.get_data_layout(x.shape).backend_layout)

    cache = layer.init_cache(B, PROMPT + STEPS)
    caches = [layouts(cache)]
    output, cache = step(weights, put(x[:, :PROMPT]), cache, put(VALID))
    outputs = [np.where(VALID[:, :, None], output, 0)]
    for index in range(PROMPT, PROMPT + STEPS):
        token = put(x[:, index : index + 1])
        output, cache = step(weights, token, cache)
        outputs.append(np.asarray(output))
    caches.append(layouts(cache))
    program = step.lower(weights, token, cache).compile().as_text()
    keras.distribution.set_distribution(None)
    return np.concatenate(outputs, axis=1), caches, Counter(re.findall(SENT, program))


def layouts(cache):
    """Returns of each tensor the shape of what one device has."""
    return {name: x.sharding.shard_shape(x.shape) for name, x in cache.items()}


def model_parallel(shape):
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layout_map = keras_mha.distribution.layout_map(mesh)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def compared(feature):
    expected, *_ = decoded(feature)
    found = {}
    for name, shape in MESHES.items():
        output, (before, after), sent = decoded(feature, model_parallel(shape))
        error = np.abs(output - expected).max() / np.abs(expected).max()
        found[name] = {
            "error": float(error),
            "before": before,
            "after": after,
            "sent": sent,
        }
    return found


if __name__ == "__main__":
    print(json.dumps({feature: compared(feature) for feature in FEATURES}))
