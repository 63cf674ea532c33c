"""What a layer makes of the dtypes that it is called with."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_mha
from tests import oracle
from tests.helpers import as_dtype, backend_jit, only_torch, to_numpy, to_tensor

B, T, S, D = 2, 3, 40, 6
N = 2

# Bias alone decides what these queries attend to.
QUERY = np.zeros((B, T, D), "float32")
VALUE = np.random.default_rng(1).normal(size=(B, S, D)).astype("float32")
# Of a half type hardly any of these are left apart, or are finite.
BIASES = {
    "mixed_bfloat16": 1000.0 + np.arange(S) % 7 + np.zeros((N, T, 1)),
    "mixed_float16": -1e5 - np.arange(S) % 3 + np.zeros((B, N, T, 1)),
}
IMPLEMENTATIONS = {
    "reference": {"flash_attention": False},
    "fused": {"flash_attention": True},  # where there is one
    "blockwise": {"flash_attention": True, "logit_soft_cap": 1e4},
}


def made(policy, **arguments):
    layer = keras_mha.MultiHeadAttention(N, 4, dtype=policy, seed=0, **arguments)
    layer.build(QUERY.shape, VALUE.shape)
    return layer


def expected(layer, bias, query=QUERY):
    names = "query", "key", "value", "output"
    weights = {
        f"{name}_kernel": to_numpy(getattr(layer, f"{name}_dense").kernel.value)
        for name in names
    }
    return oracle.multi_head_attention(
        weights, {"num_heads": N}, query, VALUE, attention_bias=bias
    )


def assert_close(found, wanted):
    np.testing.assert_allclose(to_numpy(found), wanted, atol=2e-2)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("policy", BIASES)
def test_a_bias_keeps_its_precision(policy, kind):
    layer, bias = made(policy, **IMPLEMENTATIONS[kind]), BIASES[policy]
    found = layer(QUERY, VALUE, attention_bias=bias.astype("float32"))
    assert keras.backend.standardize_dtype(found.dtype) == policy.removeprefix("mixed_")
    assert_close(found, expected(layer, bias)[0])


BIAS = BIASES["mixed_bfloat16"]


@pytest.mark.parametrize(
    "given",
    [BIAS, BIAS.tolist(), to_tensor(BIAS), keras.Variable(BIAS, dtype="float32")],
    ids=["float64 array", "lists", "tensor", "variable"],
)
def test_in_whatever_form_it_comes(given):
    layer = made("mixed_bfloat16")
    output, scores = layer(
        QUERY, VALUE, attention_bias=given, return_attention_scores=True
    )
    assert_close(output, expected(layer, BIAS)[0])
    assert_close(scores, expected(layer, BIAS)[1])


def test_a_bias_keeps_its_precision_in_a_compiled_program():
    layer = made("mixed_bfloat16")
    compiled = backend_jit(
        lambda query, value, bias: layer(query, value, attention_bias=bias)
    )
    found = compiled(*map(to_tensor, (QUERY, VALUE, BIAS)))
    assert_close(found, expected(layer, BIAS)[0])


def test_a_bias_keeps_its_precision_in_a_functional_model(tmp_path):
    inputs = keras.Input((T, D)), keras.Input((S, D)), keras.Input((N, T, S))
    layer = keras_mha.MultiHeadAttention(N, 4, dtype="mixed_bfloat16")
    output = layer(*inputs[:2], attention_bias=inputs[2])
    assert output.dtype == "bfloat16"
    model = keras.Model(inputs, output)
    data = QUERY, VALUE, np.stack([BIAS] * B).astype("float32")
    assert_close(model(data), expected(layer, BIAS)[0])
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(revived.predict(data, verbose=0), expected(layer, BIAS)[0])


def test_a_bias_in_a_functional_model_may_be_known_already():
    inputs = keras.Input((T, D)), keras.Input((S, D))
    layer = keras_mha.MultiHeadAttention(N, 4, dtype="mixed_bfloat16")
    bias = keras.Variable(np.zeros_like(BIAS), dtype="float32")
    model = keras.Model(inputs, layer(*inputs, attention_bias=bias))
    bias.assign(BIAS)
    assert_close(model((QUERY, VALUE)), expected(layer, BIAS)[0])


def test_a_bias_of_a_layer_around_keeps_its_precision():
    class Around(keras.layers.Layer):
        def __init__(self):
            super().__init__(dtype="mixed_bfloat16")
            self.attention = keras_mha.MultiHeadAttention(N, 4, dtype="mixed_bfloat16")

        def build(self, query_shape, value_shape):
            self.attention.build(query_shape, value_shape)
            self.bias = self.add_weight(shape=BIAS.shape)

        def call(self, query, value):
            return self.attention(query, value, attention_bias=self.bias)

    layer = Around()
    layer.build(QUERY.shape, VALUE.shape)
    layer.bias.assign(BIAS)
    assert_close(layer(QUERY, VALUE), expected(layer.attention, BIAS)[0])


class Known(keras_mha.masks.Mask):
    """Only keys whose number is 1000."""

    def __init__(self, numbers):
        self.numbers = numbers

    def block(self, tile):
        numbers = ops.convert_to_tensor(self.numbers)
        return tile.cut_columns(numbers[None, None, None] == 1000.0, 3)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_floats_in_a_mask_keep_their_precision(kind):
    numbers = 1000.0 + np.arange(S) % 3
    layer = made("mixed_bfloat16", **IMPLEMENTATIONS[kind])
    bias = np.where(numbers == 1000.0, 0.0, -np.inf)
    held = keras.Variable(numbers, dtype="float32"), to_tensor(numbers)
    for each in held:
        found = layer(QUERY, VALUE, attention_mask=Known(each))
        assert_close(found, expected(layer, bias + np.zeros((T, 1)))[0])


def test_a_mask_keeps_the_precision_of_its_floats_in_the_function_too():
    class Around(keras.layers.Layer):
        def call(self, x):
            return keras_mha.dot_product_attention(
                x, x, x, mask=Known(numbers), return_scores=True
            )[1]

    numbers = keras.Variable(1000.0 + np.arange(S) % 3, dtype="float32")
    found = Around(dtype="mixed_bfloat16")(np.zeros((1, S, 1, 4), "float32"))
    seen = to_numpy(found)[0, 0, 0] > 0
    np.testing.assert_array_equal(seen, np.arange(S) % 3 == 0)


def test_a_position_table_keeps_its_precision():
    position = keras_mha.RelativePositionBias(num_buckets=8, max_distance=16)
    layer = made("mixed_bfloat16", position=position)
    table = 1000.0 + np.arange(8 * N).reshape(8, N)
    position.table.assign(table)
    bias = oracle.relative_position_bias(
        table, np.arange(T), np.arange(S), max_distance=16, bidirectional=True
    )
    assert_close(layer(QUERY, VALUE), expected(layer, bias)[0])


def dtypes_seen(layer, *inputs, **arguments):
    """The dtypes that `call` is given, by name."""
    seen, original = {}, layer.call

    def call(*inputs, **arguments):
        named = dict(zip(("query", "value", "key"), inputs, strict=False), **arguments)
        for name, x in named.items():
            if hasattr(x, "dtype"):
                seen[name] = keras.backend.standardize_dtype(x.dtype)
        return original(*inputs, **arguments)

    layer.call = call
    layer(*inputs, **arguments)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_the_bias_is_not_cast(dtype):
    bias = to_tensor(BIAS, dtype)
    arguments = {"attention_bias": bias, "value_mask": np.ones((B, S), "bool")}
    inputs = QUERY, to_tensor(VALUE), keras.Variable(VALUE, dtype="float32")
    seen = dtypes_seen(made("mixed_bfloat16"), *inputs, **arguments)
    assert seen.pop("attention_bias") == dtype
    assert seen.pop("value_mask") == "bool"
    assert list(seen.values()) == ["bfloat16"] * 3


def test_without_autocast_nothing_is_cast():
    layer = keras_mha.MultiHeadAttention(N, 4, dtype="mixed_bfloat16", autocast=False)
    seen = dtypes_seen(layer, QUERY, to_tensor(VALUE))
    assert list(seen.values()) == ["float32"] * 2


@only_torch
def test_a_wider_bias_does_not_make_the_kernel_wide():
    import torch

    layer = made("float32")
    bias = torch.zeros((T, S), dtype=torch.float64, requires_grad=True)
    output = layer(QUERY, VALUE, attention_bias=bias)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert bias.grad.dtype == torch.float64


def test_a_keras_mask_survives_the_cast():
    layer = made("mixed_bfloat16")
    valid = np.broadcast_to(np.arange(S) % 2 == 0, (B, S))
    value = keras.layers.Masking(dtype="float32")(
        np.where(valid[..., None], VALUE, 0.0).astype("float32")
    )
    found = layer(QUERY, value, attention_bias=to_tensor(BIAS))
    bias = np.where(valid[:, None, None], BIAS, -np.inf)
    assert_close(found, expected(layer, bias)[0])


# ------------------------------------------------------------ integers and booleans

WHOLE = np.random.default_rng(2).integers(0, 3, (B, T, D))


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("float32", "int32"), ("mixed_bfloat16", "uint8"), ("float16", "bool")],
)
def test_integers_and_booleans_are_cast(policy, dtype):
    x = WHOLE.astype(dtype)
    layer = keras_mha.MultiHeadAttention(N, 4, dtype=policy, use_gate=True)
    found = layer(x, x, x)
    assert keras.backend.standardize_dtype(found.dtype) == policy.removeprefix("mixed_")
    wanted = layer(*[as_dtype(x, layer.compute_dtype)] * 3)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras's own layer takes none there"
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_integers_give_the_numbers_of_keras(policy):
    theirs = keras.layers.MultiHeadAttention(N, 4, dtype=policy)
    theirs.build(WHOLE.shape, WHOLE.shape)
    ours = made_like(theirs)
    x = WHOLE.astype("int32")
    found, wanted = to_numpy(ours(x, x)), to_numpy(theirs(x, x))
    np.testing.assert_allclose(
        found, wanted, atol=1e-5 if policy == "float32" else 2e-2
    )


def made_like(theirs):
    ours = keras_mha.MultiHeadAttention.from_config(theirs.get_config())
    ours.build(WHOLE.shape, WHOLE.shape)
    ours.set_weights(theirs.get_weights())
    return ours


def test_integers_in_a_functional_model():
    inputs = keras.Input((T, D), dtype="int32")
    layer = keras_mha.MultiHeadAttention(N, 4, dtype="mixed_bfloat16")
    outputs = layer(inputs, inputs, return_attention_scores=True)
    assert [x.dtype for x in outputs] == ["bfloat16"] * 2
    found = keras.Model(inputs, outputs)(WHOLE.astype("int32"))[0]
    x = WHOLE.astype("float32")
    wanted, _ = layer(x, x, return_attention_scores=True)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))


def test_integers_beside_a_cache():
    x, y = WHOLE.astype("int32"), WHOLE.astype("float32")
    layer = keras_mha.MultiHeadAttention(N, 4)
    layer.build(x.shape, x.shape)
    for new in (lambda x: layer.init_cache(B, T), lambda x: layer.init_cache(memory=x)):
        found, wanted = layer(x, cache=new(x))[0], layer(y, cache=new(y))[0]
        np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))


def test_lists_of_one_number_or_one_row_are_arrays_too():
    layer = keras_mha.MultiHeadAttention(2, 4, position=keras_mha.RotaryEmbedding())
    x = to_tensor(np.ones((1, 1, 8)))
    given = {"position_ids": [3], "segment_ids": [[0]], "query_mask": [[True]]}
    expected = {name: np.array(numbers) for name, numbers in given.items()}
    np.testing.assert_allclose(
        to_numpy(layer(x, **given)), to_numpy(layer(x, **expected))
    )
