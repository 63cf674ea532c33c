"""One process of the cross-backend matrix; KERAS_BACKEND says which backend it is.

    python -m tests.matrix.worker write FOLDER
    python -m tests.matrix.worker read FOLDER

`write` trains a model a little and saves it as `<backend>.keras`; what the model that
never was saved gives is kept as `<backend>-kept.npz`. `read` loads every archive in the
folder and records what it gives here as `<archive>-by-<backend>.npz`. What is recorded
is the outputs and the losses of two more epochs.

`write` also trains a small model with each kind of position, from weights that are the
same on every backend; what it predicts then is kept as `trained-by-<backend>.npz`.
"""

import sys
from pathlib import Path

import keras
import numpy as np

import keras_mha

BACKEND = keras.backend.backend()

# Under torch Keras 3.15 writes the name of torch's own class of the optimizer into the
# archive; elsewhere that class can be loaded and cannot train.
OPTIMIZER = {"AdamW": keras.optimizers.AdamW}

# As Keras chooses today; its older versions compile under torch too, which they and a
# newer torch do not survive.
JIT_COMPILE = BACKEND == "jax"

SCALING = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 4,
}


POSITIONS = {
    "rotary": keras_mha.RotaryEmbedding,
    "alibi": keras_mha.ALiBi,
    # Several of the distances share a bucket.
    "relative": lambda: keras_mha.RelativePositionBias(num_buckets=4, max_distance=4),
}


def make_model() -> keras.Model:
    """Two blocks that together use what the layer has; nothing random at training."""
    tokens = keras.Input((None, 10), name="tokens")
    memory = keras.Input((None, 12), name="memory")
    # No Embedding: under TensorFlow Keras updates its rows sparsely, and so otherwise
    # than under the other backends, whatever stands behind it.
    x = keras.layers.Dense(16)(keras.layers.Masking()(tokens))
    x += keras_mha.MultiHeadAttention(
        4,
        8,
        sliding_window=4,
        attention_sink="learned",
        position=keras_mha.RotaryEmbedding(4, scaling=SCALING),
    )(x, x, use_causal_mask=True)
    x += keras_mha.MultiHeadAttention(
        4,
        8,
        value_dim=6,
        use_gate=True,
        num_key_value_heads=2,
        qk_norm="rms",
        logit_soft_cap=20.0,
        num_memory_key_values=2,
        talking_heads="both",
        position=keras_mha.RelativePositionBias(num_buckets=8, max_distance=6),
    )(x, memory)
    x += keras_mha.MultiHeadAttention(2, 8, qk_norm="l2", position=keras_mha.ALiBi())(
        x, attention_mask=keras_mha.masks.Causal() | keras_mha.masks.Prefix(2)
    )
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model([tokens, memory], keras.layers.Dense(3)(x))
    model.compile(
        optimizer=keras.optimizers.AdamW(0.01, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=JIT_COMPILE,
    )
    return model


def data() -> tuple[list[np.ndarray], np.ndarray]:
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(32, 7, 10)).astype("float32")
    tokens[np.arange(7) >= generator.integers(3, 8, (32, 1))] = 0
    memory = generator.normal(size=(32, 5, 12)).astype("float32")
    return [tokens, memory], np.argmax(tokens[:, 0, :3], axis=-1).astype("int32")


def train(model: keras.Model, epochs: int) -> list[float]:
    """Trains without shuffling, so that every backend sees the same batches."""
    inputs, labels = data()
    history = model.fit(
        inputs, labels, epochs=epochs, batch_size=8, shuffle=False, verbose=0
    )
    return history.history["loss"]


def record(model: keras.Model, path: Path) -> None:
    """Records the outputs, and the losses as training goes on."""
    outputs = model.predict(data()[0], verbose=0)
    np.savez(path, outputs=outputs, losses=train(model, epochs=2))


def write(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    model = make_model()
    train(model, epochs=2)
    model.save(folder / f"{BACKEND}.keras")
    record(model, folder / f"{BACKEND}-kept.npz")
    train_positions(folder)


def read(folder: Path) -> None:
    for archive in sorted(folder.glob("*.keras")):
        model = keras.saving.load_model(archive, custom_objects=OPTIMIZER)
        model.jit_compile = JIT_COMPILE
        record(model, folder / f"{archive.stem}-by-{BACKEND}.npz")


def train_positions(folder: Path) -> None:
    """A dozen steps of Adam, to which a sum of gradients is not the same as parts."""
    (tokens, _), labels = data()
    predictions = {}
    for name, position in POSITIONS.items():
        x = keras.Input((7, 10))
        attended = keras_mha.MultiHeadAttention(2, 8, position=position())(x)
        model = keras.Model(x, keras.layers.Dense(3)(attended[:, -1]))
        generator = np.random.default_rng(1)
        for weight in model.weights:
            weight.assign(0.3 * generator.normal(size=weight.shape))
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=JIT_COMPILE)
        model.fit(tokens, np.eye(3)[labels], 8, epochs=3, shuffle=False, verbose=0)
        predictions[name] = model.predict(tokens, verbose=0)
    np.savez(folder / f"trained-by-{BACKEND}.npz", **predictions)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
