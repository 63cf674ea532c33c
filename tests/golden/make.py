"""Writes the golden archive of this version, once, when it is released.

    KERAS_BACKEND=torch .venv-oldest/bin/python -m tests.golden.make

The archive of a version is never written again: it must load for ever. It is written
under the oldest Keras supported, whose files the later ones read.
"""

from pathlib import Path

import keras
import numpy as np

import keras_mha

FOLDER = Path(__file__).parent


def golden_model() -> keras.Model:
    """A model that holds every constructor argument away from its default."""
    query = keras.Input((None, 16), name="query")
    value = keras.Input((None, 12), name="value")
    x = keras_mha.MultiHeadAttention(4, 8, name="plain")(query, value)
    x = keras_mha.MultiHeadAttention(
        4,
        8,
        value_dim=6,
        dropout=0.1,
        sliding_window=3,
        use_gate=True,
        num_key_value_heads=2,
        qk_norm="rms",
        attention_sink="learned",
        logit_soft_cap=20.0,
        scale=0.3,
        name="decoder",
    )(x, x, use_causal_mask=True)
    x = keras_mha.MultiHeadAttention(2, 8, qk_norm="l2", attention_sink="zero")(x)
    mask = keras_mha.masks.Causal() | keras_mha.masks.Prefix(2)
    x = keras_mha.MultiHeadAttention(2, 8, use_bias=False, output_shape=5)(
        x, attention_mask=mask
    )
    return keras.Model({"query": query, "value": value}, x)


def main() -> None:
    archive = FOLDER / f"v{keras_mha.__version__}.keras"
    if archive.exists():
        raise SystemExit(f"{archive.name} exists, and a golden archive never changes.")
    keras.utils.set_random_seed(0)
    model, generator = golden_model(), np.random.default_rng(0)
    for weight in model.weights:
        noise = generator.normal(size=weight.shape, scale=0.1)
        weight.assign(weight + noise.astype("float32"))
    inputs = {
        "query": generator.normal(size=(2, 5, 16)).astype("float32"),
        "value": generator.normal(size=(2, 7, 12)).astype("float32"),
    }
    output = keras.ops.convert_to_numpy(model(inputs))
    model.save(archive)
    np.savez(archive.with_suffix(".npz"), **inputs, output=output)


if __name__ == "__main__":
    main()
