"""Attention within `jax.shard_map` on four devices of a process of its own.

Prints, for every case, how far outputs and gradients are from those of one device.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import keras_mha
from keras_mha import masks
from keras_mha.kernels import tiling

jax.config.update("jax_num_cpu_devices", 4)  # before the first array
tiling.TILE = 16
B, T, N, H = 4, 37, 4, 4
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, T, N, H)).astype("float32")
MEMORY = RNG.normal(size=(1, T, N, H)).astype("float32")  # that all samples share
BIAS = RNG.normal(size=(B, N, T, T)).astype("float32")
VALID = np.arange(T) < RNG.integers(1, T, size=(B, 1))
IDS = np.sort(RNG.integers(0, 3, size=(B, T)), axis=1)
ALIBI = keras_mha.ALiBi(N)


def attend(query, memory, bias, valid, ids, **options):
    mask = options.pop("mask", lambda valid, ids: None)(valid, ids)
    groups = options.pop("groups", N)
    memory = memory[:, :, :groups]
    key = jnp.broadcast_to(memory, (query.shape[0], *memory.shape[1:]))
    value = jnp.tanh(key + query[:, :, :groups])
    if not options.pop("biased", False):
        bias = None
    return keras_mha.dot_product_attention(
        query, key, value, mask=mask, bias=bias, **options
    )


CASES = {
    "plain": {},
    "causal": {"mask": lambda valid, ids: masks.Causal()},
    "window": {"mask": lambda valid, ids: masks.Causal() & masks.SlidingWindow(5)},
    "padding": {"mask": lambda valid, ids: masks.Padding(valid)},
    "segments": {"mask": lambda valid, ids: masks.Causal() & masks.Segments(ids)},
    "bias": {"biased": True},
    "ALiBi": {"position_bias": ALIBI.bias()},
    "grouped heads, sink and cap": {"groups": 2, "sink": 0.3, "logit_soft_cap": 4.0},
}


def sharded(function, kind):
    shape, names = ((4,), ("data",)) if kind != "two axes" else ((2, 2), ("data", "x"))
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, names, axis_types=types)
    rows = P("data")
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows, P(), rows, rows, rows),
        out_specs=rows,
        check_vma=kind != "unchecked",
    )


def with_gradients(function):
    def loss(*tensors):
        output = function(*tensors, VALID, IDS)
        return (output * jnp.cos(output)).sum(), output

    gradients, output = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
        QUERY, MEMORY, BIAS
    )
    return output, *gradients


def main():
    found = {}
    for name, options in CASES.items():
        kinds = ["one axis"]
        if name == "causal":
            kinds += ["two axes", "unchecked"]
        expected = with_gradients(
            lambda *each, o=options: attend(*each, implementation="reference", **o)
        )
        for kind in kinds:
            results = with_gradients(
                sharded(
                    lambda *each, o=options: attend(
                        *each, implementation="blockwise", **o
                    ),
                    kind,
                )
            )
            found[f"{name}, {kind}"] = max(
                float(jnp.abs(one - two).max())
                for one, two in zip(results, expected, strict=True)
            )
    print(json.dumps(found))


main()
