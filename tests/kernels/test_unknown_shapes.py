"""TensorFlow's graphs that learn shapes when they run: what is 1 broadcasts then."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends, tiling
from tests.helpers import only_tensorflow, to_numpy

pytestmark = only_tensorflow
B, T, S, N, H = 2, 21, 19, 2, 4
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    RNG.normal(size=(B, length, N, H)).astype("float32") for length in (T, S, S)
)
SHAPES = [
    (length, *lead, rows, S)
    for length, *lead in ((B, N), (1, N), (B, 1), (1, 1))
    for rows in (T, 1)
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(backends.current(), "FEW_SCORES", 1)


def attend(query, key, value, other, implementation, kind):
    other = {"mask": other > 0} if kind == "mask" else {"bias": other}
    return keras_mha.dot_product_attention(
        query, key, value, implementation=implementation, **other
    )


def with_gradients(function, tensors):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = function(*tensors)
        loss = tf.reduce_sum(output * tf.cos(output))
    return output, *tape.gradient(loss, tensors, unconnected_gradients="zero")


@pytest.fixture(scope="module")
def programs():
    """One program for each rank and kind, which knows no length at all."""
    import tensorflow as tf

    def unknown(rank):
        return tf.TensorSpec((None,) * rank, "float32")

    heads = (tf.TensorSpec((None, None, N, H), "float32"),) * 3
    made = {}

    def program(implementation, kind, rank, xla):
        key = implementation, kind, rank, xla
        if key not in made:
            made[key] = tf.function(
                lambda *tensors: with_gradients(
                    lambda *each: attend(*each, implementation, kind), tensors
                ),
                input_signature=(*heads, unknown(rank)),
                jit_compile=xla,
            )
        return made[key]

    return program


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_what_broadcasts_when_a_graph_runs(programs, implementation, kind, rank):
    import tensorflow as tf

    shapes = {shape[:1] * (rank == 3) + shape[2:] for shape in SHAPES}
    for shape in sorted(SHAPES if rank == 4 else shapes):
        other = RNG.normal(size=shape).astype("float32")
        if kind == "bias" and rank == 3 and shape[0] == B:
            other = other[:1].repeat(N, axis=0)  # (N, T, S), as in NumPy
        tensors = [tf.constant(x) for x in (QUERY, KEY, VALUE, other)]
        found = programs(implementation, kind, rank, False)(*tensors)
        expected = with_gradients(
            lambda *each: attend(*each, "reference", kind), tuple(tensors)
        )
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_allclose(to_numpy(one), to_numpy(two), atol=2e-5)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_xla(programs, implementation, kind):
    import tensorflow as tf

    for shape in ((B, 1, 1, S), (1, N, T, S)):
        other = RNG.normal(size=shape).astype("float32")
        tensors = [tf.constant(x) for x in (QUERY, KEY, VALUE, other)]
        found = programs(implementation, kind, 4, True)(*tensors)
        expected = with_gradients(
            lambda *each: attend(*each, "reference", kind), tuple(tensors)
        )
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_allclose(to_numpy(one), to_numpy(two), atol=2e-5)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_mask_objects_of_one_batch_row(implementation):
    import tensorflow as tf

    @tf.function(
        input_signature=(
            tf.TensorSpec((None, None), "int32"),
            tf.TensorSpec((None,), "int32"),
            tf.TensorSpec((None, None, N, H), "float32"),
        )
    )
    def run(ids, n, x):
        mask = masks.Segments(ids) | masks.Prefix(n)
        return keras_mha.dot_product_attention(
            x, x, x, mask=mask, implementation=implementation
        )

    for batch, other in itertools.product((1, B), repeat=2):
        ids = np.sort(RNG.integers(0, 3, size=(batch, T)), axis=1).astype("int32")
        n = RNG.integers(0, 4, size=(other,)).astype("int32")
        found = run(ids, n, QUERY)
        allowed = (ids[:, :, None] == ids[:, None]) | (np.arange(T) < n[:, None, None])
        expected = keras_mha.dot_product_attention(
            QUERY, QUERY, QUERY, mask=np.broadcast_to(allowed, (B, T, T))
        )
        np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=2e-5)


@pytest.mark.parametrize("flash", [None, True])
def test_functional_model_and_its_saved_model(tmp_path, flash):
    import tensorflow as tf

    inputs = keras.Input((None, 8))
    given = keras.Input((1, None, None), dtype="bool")
    added = keras.Input((None, None, None))
    layer = keras_mha.MultiHeadAttention(2, 4, flash_attention=flash)
    outputs = layer(inputs, inputs, attention_mask=given, attention_bias=added)
    model = keras.Model([inputs, given, added], outputs)
    model.compile("sgd", "mse")
    x = RNG.normal(size=(B, T, 8)).astype("float32")
    valid = np.arange(T) < np.array([[5], [T]])
    arrays = x, valid[:, None, None], RNG.normal(size=(B, 1, 1, T)).astype("float32")
    whole = (
        x,
        np.broadcast_to(arrays[1], (B, 1, T, T)),
        np.broadcast_to(arrays[2], (B, 2, T, T)),
    )
    expected = model.predict_on_batch(whole)
    np.testing.assert_allclose(model.predict_on_batch(arrays), expected, atol=2e-5)
    model.export(tmp_path, verbose=False)
    saved = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(to_numpy(saved.serve(list(arrays))), expected, atol=2e-5)
    data = tf.data.Dataset.from_tensors((arrays, x))
    losses = [model.evaluate(each, x, verbose=0) for each in (arrays, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert np.isfinite(model.fit(data, verbose=0).history["loss"]).all()
