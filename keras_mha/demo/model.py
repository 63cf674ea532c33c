"""The demo's model: a small Transformer, in plain functional Keras."""

import keras
from keras import layers

from keras_mha import MultiHeadAttention

PATCH = 2  # pixels a side
GRID = 8 // PATCH  # patches a side
TOKENS = GRID * GRID
WIDTH = 64


def build() -> keras.Model:
    """Builds the classifier, `(batch, 8, 8)` images to `(batch, 10)` logits."""
    image = keras.Input((8, 8), name="image")
    x = layers.Reshape((GRID, PATCH, GRID, PATCH))(image)
    x = layers.Permute((1, 3, 2, 4))(x)
    patches = layers.Reshape((TOKENS, PATCH * PATCH), name="patches")(x)
    # A bias for each token: the projection and the position embedding in one. It
    # starts large, so that tokens know their places before they have learned anything.
    x = layers.EinsumDense(
        "btp,pd->btd",
        output_shape=(TOKENS, WIDTH),
        bias_axes="td",
        bias_initializer=keras.initializers.RandomNormal(stddev=0.5),
        name="embedding",
    )(patches)
    for block in (1, 2):
        x = _block(x, f"block{block}")
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    return keras.Model(image, layers.Dense(10, name="logits")(x), name="digits")


def _block(x, name: str):
    y = layers.LayerNormalization(name=f"{name}_attention_norm")(x)
    attention = MultiHeadAttention(
        num_heads=4, key_dim=WIDTH // 4, dropout=0.1, name=f"{name}_attention"
    )
    x = layers.Add(name=f"{name}_attention_residual")([x, attention(y, y)])
    y = layers.LayerNormalization(name=f"{name}_dense_norm")(x)
    y = layers.Dense(2 * WIDTH, activation="gelu", name=f"{name}_dense_in")(y)
    y = layers.Dense(WIDTH, name=f"{name}_dense_out")(y)
    return layers.Add(name=f"{name}_dense_residual")([x, y])
