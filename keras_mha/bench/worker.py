"""Times our layer and Keras's under one backend: what `keras-mha bench` starts.

Both stand in a model of one layer, which is called as users call it: `predict_on_batch`
and `train_on_batch`, compiled the way Keras compiles models on this backend. Each
returns numbers to the host, and so when the device is done. On a GPU or TPU
`test_on_batch` takes the place of the first: the number that it returns is the loss.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import keras
import numpy as np

import keras_mha
from keras_mha import info
from keras_mha.bench import CASES, ON_ACCELERATOR, ON_CPU, Setting, machine, timing

HEADS, WIDTH, FEATURES = 8, 64, 512


def measure(
    length: int, options: dict[str, Any], seconds: float, setting: Setting = ON_CPU
) -> dict[str, Any]:
    """Times both layers in one case.

    Args:
        length: Integer, the sequence length.
        options: Dictionary, arguments of both layers.
        seconds: Float, about how long to time each kind of call.
        setting: `Setting`, how large and of which dtype everything is.

    Returns:
        Dictionary from `"predict"` and `"train"` to the layers' names to seconds.
    """
    shape = (setting.batch, length, FEATURES)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    if not setting.leaves_device:
        x = keras.ops.convert_to_tensor(x)
    options = {**options, "dtype": setting.dtype}
    models = {
        "keras": _model(keras.layers.MultiHeadAttention, length, options),
        "keras_mha": _model(keras_mha.MultiHeadAttention, length, options),
    }
    calls = {
        "predict": lambda model: (
            model.predict_on_batch(x)
            if setting.leaves_device
            else model.test_on_batch(x, x)
        ),
        "train": lambda model: model.train_on_batch(x, x),
    }
    return {
        kind: {
            name: times.median
            for name, times in timing.in_turns(
                {
                    name: lambda model=model, call=call: call(model)
                    for name, model in models.items()
                },
                seconds,
                least=2,
            ).items()
        }
        for kind, call in calls.items()
    }


def _model(layer: type, length: int, options: dict[str, Any]) -> keras.Model:
    inputs = keras.Input((length, FEATURES))
    outputs = layer(HEADS, WIDTH, **options)(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    return model


def main() -> None:
    """Measures every case and prints what was found as JSON."""
    seconds = float(sys.argv[1])
    kind = info.device_kind()
    setting = ON_CPU if kind == "cpu" else ON_ACCELERATOR
    times = {
        name: measure(case.length, case.options, seconds, setting)
        for name, case in CASES.items()
    }
    description = machine.description(keras.backend.backend())
    description |= {"device": kind, **asdict(setting)}
    print(json.dumps({"times": times, "machine": description}))


if __name__ == "__main__":
    main()
