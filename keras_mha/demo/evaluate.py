"""Loads the trained model and measures it: `evaluate RESULT MODEL`.

A process of its own, which `keras_mha.demo` starts once for each backend.
"""

import sys
import time

import keras

import keras_mha  # noqa: F401  registers the layers that the file names
from keras_mha.demo import digits
from keras_mha.demo.results import Result


def main(result: str, model: str) -> None:
    _, (images, classes) = digits.load()
    start = time.perf_counter()
    # Uncompiled: the optimizer may be a class of a backend that is not installed here.
    loaded = keras.saving.load_model(model, compile=False)
    logits = loaded.predict(images, batch_size=len(images), verbose=0)
    seconds = time.perf_counter() - start
    accuracy = (logits.argmax(-1) == classes).mean()
    Result(logits, accuracy, seconds).save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
