"""Trains, saves, measures and draws: `train RESULT MODEL PICTURE EPOCHS SEED`.

A process of its own, which `keras_mha.demo` starts on the backend to train on.
"""

import sys
import time

import keras

from keras_mha.demo import digits
from keras_mha.demo import model as model_module
from keras_mha.demo import picture as picture_module
from keras_mha.demo.results import Result

BATCH_SIZE = 64
LEARNING_RATE = 2e-3


def main(result: str, model: str, picture: str, epochs: str, seed: str) -> None:
    keras.utils.set_random_seed(int(seed))
    training, (images, classes) = digits.load()
    classifier = model_module.build()
    start = time.perf_counter()
    fit(classifier, *digits.shifted(*training), epochs=int(epochs))
    seconds = time.perf_counter() - start
    classifier.save(model)
    logits = classifier.predict(images, batch_size=len(images), verbose=0)
    accuracy = (logits.argmax(-1) == classes).mean()
    Result(logits, accuracy, seconds).save(result)
    picture_module.draw(classifier, images, classes, picture)


def fit(model: keras.Model, images, classes, epochs: int) -> None:
    """Trains the model, with Keras's progress bar."""
    steps = epochs * -(-len(images) // BATCH_SIZE)
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps, alpha=0.01)
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, classes, batch_size=BATCH_SIZE, epochs=epochs)


if __name__ == "__main__":
    main(*sys.argv[1:])
