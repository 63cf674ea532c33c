"""Both layers of a cell, with the same inputs, as the current backend's contestants."""

import importlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_mha
from benchmarks.contestants import Contestant
from benchmarks.contestants.common import random
from benchmarks.grid.cells import CROSS, HEADS_OF_A_GROUP, RATE, Cell
from benchmarks.results import KERAS, OURS


class Masked(keras.layers.Layer):
    """Gives its input a Keras mask, as an embedding with `mask_zero=True` does.

    Args:
        valid: Booleans `(B, T)`, the mask.
    """

    def __init__(self, valid: np.ndarray):
        super().__init__()
        self.supports_masking = True
        self._valid = keras.ops.convert_to_tensor(valid)

    def call(self, x: Any) -> Any:
        return x

    def compute_mask(self, x: Any, previous_mask: Any = None) -> Any:
        return self._valid


def contestants(cell: Cell) -> dict[str, Contestant]:
    """Makes both layers' contestants for the current backend."""
    backend = keras.backend.backend()
    module = importlib.import_module(f"benchmarks.contestants.{backend}")
    found = {}
    for name in (OURS, KERAS):
        layer = built_layer(cell, name)
        compiler = module.COMPILERS[cell.program]
        call = called(cell, layer)
        found[name] = module.of_layer(layer, call, arrays(cell), compiler)
    return found


def built_layer(cell: Cell, name: str) -> keras.Layer:
    """Returns our layer or Keras's."""
    options = {"dropout": RATE if cell.kind == "dropout" else 0.0}
    groups = cell.heads // HEADS_OF_A_GROUP
    if name == OURS:
        layer = keras_mha.MultiHeadAttention(
            cell.heads,
            cell.width,
            num_key_value_heads=groups if cell.kind == "grouped" else None,
            **options,
        )
    elif cell.kind == "grouped":
        layer = keras.layers.GroupQueryAttention(cell.width, cell.heads, groups)
    else:
        layer = keras.layers.MultiHeadAttention(cell.heads, cell.width, **options)
    layer.build(shapes(cell)[0], shapes(cell)[-1])
    return layer


def called(cell: Cell, layer: keras.Layer) -> Callable[..., Any]:
    """Returns how the cell calls a layer: `call(*tensors, training=...)`."""
    options = {"use_causal_mask": True} if cell.kind == "causal" else {}
    masked = Masked(valid(cell)) if cell.kind == "padding" else lambda x: x

    def call(query: Any, value: Any = None, *, training: bool) -> Any:
        query = masked(query)
        value = query if value is None else value
        return layer(query, value, training=training, **options)

    return call


def arrays(cell: Cell) -> list[np.ndarray]:
    """Returns the inputs: one array for self-attention, else two."""
    return [random(*shape) for shape in shapes(cell)]


def shapes(cell: Cell) -> list[tuple[int, int, int]]:
    """Returns the inputs' shapes, `(B, T, features)` each."""
    lengths = [cell.length, cell.keys] if cell.kind == CROSS else [cell.length]
    return [(cell.batch, length, cell.features) for length in lengths]


def valid(cell: Cell) -> np.ndarray:
    """Returns booleans `(B, T)`: of each sequence a half to all, three quarters of one
    alone."""
    shares = np.linspace(0.5, 1.0, cell.batch + 2)[1:-1]
    return np.arange(cell.length) < np.ceil(shares * cell.length)[:, None]
