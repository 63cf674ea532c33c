"""Times our layer and Keras's under one backend: what `keras-mha bench` starts.

Both stand in a model of one layer, which is called as users call it: `predict_on_batch`
and `train_on_batch`, compiled the way Keras compiles models on this backend.
"""

import json
import sys
from typing import Any

import keras
import numpy as np

import keras_mha
from keras_mha.bench import CASES, machine, timing

HEADS, WIDTH, FEATURES = 8, 64, 512


def measure(length: int, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Times both layers in one case.

    Args:
        length: Integer, the sequence length.
        options: Dictionary, arguments of both layers.
        seconds: Float, about how long to time each kind of call.

    Returns:
        Dictionary from `"predict"` and `"train"` to the layers' names to seconds.
    """
    x = np.random.default_rng(0).normal(size=(1, length, FEATURES)).astype("float32")
    models = {
        "keras": _model(keras.layers.MultiHeadAttention, length, options),
        "keras_mha": _model(keras_mha.MultiHeadAttention, length, options),
    }
    calls = {
        "predict": lambda model: model.predict_on_batch(x),
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
    times = {
        name: measure(case.length, case.options, seconds)
        for name, case in CASES.items()
    }
    backend = keras.backend.backend()
    print(json.dumps({"times": times, "machine": machine.description(backend)}))


if __name__ == "__main__":
    main()
