"""Projections are computed as products where a call of theirs is nothing more."""

import re

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.kernels import backends
from tests.helpers import only_jax, only_torch, to_numpy

LAYERS = ("query_dense", "key_dense", "value_dense", "output_dense")


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def built(shape=(2, 5, 8), **options):
    layer = keras_mha.MultiHeadAttention(2, 4, **options)
    layer.build(shape)
    for weight in layer.weights:
        weight.assign(random(*weight.shape))
    return layer


def by_calls(layer, x, monkeypatch):
    """What a layer gives where its projections are called as layers."""
    with monkeypatch.context() as patch:
        for name in LAYERS:  # what is no layer of Keras's own is called
            dense = getattr(layer, name)
            patch.setattr(dense, "call", dense.call, raising=False)
        return to_numpy(layer(x))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 8), {}),
        ((2, 5, 8), {"use_bias": False}),
        ((2, 5, 8), {"use_gate": True, "value_dim": 3}),
        ((2, 5, 8), {"output_shape": (3, 2)}),
        ((2, 3, 4, 8), {}),
        ((0, 5, 8), {}),
        ((1, 3, 8), {}),
        ((1, 3, 8), {"use_bias": False}),
        ((1, 3, 8), {"output_shape": (3, 2)}),
    ],
    ids=[
        "plain",
        "no bias",
        "gate",
        "output of two axes",
        "two positions",
        "no batch",
        "few tokens",
        "few tokens and no bias",
        "few tokens and output of two axes",
    ],
)
def test_products_are_what_calls_give(shape, options, monkeypatch):
    layer, x = built(shape, **options), random(*shape)
    expected = by_calls(layer, x, monkeypatch)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-5, atol=1e-5)


def test_as_many_heads_of_width_1_as_tokens_have_their_own_biases():
    """Keras's layers on TensorFlow would add them to the tokens."""
    layer = keras_mha.MultiHeadAttention(4, 1)
    layer.build((2, 4, 3))
    x = random(2, 4, 3)
    for weight in layer.weights:
        weight.assign(random(*weight.shape))
    found = layer(x)
    one_by_one = [layer(x[:, i : i + 1], x) for i in range(4)]
    expected = np.concatenate([to_numpy(y) for y in one_by_one], axis=1)
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5, atol=1e-5)


def test_a_product_needs_no_call_of_a_layer(monkeypatch):
    layer = built()
    called = counted_calls(monkeypatch)
    layer(random(2, 5, 8))
    assert called == []


@only_jax
def test_nor_does_an_eager_gradient(monkeypatch):
    import jax

    layer, x = built(), random(2, 5, 8)
    called = counted_calls(monkeypatch)
    gradient = jax.grad(lambda x: layer(x).sum())
    found = gradient(x)
    assert called == []
    monkeypatch.setattr(backends.current(), "is_better_multiplied", lambda x: False)
    np.testing.assert_allclose(found, gradient(x), rtol=1e-4, atol=1e-5)
    assert len(called) == 4


@only_jax
def test_a_compiled_gradient_of_few_tokens_moves_no_kernel():
    import jax

    layer = built((1, 5, 32))
    weights = [variable.value for variable in layer.trainable_variables]

    def loss(weights, x):
        given = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=given):
            return (layer(x) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = gradient.lower(weights, random(1, 5, 32)).compile().as_text()
    moved = re.findall(r"f32\[([\d,]*)\]\S* (?:transpose|copy)\(", program)
    assert moved
    assert not {"32,2,4", "2,4,32", "32,8", "8,32"} & set(moved)


def counted_calls(monkeypatch):
    """A list that is to hold the names of the projections that are called."""
    called, call = [], keras.layers.EinsumDense.call

    def counted(self, *args, **kwargs):
        called.append(self.name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(keras.layers.EinsumDense, "call", counted)
    return called


class Doubled(keras.layers.EinsumDense):
    def call(self, inputs, training=None):
        return 2.0 * super().call(inputs)


class WithOtherOutput(keras_mha.MultiHeadAttention):
    """Whose `output` makes another projection of the old one."""

    def build(self, *shapes):
        super().build(*shapes)
        self.replaced, self.output_dense = self.output_dense, None
        self.output_dense = self.output(self.replaced)


def doubled(old):
    new = Doubled.from_config(old.get_config())
    new.build((2, 5, 2, 4))
    return new


def of_transposed_kernel(old):
    new = keras.layers.EinsumDense("abYZ,AYZ->abA", (None, 8), bias_axes="A")
    new.build((2, 5, 2, 4))
    return new


@pytest.mark.parametrize(
    ("output", "factor"),
    [(doubled, 2.0), (of_transposed_kernel, 1.0)],
    ids=["another class", "another equation"],
)
def test_another_output_projection_is_called(output, factor):
    other = type("Other", (WithOtherOutput,), {"output": staticmethod(output)})(2, 4)
    layer, x = built(), random(2, 5, 8)
    other.build((2, 5, 8))
    for name in LAYERS:
        weights = getattr(layer, name).get_weights()
        if name == "output_dense" and output is of_transposed_kernel:
            weights[0] = np.transpose(weights[0], (2, 0, 1))
        getattr(other, name).set_weights(weights)
    expected = factor * to_numpy(layer(x))
    np.testing.assert_allclose(to_numpy(other(x)), expected, rtol=1e-5, atol=1e-5)


def test_what_stands_in_for_its_call_is_called(monkeypatch):
    layer, x = built(), random(2, 5, 8)
    dense = layer.output_dense
    monkeypatch.setattr(dense, "call", lambda x, training=None: x, raising=False)
    assert layer(x).shape == (2, 5, 2, 4)


def test_an_activity_regularizer_sees_every_projection():
    layer, x = built(activity_regularizer="l2"), random(2, 5, 8)
    layer(x)
    assert len(layer.losses) == 4


def test_lora_takes_part(monkeypatch):
    layer, x = built(), random(2, 5, 8)
    layer.query_dense.enable_lora(2)
    for weight in (layer.query_dense.lora_kernel_a, layer.query_dense.lora_kernel_b):
        weight.assign(random(*weight.shape))
    without = to_numpy(built()(x))
    found = to_numpy(layer(x))
    expected = by_calls(layer, x, monkeypatch)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - without).max() > 1e-3


def test_quantized_projections_are_called(monkeypatch):
    layer = built()
    layer.query_dense.quantize("int8")
    called = []
    quantized_call = type(layer.query_dense).quantized_call

    def counted(self, *args, **kwargs):
        called.append(self.name)
        return quantized_call(self, *args, **kwargs)

    monkeypatch.setattr(keras.layers.EinsumDense, "quantized_call", counted)
    layer(random(2, 5, 8))
    assert called == ["query"]


def test_projections_that_are_computed_again_are_called(monkeypatch):
    with keras.RematScope(mode="list_of_layers", layer_names=["query"]):
        layer = built()
    called = counted_calls(monkeypatch)
    layer(random(2, 5, 8))
    assert "query" in called


def test_a_projection_of_another_dtype_is_called(monkeypatch):
    layer = built()
    layer.output_dense.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    called = counted_calls(monkeypatch)
    output = layer(random(2, 5, 8))
    assert called == ["attention_output"]
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"


@only_torch
def test_hooks_of_a_projection_are_run():
    layer, seen = built(), []
    hook = layer.query_dense.register_forward_hook(lambda *given: seen.append(given))
    layer(random(2, 5, 8))
    assert len(seen) == 1
    hook.remove()
    layer(random(2, 5, 8))
    assert len(seen) == 1
