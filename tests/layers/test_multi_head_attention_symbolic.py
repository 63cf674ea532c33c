"""Shapes before there are numbers: Functional models, dynamic lengths, compilers."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from tests.helpers import (
    only_jax,
    only_tensorflow,
    only_torch,
    skip_unless_one_graph,
    to_numpy,
    to_tensor,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    ("arguments", "query", "value", "output", "scores"),
    [
        ({}, (5, 16), (7, 12), (5, 16), (3, 5, 7)),
        ({}, (None, 16), (None, 12), (None, 16), (3, None, None)),
        ({"output_shape": 9}, (5, 16), (7, 12), (5, 9), (3, 5, 7)),
        ({"output_shape": (2, 3)}, (5, 16), (7, 12), (5, 2, 3), (3, 5, 7)),
        ({"value_dim": 6}, (5, 16), (7, 12), (5, 16), (3, 5, 7)),
        ({}, (4, 5, 16), (2, 3, 12), (4, 5, 16), (3, 4, 5, 2, 3)),
        ({"attention_axes": 2}, (4, 5, 16), (4, 3, 12), (4, 5, 16), (4, 3, 5, 3)),
        ({"attention_axes": 1}, (4, 5, 16), (2, 5, 12), (4, 5, 16), (5, 3, 4, 2)),
    ],
)
def test_symbolic_shapes_are_the_real_ones(arguments, query, value, output, scores):
    layer = keras_mha.MultiHeadAttention(num_heads=3, key_dim=4, **arguments)
    inputs = [keras.Input(query), keras.Input(value)]
    outputs = layer(*inputs, return_attention_scores=True)
    assert [x.shape for x in outputs] == [(None, *output), (None, *scores)]
    assert layer(*inputs).shape == (None, *output)

    sizes = [[2, *(11 if n is None else n for n in shape)] for shape in (query, value)]
    results = keras.Model(inputs, outputs)([to_tensor(normal(*size)) for size in sizes])
    for symbol, result in zip(outputs, results, strict=True):
        known = [
            size == real
            for size, real in zip(symbol.shape, result.shape, strict=True)
            if size
        ]
        assert all(known) and len(symbol.shape) == len(result.shape)


def test_compute_output_shape_knows_the_shape_before_the_layer_is_built():
    layer = keras_mha.MultiHeadAttention(num_heads=3, key_dim=4, output_shape=9)
    shapes = {"query_shape": (None, 5, 16), "value_shape": (None, 7, 12)}
    assert layer.compute_output_shape(**shapes) == (None, 5, 9)
    assert layer.compute_output_shape((2, 5, 16)) == (2, 5, 9)
    assert not layer.built


def test_compute_output_spec_needs_no_weights_either():
    layer = keras_mha.MultiHeadAttention(num_heads=3, key_dim=4, output_shape=9)
    inputs = keras.KerasTensor((None, 5, 16)), keras.KerasTensor((None, 7, 12))
    output, scores = layer.compute_output_spec(*inputs, return_attention_scores=True)
    assert output.shape == (None, 5, 9)
    assert scores.shape == (None, 3, 5, 7)
    assert not layer.built
    with pytest.raises(ValueError, match="same number of axes"):
        layer.compute_output_spec(inputs[0], keras.KerasTensor((None, 7, 3, 12)))


def test_one_model_takes_batches_and_lengths_of_any_size():
    inputs = keras.Input((None, 12))
    layer = keras_mha.MultiHeadAttention(
        num_heads=4, key_dim=4, num_key_value_heads=2, attention_sink="zero"
    )
    model = keras.Model(inputs, layer(inputs, use_causal_mask=True))
    for batch, length in ((1, 1), (3, 4), (2, 9)):
        x = normal(batch, length, 12)
        expected = to_numpy(layer(to_tensor(x), use_causal_mask=True))
        result = model.predict(x, verbose=0)
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_every_call_argument_may_be_an_input_of_a_functional_model():
    x, memory = keras.Input((5, 12)), keras.Input((7, 12))
    inputs = {
        "query_mask": keras.Input((5,), dtype="bool"),
        "value_mask": keras.Input((7,), dtype="bool"),
        "attention_mask": keras.Input((5, 7), dtype="bool"),
        "attention_bias": keras.Input((1, 5, 7)),
    }
    query_ids = keras.Input((5,), dtype="int32")
    key_ids = keras.Input((7,), dtype="int32")
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
    output = layer(x, memory, **inputs, segment_ids=(query_ids, key_ids))
    model = keras.Model([x, memory, *inputs.values(), query_ids, key_ids], output)

    query, value = normal(2, 5, 12), normal(2, 7, 12)
    numbers = {
        "query_mask": RNG.random((2, 5)) < 0.8,
        "value_mask": RNG.random((2, 7)) < 0.8,
        "attention_mask": RNG.random((2, 5, 7)) < 0.8,
        "attention_bias": normal(2, 1, 5, 7),
    }
    ids = RNG.integers(0, 2, (2, 5)), RNG.integers(0, 2, (2, 7))
    expected = layer(to_tensor(query), to_tensor(value), **numbers, segment_ids=ids)
    tensors = [to_tensor(a) for a in (query, value, *numbers.values(), *ids)]
    np.testing.assert_allclose(to_numpy(model(tensors)), to_numpy(expected), atol=1e-6)


def test_a_mask_object_in_a_functional_model_is_saved_with_it(tmp_path):
    inputs = keras.Input((None, 12))
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
    mask = masks.Causal() & masks.SlidingWindow(2) | masks.Prefix(1)
    model = keras.Model(inputs, layer(inputs, attention_mask=mask))
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    x = normal(2, 6, 12)
    expected = to_numpy(layer(to_tensor(x), attention_mask=mask))
    np.testing.assert_allclose(to_numpy(revived(to_tensor(x))), expected, atol=1e-6)
    unmasked = to_numpy(layer(to_tensor(x)))
    assert np.abs(expected - unmasked).max() > 1e-3


def test_the_layer_works_inside_a_layer_that_is_traced_for_its_shape():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.attention = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)

        def build(self, shape):
            self.attention.build(shape, shape)

        def call(self, x):
            return x + self.attention(x, x, use_causal_mask=True)

    output = Block()(keras.Input((None, 12)))
    assert output.shape == (None, None, 12)


CALLS = {
    "plain": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "window": ({"sliding_window": 2}, {"use_causal_mask": True}),
    "everything": (
        {
            "num_key_value_heads": 2,
            "qk_norm": "rms",
            "attention_sink": "learned",
            "logit_soft_cap": 5.0,
            "use_gate": True,
        },
        {"query_mask": np.array([[True] * 4 + [False] * 2] * 2)},
    ),
    "learned keys, window": (
        {"num_memory_key_values": 2, "sliding_window": 2},
        {"query_mask": np.array([[True] * 4 + [False] * 2] * 2)},
    ),
}


@pytest.fixture(params=CALLS, ids=str)
def layer_call_and_expected(request):
    constructor, call = CALLS[request.param]
    layer = keras_mha.MultiHeadAttention(num_heads=4, key_dim=4, **constructor)
    x = to_tensor(normal(2, 6, 12))
    return layer, call, x, to_numpy(layer(x, **call))


@only_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_layer_compiles_with_unknown_batch_and_length(
    layer_call_and_expected, jit_compile
):
    import tensorflow as tf

    layer, call, x, expected = layer_call_and_expected
    signature = [tf.TensorSpec((None, None, 12))]
    function = tf.function(
        lambda x: layer(x, **call), input_signature=signature, jit_compile=jit_compile
    )
    np.testing.assert_allclose(function(x).numpy(), expected, atol=1e-5)


@only_jax
def test_the_layer_compiles_under_jit(layer_call_and_expected):
    import jax

    layer, call, x, expected = layer_call_and_expected
    result = jax.jit(lambda x: layer(x, **call))(x)
    np.testing.assert_allclose(np.asarray(result), expected, atol=1e-5)


@only_torch
def test_the_layer_traces_as_one_graph(layer_call_and_expected):
    """`aot_eager` traces all that `torch.compile` does and needs no C++ compiler."""
    import torch

    skip_unless_one_graph()
    layer, call, x, expected = layer_call_and_expected
    function = torch.compile(
        lambda x: layer(x, **call), backend="aot_eager", fullgraph=True
    )
    np.testing.assert_allclose(to_numpy(function(x).detach()), expected, atol=1e-5)
