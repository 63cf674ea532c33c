"""Trains a model on two devices of each of two processes of JAX's, or on one device.

    python -m tests.distribution.jax_processes_worker ADDRESS PROCESS
    python -m tests.distribution.jax_processes_worker one

Prints, as JSON, of each case the losses, and how many of the query's heads one device
of the process holds.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import keras
import numpy as np

import keras_mha

B, D, STEPS, PROCESSES = 8, 8, 3, 2
OPTIONS = {"num_heads": 4, "key_dim": 4, "num_key_value_heads": 2}

# Of each feature the layer's further options and the sequences' length.
FEATURES = {
    "window": ({"sliding_window": 5}, 16),
    "tiles": ({"flash_attention": True}, 520),
}
# Which of them is trained with what shared.
CASES = {"data": "window", "tensor": "tiles", "tensor across processes": "window"}


def distribution(kind):
    """Returns the distribution, and whether each process has its rows of a batch."""
    devices = keras.distribution.list_devices()
    options = {"auto_shard_dataset": False}  # each process has its rows already
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices, **options), True
    shape = (1, 4) if kind == "tensor across processes" else (2, 2)
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layouts = keras_mha.distribution.layout_map(mesh)
    shared = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", **options
    )
    return shared, shape[0] > 1


def made(feature):
    options, length = FEATURES[feature]
    position = keras_mha.RelativePositionBias()
    layer = keras_mha.MultiHeadAttention(
        **OPTIONS, **options, position=position, dropout=0.3, seed=3, name="attention"
    )
    x = inputs = keras.Input((length, D))
    x = layer(keras.layers.Masking()(x), use_causal_mask=True)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    draws = np.random.default_rng(1)
    model.set_weights([draws.normal(size=w.shape) * 0.3 for w in model.weights])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def data(length, process=None):
    """Rows of different lengths; of each batch those of one process."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=(STEPS, B, length, D)).astype("float32")
    lengths = draws.integers(length // 2, length + 1, size=(STEPS, B, 1, 1))
    x = np.where(np.arange(length)[:, None] < lengths, x, 0)
    y = draws.normal(size=(STEPS, B, 1)).astype("float32")
    if process is not None:
        rows = B // PROCESSES
        x, y = (a[:, process * rows : (process + 1) * rows] for a in (x, y))
    return x.reshape(-1, length, D), y.reshape(-1, 1)


def trained(feature, process=None):
    model = made(feature)
    x, y = data(FEATURES[feature][1], process)
    fitted = model.fit(x, y, len(x) // STEPS, 2, shuffle=False, verbose=0)
    kernel = model.get_layer("attention").query_dense.kernel.value
    return {
        "losses": fitted.history["loss"],
        "heads held": kernel.addressable_shards[0].data.shape[1],
    }


def main(address, process=None):
    if process is None:
        print(json.dumps({feature: trained(feature) for feature in FEATURES}))
        return
    process = int(process)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(address, PROCESSES, process)
    found = {}
    for kind, feature in CASES.items():
        shared, is_split = distribution(kind)
        keras.distribution.set_distribution(shared)
        found[kind] = trained(feature, process if is_split else None)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
