"""A process with four devices, which share calls of cuDNN's kernel and of Pallas's.

Prints a line of JSON: for each layout the largest error against one device, and how
devices get whole tensors of each other.
"""

from __future__ import annotations

import json
import os
import re

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from keras_mha import masks
from keras_mha.kernels.backends.jax_differentiable import (
    require_devices,
    with_gradient,
)
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import cudnn, cudnn_primitives, sharing, triton
from keras_mha.kernels.jax_kernels.cudnn_arguments import MASKED
from keras_mha.kernels.problem import positions_first, prepared
from keras_mha.kernels.whole import whole
from tests.kernels.test_cudnn import stand_ins

B, T, S, H = 4, 12, 14, 8
RNG = np.random.default_rng(0)
ROWS = P("rows")
HEADS = P(None, None, "heads")
BOTH = P("rows", None, "heads")
NONE = P()

# Devices along rows and heads, query and key heads, how query and keys are shared, the
# shape of the bias, and how it is; then whether tokens are of segments.
LAYOUTS = {
    "rows": ((4, 1), 4, 2, ROWS, ROWS, None, NONE),
    "rows, bias for all": ((4, 1), 4, 2, ROWS, ROWS, (1, 1), NONE),
    "heads": ((1, 4), 4, 4, HEADS, HEADS, None, NONE),
    "rows and heads": ((2, 2), 4, 2, BOTH, BOTH, (1, 4), P(None, "heads")),
    "one key head": ((1, 4), 4, 1, HEADS, NONE, (1, 4), P(None, "heads")),
    "keys not shared": ((2, 2), 4, 2, BOTH, NONE, None, NONE),
    "two devices for a key head": ((1, 4), 8, 2, HEADS, NONE, (1, 8), NONE),
    "segments": ((2, 2), 4, 2, BOTH, BOTH, None, NONE, True),
    "positions": ((1, 4), 4, 2, P(None, "heads"), NONE, None, NONE),
}


def step(query, key, value, marks, d_output, bias):
    # Booleans say which keys are real, numbers to which segment a token belongs.
    padded = marks.dtype == bool
    mask = masks.Padding(marks) if padded else masks.Segments(marks)
    kernel = cudnn if padded else triton

    def attend(query, key, value, bias):
        call = AttentionCall(
            *(query, key, value),
            mask=mask,
            bias=bias,
            scale=0.3,
            device="gpu",
        )
        problem, tensors = prepared(call)
        output = with_gradient(kernel.forward, kernel.backward, whole, problem, tensors)
        return positions_first(output)

    output, pull_back = jax.vjp(attend, query, key, value, bias)
    return output, pull_back(d_output)


def result(devices, heads, groups, of_query, of_key, bias, of_bias, segments=False):
    length = T if segments else S
    query, d_output = (RNG.normal(size=(B, T, heads, H)) for _ in range(2))
    key, value = (RNG.normal(size=(B, length, groups, H)) for _ in range(2))
    marks = RNG.uniform(size=(B, length)) < 0.7
    marks = marks.astype("int32") if segments else marks
    arrays = [x.astype("float32") for x in (query, key, value)]
    arrays += [marks, d_output.astype("float32")]
    bias = None if bias is None else RNG.normal(size=(*bias, T, S)).astype("float32")
    arrays.append(bias)
    expected = jax.jit(step)(*arrays)
    mesh = jax.make_mesh(devices, ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    rows = P("rows") if "rows" in of_query else NONE
    specs = (of_query, of_key, of_key, rows, of_query, of_bias)
    shared = [
        x if x is None else jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]
    compiled = jax.jit(step).lower(*shared).compile()
    found = compiled(*shared)
    errors = jax.tree.map(
        lambda x, y: float(abs(np.asarray(x) - np.asarray(y)).max()), found, expected
    )
    return {
        "error": max(jax.tree.leaves(errors)),
        "sent": sorted(set(re.findall(r"all-\w+(?=\()", compiled.as_text()))),
    }


MASKED["float32"] = MASKED["bfloat16"]
cudnn_primitives._kernels = lambda: stand_ins([])
triton._INTERPRET = True
sharing.is_needed = lambda: True
require_devices()
print(json.dumps({name: result(*layout) for name, layout in LAYOUTS.items()}))
