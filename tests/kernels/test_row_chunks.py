"""Some rows at a time give what the formula gives at once, gradients too."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends, row_chunks, tiling
from tests import oracle
from tests.helpers import (
    only_tensorflow,
    only_torch,
    outputs_and_gradients,
    skip_unless_one_graph,
    to_numpy,
    to_tensor,
)

BACKEND = keras.backend.backend()

B, T, S, N, K, H, V = 2, 9, 7, 4, 2, 3, 5
RNG = np.random.default_rng(0)
ARRAYS = {
    "query": RNG.normal(size=(B, T, N, H)),
    "key": RNG.normal(size=(B, S, K, H)),
    "value": RNG.normal(size=(B, S, K, V)),
    "pre": RNG.normal(size=(N, N)),
    "post": RNG.normal(size=(N, N)),
}
COTANGENT = RNG.normal(size=(B, T, N, V))
DENSE = RNG.uniform(size=(B, N, T, S)) < 0.6
DENSE[0, :, 4] = False  # a row that sees nothing


@pytest.fixture(autouse=True)
def chunks_of_two_rows(monkeypatch):
    """Nine rows then are four chunks and a last one that repeats a row."""
    monkeypatch.setattr(tiling, "_MULTIPLE", 2)
    monkeypatch.setattr(row_chunks, "AT_ONCE", 2 * B * N * S)
    monkeypatch.setattr(backends.current(), "FEW_SCORES", 1)


def attend(query, key, value, pre, post, *others, **options):
    names = options.pop("names", ())
    options |= dict(zip(names, others, strict=True))
    return keras_mha.dot_product_attention(
        query, key, value, talking_heads=(pre, post), **options
    )


def is_taken(**options):
    inputs = [
        keras.KerasTensor(ARRAYS[name].shape) for name in ("query", "key", "value")
    ]
    mixing = to_tensor(ARRAYS["pre"]), None
    plan = keras_mha.plan_attention(*inputs, talking_heads=mixing, **options)
    return plan.kernel is row_chunks.attend


CALLS = {
    "plain": ({}, {}),
    "causal": ({"mask": masks.Causal()}, {}),
    "causal, window": ({"mask": masks.Causal() & masks.SlidingWindow(3)}, {}),
    "booleans": ({"mask": DENSE}, {}),
    "padding": ({"mask": masks.Padding(np.arange(S) < [[4], [S]])}, {}),
    "bias": ({}, {"bias": RNG.normal(size=(B, N, T, S))}),
    "bias of columns": ({}, {"bias": RNG.normal(size=(1, N, 1, S))}),
    "sink and cap": ({"logit_soft_cap": 2.0}, {"sink": RNG.normal(size=N)}),
    "dropout": ({"dropout": 0.4, "seed": 3, "mask": masks.Causal()}, {}),
    "ALiBi": ({"position_bias": keras_mha.ALiBi(N).bias()}, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_chunks_give_what_the_formula_gives(name):
    options, tensors = CALLS[name]
    assert is_taken(**options)
    arrays = [*ARRAYS.values(), *tensors.values()]
    found, expected = (
        outputs_and_gradients(
            lambda *x, how=how: attend(
                *x, names=tuple(tensors), implementation=how, **options
            ),
            arrays,
            [COTANGENT],
        )
        for how in ("auto", "reference")
    )
    for one, two in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_chunks_and_gradients_are_those_of_the_definition():
    bias = RNG.normal(size=(B, 1, T, S))
    sink, mask = RNG.normal(size=N), DENSE

    def definition(query, key, value, pre, post, bias, sink):
        options = {"mask": mask, "bias": bias, "sink": sink, "logit_soft_cap": 3.0}
        mixing = {"talking_heads": (pre, post)}
        return oracle.dot_product_attention(query, key, value, **options, **mixing)[0]

    arrays = [*ARRAYS.values(), bias, sink]
    (output,), gradients = outputs_and_gradients(
        lambda *x: attend(*x, names=("bias", "sink"), mask=mask, logit_soft_cap=3.0),
        arrays,
        [COTANGENT],
    )
    np.testing.assert_allclose(output, definition(*arrays), atol=1e-5)
    for place, gradient in enumerate(gradients):
        direction = RNG.normal(size=arrays[place].shape)
        ahead, behind = (
            definition(
                *arrays[:place], arrays[place] + step * direction, *arrays[place + 1 :]
            )
            for step in (1e-5, -1e-5)
        )
        expected = ((ahead - behind) * COTANGENT).sum() / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=2e-4)


def test_half_types_are_summed_in_float32():
    """Over 64 chunks, which in bfloat16 would lose most of the digits it has."""
    draws = np.random.default_rng(1)
    arrays = list(ARRAYS.values())
    arrays[0] = draws.normal(size=(B, 128, N, H))
    cotangent = draws.normal(size=(B, 128, N, V)) + 1.0
    (_, found), (_, expected) = (
        outputs_and_gradients(
            lambda *x, how=how: attend(*x, implementation=how),
            arrays,
            [cotangent],
            "bfloat16",
        )
        for how in ("auto", "reference")
    )
    for one, two in zip(found[1:], expected[1:], strict=True):
        assert np.abs(one - two).max() <= 0.008 * np.abs(two).max()  # two roundings


@pytest.mark.parametrize("where", ["pre", "both"])
def test_a_layer_attends_in_chunks_and_learns_from_them(where):
    """Its matrices are variables."""
    results = []
    for flash_attention in (None, False):
        keras.utils.set_random_seed(0)
        layer = keras_mha.MultiHeadAttention(
            N, H, talking_heads=where, flash_attention=flash_attention
        )
        x = to_tensor(np.random.default_rng(0).normal(size=(B, T, 6)))
        output = layer(x, use_causal_mask=True)
        model = keras.Sequential([layer])
        # Eagerly, where the backend has that.
        model.compile("sgd", "mse", run_eagerly=BACKEND != "jax")
        model.fit(x, to_numpy(x), epochs=2, verbose=0)
        results.append([to_numpy(output), *map(to_numpy, layer.trainable_weights)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_variable_may_be_a_matrix():
    matrix = keras.Variable(ARRAYS["pre"], dtype="float32")
    heads = [to_tensor(ARRAYS[name]) for name in ("query", "key", "value")]
    found, expected = (
        keras_mha.dot_product_attention(*heads, talking_heads=(x, None))
        for x in (matrix, to_tensor(ARRAYS["pre"]))
    )
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-6)


@only_torch
def test_a_call_with_matrices_is_one_graph():
    import torch

    skip_unless_one_graph()
    inputs = [to_tensor(x) for x in ARRAYS.values()]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(
        to_numpy(compiled(*inputs)), to_numpy(attend(*inputs)), atol=1e-6
    )


@only_tensorflow
@pytest.mark.parametrize("known", [(None, None, None), (None, T, None), (B, None, S)])
def test_batch_and_lengths_may_be_unknown(known):
    import tensorflow as tf

    batch, rows, columns = known
    shapes = (batch, rows, N, H), (batch, columns, K, H), (batch, columns, K, V)
    mixing = [to_tensor(ARRAYS[name]) for name in ("pre", "post")]

    @tf.function(input_signature=[tf.TensorSpec(x, "float32") for x in shapes])
    def run(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = attend(*inputs, *mixing, mask=masks.Causal())
            loss = ops.sum(output * to_tensor(COTANGENT))
        return output, *tape.gradient(loss, inputs)

    inputs = [to_tensor(ARRAYS[name]) for name in ("query", "key", "value")]
    (output,), gradients = outputs_and_gradients(
        lambda *x: attend(*x, mask=masks.Causal(), implementation="reference"),
        list(ARRAYS.values()),
        [COTANGENT],
    )
    expected = [output, *gradients[:3]]
    for one, two in zip(run(*inputs), expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), two, rtol=1e-5, atol=1e-5)
