"""Splash attention on eight devices: interpreted, and in programs for TPUs.

Prints a line of JSON. By layout `numbers` has the largest error relative to tiles on
one device, and what kinds of operation send something; `programs` has how many of
JAX's kernels are in a training step that is lowered for TPUs, and the shape of what
the first returns. Null where jax has another splash attention.
"""

from __future__ import annotations

import json
import os
import re

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
from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import splash, splash_kernel
from keras_mha.kernels.problem import positions_first, prepared
from keras_mha.kernels.whole import whole

B, T, N, K, H = 8, 128, 8, 4, 8
distribution = keras.distribution
DEVICES = np.array(jax.devices())
MESHES = {
    "batch": Mesh(DEVICES, ("batch",)),
    "half of them": Mesh(DEVICES[:4], ("batch",)),
    "batch and heads": Mesh(DEVICES.reshape(2, 4), ("batch", "model")),
}
RNG = np.random.default_rng(0)


def model_parallel(layouts):
    names = ["batch", "model"]
    mesh = distribution.DeviceMesh((2, 4), names, distribution.list_devices())
    return distribution.ModelParallel(layout_map=layouts(mesh), batch_dim_name="batch")


DATA = distribution.DataParallel(devices=distribution.list_devices())
OWN_LAYOUTS = model_parallel(keras_mha.distribution.layout_map)
OTHER_LAYOUTS = model_parallel(distribution.LayoutMap)


def attend_by_splash(query, key, value, **options):
    call = AttentionCall(query, key, value, scale=0.3, **options)
    assert splash.refusal(call) is None
    output = backends.current().with_gradient(
        splash.forward, splash.backward, whole, *prepared(call)
    )
    return positions_first(output)


def attend_in_tiles(*tensors, **options):
    return keras_mha.dot_product_attention(
        *tensors, scale=0.3, implementation="blockwise", **options
    )


def training_step(attend):
    """A function of its own in every call: JAX keeps programs by the function."""

    def loss(tensors, valid):
        *tensors, sink = tensors
        mask = masks.Causal() & masks.Padding(valid)
        return (attend(*tensors, mask=mask, sink=sink).astype("float32") ** 2).sum()

    return jax.grad(loss)


def layouts(mesh):
    heads = "model" if "model" in mesh.axis_names else None
    tensor = NamedSharding(mesh, PartitionSpec("batch", None, heads))
    sink = NamedSharding(mesh, PartitionSpec(heads))
    return (tensor,) * 3 + (sink,), NamedSharding(mesh, PartitionSpec("batch"))


def inputs(dtype="float32", key_heads=K):
    shapes = [(B, T, heads, H) for heads in (N, key_heads, key_heads)] + [(N,)]
    tensors = tuple(jax.numpy.asarray(RNG.normal(size=s), dtype) for s in shapes)
    return tensors, np.arange(T) < RNG.integers(0, T, size=(B, 1))


def numbers(given, layout):
    distribution.set_distribution(given)
    alone = inputs()
    expected = jax.jit(training_step(attend_in_tiles))(*alone)
    shared = alone if layout is None else jax.device_put(alone, layouts(MESHES[layout]))
    step = jax.jit(training_step(attend_by_splash)).lower(*shared).compile()
    pairs = zip(step(*shared), expected, strict=True)
    errors = [np.abs(np.asarray(x) - y).max() / np.abs(y).max() for x, y in pairs]
    return {"error": float(max(errors)), "sends": sorted(work(step).times)}


def program(given, layout, around=lambda step: step, **shapes):
    distribution.set_distribution(given)
    step = around(training_step(keras_mha.dot_product_attention))
    shared = inputs("bfloat16", **shapes)
    if layout is not None:
        shared = jax.device_put(shared, layouts(MESHES[layout]))
    text = jax.export.export(jax.jit(step), platforms=["tpu"])(*shared).mlir_module()
    shapes = re.findall(r"@tpu_custom_call.*?-> .*tensor<((?:\d+x)+)bf16>", text)
    return len(shapes), shapes[0] if shapes else None


def within_shard_map(is_checked):
    def around(step):
        mesh, batch = MESHES["batch"], PartitionSpec("batch")
        specs = ((batch,) * 3 + (PartitionSpec(),), batch)
        out = specs[0]
        return jax.shard_map(
            step, mesh=mesh, in_specs=specs, out_specs=out, check_vma=is_checked
        )

    return around


def found():
    with splash_kernel.interpreted():
        in_numbers = {
            "data": numbers(DATA, "batch"),
            "own layouts": numbers(OWN_LAYOUTS, "batch and heads"),
            "one device under a distribution": numbers(DATA, None),
        }
    programs = {
        "data": program(DATA, "batch"),
        "own layouts": program(OWN_LAYOUTS, "batch and heads"),
        "one device under a distribution": program(DATA, None),
        "one device": program(None, None),
        "within shard_map": program(None, "batch", within_shard_map(False)),
        "nothing says how": program(None, "batch"),
        "others' layouts": program(OTHER_LAYOUTS, "batch and heads"),
        "other devices": program(DATA, "half of them"),
        "few key heads": program(OWN_LAYOUTS, "batch", key_heads=2),
        "within shard_map that checks": program(None, "batch", within_shard_map(True)),
    }
    return {"numbers": in_numbers, "programs": programs}


if __name__ == "__main__":
    print(json.dumps(found() if splash_kernel.is_as_known() else None))
