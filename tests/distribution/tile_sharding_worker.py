"""Compiles attention in tiles for one device and for eight: what each device then does.

Prints a line of JSON: by mesh and feature the largest error relative to one device, the
share of one device's operations, and how often what kind of operation sends something.
"""

from __future__ import annotations

import json
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import keras_mha
from benchmarks.compiled import work
from keras_mha import masks
from keras_mha.kernels import tiling

B, T, N, H = 8, 160, 8, 16
tiling.TILE = 64  # the last of three pieces overlaps the one before it
MESHES = {"8 x 1": (8, 1), "2 x 4": (2, 4), "1 x 8": (1, 8)}
EVERY_MESH = ("causal", "padding", "layer")
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


VALID = np.arange(T) < RNG.integers(T // 3, T, size=(B, 1))
IDS = np.sort(RNG.integers(0, 4, size=(B, T)), axis=1).astype("int32")
BIAS = normal(1, N, T, T)
SINK = normal(N)
# By name: the options, of the sequences' valid tokens and segments.
FEATURES = {
    "plain": lambda valid, ids: {},
    "causal": lambda valid, ids: {"mask": masks.Causal()},
    "padding": lambda valid, ids: {"mask": masks.Padding(valid)},
    "window": lambda valid, ids: {"mask": masks.Causal() & masks.SlidingWindow(40)},
    "segments": lambda valid, ids: {"mask": masks.Segments(ids, ids)},
    "bias": lambda valid, ids: {"bias": BIAS},
    "ALiBi": lambda valid, ids: {"position_bias": keras_mha.ALiBi(N).bias()},
    "dropout": lambda valid, ids: {"dropout": 0.3, "seed": 1},
    "sink and cap": lambda valid, ids: {"sink": SINK, "logit_soft_cap": 5.0},
    "4 key heads": lambda valid, ids: {"mask": masks.Causal()},
    "2 key heads": lambda valid, ids: {"mask": masks.Causal()},
}
KEY_HEADS = {"4 key heads": 4, "2 key heads": 2}


def compared(function, inputs, layouts):
    """Runs a function of tensors, a loss with gradients, on one device and on eight."""
    alone = jax.jit(function).lower(*inputs).compile()
    shared = jax.tree.map(jax.device_put, inputs, layouts)
    together = jax.jit(function).lower(*shared).compile()
    expected, found = (
        [np.asarray(x) for x in jax.tree.leaves(run(*given))]
        for run, given in ((alone, inputs), (together, shared))
    )
    scale = max(np.abs(x).max() for x in expected[1:])
    errors = [
        np.abs(x - y).max() / max(np.abs(y).max(), 0.05 * scale)
        for x, y in zip(found, expected, strict=True)
    ]
    done = work(together)
    return {
        "error": float(max(errors)),
        "share": done.operations / work(alone).operations,
        "times": done.times,
        "sent": done.sent,
    }


def of_function(feature, mesh):
    """Attention alone, batch and heads in the layouts of its inputs."""
    groups = KEY_HEADS.get(feature, N)
    tensors = {"query": normal(B, T, N, H), "weights": normal(B, T, N, H)}
    tensors |= {name: normal(B, T, groups, H) for name in ("key", "value")}
    marks = {"valid": VALID, "ids": IDS}

    def loss(tensors, marks):
        output = keras_mha.dot_product_attention(
            *(tensors[name] for name in ("query", "key", "value")),
            implementation="blockwise",
            **FEATURES[feature](**marks),
        )
        return (output * tensors["weights"]).sum()

    def layout(x):
        heads = x.ndim == 4 and x.shape[2] % mesh.shape["model"] == 0
        axes = ("batch", None, "model") if heads else ("batch",)
        return NamedSharding(mesh, PartitionSpec(*axes))

    inputs = (tensors, marks)
    return compared(jax.value_and_grad(loss), inputs, jax.tree.map(layout, inputs))


def of_layer(mesh):
    """A layer whose weights have the layouts of `layout_map`."""
    devices = keras.distribution.list_devices()
    device_mesh = keras.distribution.DeviceMesh(
        mesh.devices.shape, mesh.axis_names, devices
    )
    layouts = keras_mha.distribution.layout_map(device_mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    layer = keras_mha.MultiHeadAttention(
        N,
        H,
        position=keras_mha.RelativePositionBias(),
        use_gate=True,
        attention_sink="learned",
        flash_attention=True,
    )
    layer.build((B, T, 2 * H))
    keras.distribution.set_distribution(None)
    weights = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]

    def loss(weights, others, x):
        y, _ = layer.stateless_call(weights, others, x, use_causal_mask=True)
        return (y**2).sum()

    batch = NamedSharding(mesh, PartitionSpec("batch"))
    inputs = (weights, others, normal(B, T, 2 * H))
    layouts = ([x.sharding for x in weights], [x.sharding for x in others], batch)
    alone = jax.tree.map(np.asarray, inputs)
    return compared(jax.value_and_grad(loss), alone, layouts)


if __name__ == "__main__":
    found = {}
    for name, shape in MESHES.items():
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("batch", "model"))
        found[name] = {
            feature: of_function(feature, mesh)
            for feature in FEATURES
            if name == "2 x 4" or feature in EVERY_MESH
        }
        found[name]["layer"] = of_layer(mesh)
    print(json.dumps(found))
