"""Keras's default type of floats set to another: whole numbers stay whole.

With `set_floatx("bfloat16")` Keras makes floats of whole numbers on JAX:
https://github.com/keras-team/keras/issues/23679
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from tests.helpers import to_numpy

TOLERANCE = {"bfloat16": 5e-2, "float16": 1e-2, "float64": 1e-4}
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 7, 7]])
IDS = np.array([[0, 1, 2, 0, 1, 2], [5, 6, 7, 8, 9, 300]])
REAL = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype="bool")
X = np.random.default_rng(0).normal(size=(2, 6, 8))


@pytest.fixture(params=["bfloat16", "float16", "float64"])
def floatx(request):
    before = keras.config.floatx()
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx(before)


def make_layer(**options):
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4, **options)
    layer.build(X.shape, X.shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=w.shape) * 0.3 for w in layer.weights])
    return layer


def attend(**options):
    arguments = options.pop("call")
    return make_layer(**options)(X, **arguments)


def decode(**options):
    layer = make_layer(**options)
    cache, outputs = layer.init_cache(2, 10), []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        output, cache = layer(X[:, start:stop], cache=cache, use_causal_mask=True)
        outputs.append(to_numpy(output))
    assert to_numpy(cache["length"]).tolist() == [6, 6]
    return np.concatenate(outputs, axis=1)


def decode_after_padding(**options):
    layer = make_layer(**options)
    cache = layer.init_cache(2, 10)
    _, cache = layer(X, cache=cache, use_causal_mask=True, query_mask=REAL)
    assert to_numpy(cache["length"]).tolist() == [4, 6]
    return layer(X[:, :1], cache=cache, use_causal_mask=True)[0]


def attend_to_memory():
    layer = make_layer()
    cache = layer.init_cache(memory=X, value_mask=REAL)
    return layer(X[:, :2], cache=cache)[0]


def with_mask(mask, **options):
    return lambda: attend(call={"attention_mask": mask()}, **options)


def with_ids(position, ids=IDS):
    return lambda: attend(call={"position_ids": ids}, position=position())


CASES = {
    "segment ids": lambda: attend(call={"segment_ids": SEGMENTS}),
    "segment ids in lists": lambda: attend(call={"segment_ids": SEGMENTS.tolist()}),
    "segments with positions": lambda: attend(
        call={"segment_ids": SEGMENTS}, position=keras_mha.RotaryEmbedding()
    ),
    "rotary": with_ids(keras_mha.RotaryEmbedding),
    "ids in lists": with_ids(keras_mha.RotaryEmbedding, IDS.tolist()),
    "ALiBi": with_ids(keras_mha.ALiBi),
    "T5": with_ids(keras_mha.RelativePositionBias),
    "Prefix": with_mask(lambda: masks.Causal() | masks.Prefix(np.array([2, 3]))),
    "Causal": with_mask(lambda: masks.Causal(np.array([2, 3]))),
    "Segments": with_mask(lambda: masks.Segments(SEGMENTS)),
    "Segments in lists": with_mask(lambda: masks.Segments(SEGMENTS.tolist())),
    "Padding": with_mask(lambda: masks.Padding(REAL)),
    "Padding in lists": with_mask(lambda: masks.Padding(REAL.tolist())),
    "Where": with_mask(lambda: masks.Where(lambda i, j: (i - j) % 2 == 0)),
    "booleans": with_mask(lambda: np.tri(6, dtype="bool")),
    "integers as mask": with_mask(lambda: np.tri(6, dtype="int64")),
    "token masks": lambda: attend(
        call={"query_mask": REAL, "value_mask": REAL.tolist()}
    ),
    "tiles": with_mask(
        lambda: masks.Causal() & masks.Segments(SEGMENTS),
        flash_attention=True,
        logit_soft_cap=5.0,
    ),
    "cache": decode,
    "cache with window": lambda: decode(sliding_window=3),
    "cache with rotary": lambda: decode(position=keras_mha.RotaryEmbedding()),
    "cache with T5": lambda: decode(position=keras_mha.RelativePositionBias()),
    "cache with ALiBi": lambda: decode(position=keras_mha.ALiBi()),
    "cache after padding": decode_after_padding,
    "ring after padding": lambda: decode_after_padding(sliding_window=3),
    "cache of a memory": attend_to_memory,
}


@pytest.fixture(scope="module")
def in_float32():
    return {name: to_numpy(case()) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error:.*mask.*float")
def test_numbers_are_those_of_float32(name, in_float32, floatx):
    output = CASES[name]()
    np.testing.assert_allclose(
        to_numpy(output), in_float32[name], rtol=0, atol=TOLERANCE[floatx]
    )
