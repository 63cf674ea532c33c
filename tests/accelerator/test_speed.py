"""Not slower than Keras's layer where people train: half types, thousands of tokens."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.bench import timing
from tests.accelerator.device import finish, needs_device_itself

pytestmark = needs_device_itself

LENGTH, BATCH, FEATURES, HEADS, WIDTH = 2048, 8, 512, 8, 64
LEAST = 0.97  # with the noise of a measurement


def model_of(layer, **options):
    inputs = keras.Input((LENGTH, FEATURES))
    outputs = layer(HEADS, WIDTH, dtype="mixed_bfloat16", **options)(
        inputs, inputs, use_causal_mask=True
    )
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("kind", ["predict", "train"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}], ids=["plain", "dropout"])
def test_time_beside_keras(kind, options):
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, FEATURES))
    x = keras.ops.convert_to_tensor(x.astype("float32"))
    layers = {
        "keras": keras.layers.MultiHeadAttention,
        "keras_mha": keras_mha.MultiHeadAttention,
    }

    def step(model):
        if kind == "predict":
            return lambda: finish(model(x, training=False))

        def train():
            model.train_on_batch(x, x)
            finish([model.trainable_variables[0].value])

        return train

    times = timing.in_turns(
        {name: step(model_of(layer, **options)) for name, layer in layers.items()},
        seconds=10.0,
        least=10,
        most=200,
    )
    ratio = times["keras"].median / times["keras_mha"].median
    assert ratio >= LEAST, f"{ratio:.2f} of Keras's speed: {times}"
