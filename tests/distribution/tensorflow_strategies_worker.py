"""Trains models under one of TensorFlow's strategies, and as one device does.

    python -m tests.distribution.tensorflow_strategies_worker mirrored FOLDER
    python -m tests.distribution.tensorflow_strategies_worker workers FOLDER

Two processes do the second, each with its `TF_CONFIG`. For each case it records, as
`<strategy> <case>.npz`, the losses, the weights at the end and what the model then
predicts; the first also what one device gives, as `one <case>.npz`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import keras_mha

B, T, EPOCHS, STEPS, CLASSES = 8, 12, 2, 2, 5

# Of each case the layer's options and the sequences' length.
CASES = {
    "masks": ({}, T),
    "dropout": ({"dropout": 0.4}, T),
    "tiles": ({"dropout": 0.4, "flash_attention": True}, 520),
}


def made(options, length):
    """A model that reads tokens, 0 for padding, and optimizes one number for each."""
    position = keras_mha.RelativePositionBias()
    layer = keras_mha.MultiHeadAttention(
        4, 4, num_key_value_heads=2, position=position, seed=3, **options
    )
    tokens = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(CLASSES, 8, mask_zero=True)(tokens)
    x = keras.layers.GlobalAveragePooling1D()(layer(x, use_causal_mask=True))
    model = keras.Model(tokens, keras.layers.Dense(1)(x))
    draws = np.random.default_rng(1)
    model.set_weights([draws.normal(size=w.shape) * 0.3 for w in model.get_weights()])
    return model


def data(length):
    """Rows of different lengths, for all steps of an epoch."""
    draws = np.random.default_rng(0)
    tokens = draws.integers(1, CLASSES, size=(B * STEPS, length))
    lengths = draws.integers(length // 2, length + 1, size=(B * STEPS, 1))
    tokens = np.where(np.arange(length) < lengths, tokens, 0).astype("int32")
    return tokens, draws.normal(size=(B * STEPS, 1)).astype("float32")


def trained(case, strategy):
    """Returns what training by Keras's own `fit` gives."""
    _, length = CASES[case]
    x, y = data(length)
    with strategy.scope():
        model = made(*CASES[case])
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    losses = model.fit(x, y, B, EPOCHS, verbose=0, shuffle=False).history["loss"]
    return model, losses, model.predict(x, B, verbose=0)


def trained_by_steps(case, strategy):
    """Returns the same where `fit` knows nothing of the strategy."""
    _, length = CASES[case]
    x, y = data(length)
    with strategy.scope():
        model = made(*CASES[case])
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            part = loss / strategy.num_replicas_in_sync
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(part, variables), variables)
        return loss

    @tf.function
    def all_step(batch):
        return strategy.reduce("MEAN", strategy.run(step, args=batch), axis=None)

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(B)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    dataset = strategy.experimental_distribute_dataset(dataset.with_options(options))
    losses = [
        np.mean([float(all_step(batch)) for batch in dataset]) for _ in range(EPOCHS)
    ]
    return model, losses, keras.ops.convert_to_numpy(model(x))


def record(path, model, losses, predicted):
    weights = {
        f"weight {index} {w.name}": w.numpy()
        for index, w in enumerate(model.trainable_weights)
    }
    np.savez(path, losses=losses, predicted=predicted, **weights)


def main(mode: str, folder: Path) -> None:
    if mode == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        strategies = {"mirrored": (strategy, trained)}
        strategies["one"] = (tf.distribute.get_strategy(), trained)
    else:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        strategies = {f"worker {index}": (strategy, trained_by_steps)}
    for name, (strategy, train) in strategies.items():
        for case in CASES:
            record(folder / f"{name} {case}.npz", *train(case, strategy))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
