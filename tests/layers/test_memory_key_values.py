"""Keys and values that a layer learns: seen through every mask, without a position.

That they are in the definition's numbers and gradients, whatever else a layer has, is
tested in `test_multi_head_attention_numbers.py` and `..._positions.py`; their columns,
a tile at a time, in `tests/test_memory_columns.py`.
"""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.layers import memory_key_values
from tests import oracle
from tests.helpers import (
    call_at_once,
    outputs_and_gradients,
    to_numpy,
    to_tensor,
    with_variables,
)
from tests.layers.test_multi_head_attention_numbers import weights_of

B, T, S, D = 2, 5, 6, 8
RNG = np.random.default_rng(0)
QUERY, VALUE = RNG.normal(size=(B, T, D)), RNG.normal(size=(B, S, D))


def made(shape=(B, T, D), seed=0, **config):
    """A layer with weights of some size in all places."""
    config = {"num_heads": 4, "key_dim": 3, "num_memory_key_values": 2, **config}
    layer = keras_mha.MultiHeadAttention(**config)
    layer.build(shape)
    draws = np.random.default_rng(seed)
    layer.set_weights([draws.normal(size=w.shape) * 0.5 for w in layer.get_weights()])
    return layer


def run(layer, *arrays, **arguments):
    """What the layer returns for arrays, as arrays."""
    tensors = [to_tensor(x) for x in arrays]
    found = call_at_once(lambda *tensors: layer(*tensors, **arguments), tensors)
    return keras.tree.map_structure(to_numpy, found)


def assert_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_each_key_head_has_its_own():
    layer = made(num_key_value_heads=2, value_dim=7)
    assert layer.memory_key.shape == (2, 2, 3)
    assert layer.memory_value.shape == (2, 2, 7)
    names = [weight.name for weight in layer.trainable_weights]
    assert {"memory_key", "memory_value"} < set(names)


def test_a_layer_that_learns_none_has_none():
    layer = keras_mha.MultiHeadAttention(4, 3)
    layer.build((B, T, D))
    assert layer.memory_key is layer.memory_value is None
    assert len(layer.weights) == 8
    assert "num_memory_key_values" not in layer.get_config()


def test_they_start_as_the_kernels_do_and_not_alike():
    layer = keras_mha.MultiHeadAttention(
        4, 3, num_memory_key_values=2, kernel_initializer="random_normal"
    )
    layer.build((B, T, D))
    key, value = (to_numpy(x.value) for x in (layer.memory_key, layer.memory_value))
    assert 0 < np.abs(key).max() < 0.5  # of a standard deviation of 0.05
    assert (key != value).all()


def test_the_other_weights_start_as_without_them():
    starts = []
    for count in (None, 2):
        keras.utils.set_random_seed(3)
        layer = keras_mha.MultiHeadAttention(4, 3, num_memory_key_values=count)
        layer.build((B, T, D))
        starts.append(weights_of(layer))
    for name, weight in starts[0].items():
        np.testing.assert_array_equal(starts[1][name], weight)


# ------------------------------------------------------------------ masks and scores


@pytest.mark.parametrize("flash_attention", [False, True])
def test_a_query_that_may_attend_to_nothing_attends_to_them_alone(flash_attention):
    layer = made(flash_attention=flash_attention)
    nothing = np.zeros((T, S), dtype=bool)
    output = run(layer, QUERY, VALUE, attention_mask=nothing)
    weights = weights_of(layer)
    query = oracle.project(QUERY, weights["query_kernel"], weights["query_bias"])
    key, value = (
        np.broadcast_to(weights[name], (B, 2, 4, 3))
        for name in ("memory_key", "memory_value")
    )
    heads, _ = oracle.dot_product_attention(query, key, value)
    expected = np.tensordot(heads, weights["output_kernel"], axes=2)
    assert_close(output, expected + weights["output_bias"])


class Dilated(masks.Mask):
    """A mask as a user writes one."""

    def allowed(self, rows, columns):
        return (rows - columns) % 3 == 0


# In long sequences, where there are tiles or slices of the fused kernel to skip.
LENGTH = 1100
IDS = np.sort(RNG.integers(0, 3, size=(1, LENGTH)))
LONG = {
    "causal": ({}, {"use_causal_mask": True}),
    "window": ({"sliding_window": 100}, {}),
    "window, T5": (
        {"sliding_window": 100, "position": keras_mha.RelativePositionBias},
        {"use_causal_mask": True},
    ),
    "T5, and more of them than a tile has keys": (
        {"num_memory_key_values": 600, "position": keras_mha.RelativePositionBias},
        {"use_causal_mask": True},
    ),
    "segments, ALiBi": ({"position": keras_mha.ALiBi}, {"segment_ids": IDS}),
    "padding": ({}, {"value_mask": np.arange(LENGTH)[None] < 700}),
    "one's own": ({}, {"attention_mask": Dilated() & masks.SlidingWindow(200)}),
    "bias": (
        {"sliding_window": 100},
        {"attention_bias": RNG.normal(size=(1, 1, 1, LENGTH)).astype("float32")},
    ),
    "query_mask": (
        {"attention_sink": "learned", "logit_soft_cap": 2.0},
        {"query_mask": np.arange(LENGTH)[None] % 5 > 0, "use_causal_mask": True},
    ),
    "nothing for some rows": ({}, {"attention_mask": masks.Causal(-600)}),
}


@pytest.mark.parametrize("name", LONG)
def test_tiles_and_slices_give_what_the_formula_gives(name):
    """Outputs and the gradients of the input and of all weights."""
    config, call = LONG[name]
    x, cotangent = np.random.default_rng(1).normal(size=(2, 1, LENGTH, D))
    results = []
    for flash_attention in (True, False):
        position = config.get("position")
        options = {**config, "position": None if position is None else position()}
        layer = made(
            (1, LENGTH, D),
            num_heads=2,
            num_key_value_heads=1,
            flash_attention=flash_attention,
            **options,
        )
        variables = layer.trainable_variables
        found = outputs_and_gradients(
            with_variables(lambda x, layer=layer: layer(x, **call), variables),
            [x, *(to_numpy(v.value) for v in variables)],
            [cotangent],
        )
        results.append(found)
    (output, gradients), (expected, expected_gradients) = results
    assert_close(output[0], expected[0])
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found, wanted, 1e-4)


def test_their_columns_are_left_out_of_the_scores():
    layer = made()
    output, scores = run(
        layer, QUERY, VALUE, use_causal_mask=True, return_attention_scores=True
    )
    config = {"num_memory_key_values": 2}
    expected, expected_scores = oracle.multi_head_attention(
        weights_of(layer), config, QUERY, VALUE, use_causal_mask=True
    )
    assert scores.shape == (B, 4, T, S)
    assert (scores.sum(axis=-1) < 0.9999).all()
    assert_close(output, expected)
    assert_close(scores, expected_scores)
    maps = keras_mha.attention_maps(
        layer, to_tensor(QUERY), value=to_tensor(VALUE), use_causal_mask=True
    )
    assert_close(maps[layer.path], expected_scores)


def test_symbolic_scores_have_the_shape_that_they_will_have():
    query, value = keras.Input((T, D)), keras.Input((S, D))
    layer = made()
    output, scores = layer(query, value, return_attention_scores=True)
    assert output.shape == (None, T, D)
    assert scores.shape == (None, 4, T, S)
    model = keras.Model([query, value], [output, scores])
    found = model([to_tensor(QUERY), to_tensor(VALUE)])
    expected = layer(to_tensor(QUERY), to_tensor(VALUE), return_attention_scores=True)
    for x, y in zip(found, expected, strict=True):
        assert_close(to_numpy(x), to_numpy(y))


@pytest.mark.parametrize("flash_attention", [False, True])
def test_hidden_tokens_may_hold_anything(flash_attention):
    layer = made(flash_attention=flash_attention)
    valid = np.arange(T) < np.array([[3], [T]])
    ids = np.where(valid, 0, 1)
    bad = np.where(valid[..., None], QUERY, np.nan)
    for arguments in ({"query_mask": valid}, {"segment_ids": ids}):
        expected = run(layer, QUERY, **arguments)
        found = run(layer, bad, **arguments)
        assert_close(found[valid], expected[valid])
    # Of a segment that holds NaN, what attends to it is NaN.
    assert np.isnan(found[~valid]).all()


def test_dropout_drops_their_weights_too():
    layer = made(dropout=0.5, seed=1)
    kernel = np.eye(12, D).reshape(4, 3, D)
    layer.output_dense.kernel.assign(kernel)
    layer.output_dense.bias.assign(np.zeros(D))
    arguments = {"attention_mask": np.zeros((T, S), dtype=bool)}
    output = run(layer, QUERY, VALUE, training=True, **arguments)
    assert (output == 0).any()  # of a head that has lost both
    assert (output != 0).any()
    assert (run(layer, QUERY, VALUE, **arguments) != 0).all()


# ------------------------------------------------------------------ caches, dtypes


def test_a_cache_does_not_hold_them():
    layer = made(num_key_value_heads=2)
    cache = layer.init_cache(B, 7)
    assert cache["key"].shape == (B, 7, 2, 3)
    output, cache = layer(to_tensor(QUERY), cache=cache, use_causal_mask=True)
    assert cache["key"].shape == (B, 7, 2, 3)
    assert_close(to_numpy(output), run(layer, QUERY, use_causal_mask=True))


def test_scores_with_a_cache_have_its_slots_alone():
    layer = made()
    _, scores, _ = layer(
        to_tensor(QUERY),
        cache=layer.init_cache(B, 7),
        use_causal_mask=True,
        return_attention_scores=True,
    )
    _, expected = run(layer, QUERY, use_causal_mask=True, return_attention_scores=True)
    assert_close(to_numpy(scores)[..., :T], expected)
    assert scores.shape == (B, 4, T, 7)


def test_with_the_cache_of_a_memory():
    layer = made(num_key_value_heads=2, position=keras_mha.RotaryEmbedding(2))
    valid = np.arange(S) < np.array([[4], [S]])
    cache = layer.init_cache(memory=to_tensor(VALUE), value_mask=to_tensor(valid))
    assert cache["key"].shape == (B, S, 2, 3)
    output, _ = layer(to_tensor(QUERY), cache=cache)
    assert_close(to_numpy(output), run(layer, QUERY, VALUE, value_mask=valid))


def test_a_cache_of_another_dtype_does_not_round_them():
    layer = made()
    layer.memory_key.assign(np.full((2, 4, 3), 1.001))
    layer.memory_value.assign(np.full((2, 4, 3), 1.001))
    cache = layer.init_cache(B, T, dtype="bfloat16")
    hidden = np.zeros((1, T), dtype=bool)  # so that these alone are seen
    output, _ = layer(to_tensor(QUERY), cache=cache, attention_mask=hidden)
    expected = run(layer, QUERY, attention_mask=hidden)
    assert_close(to_numpy(output), expected, 1e-6)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "float16"])
def test_half_types(dtype):
    layer = made(dtype=dtype)
    output, scores = run(layer, QUERY, VALUE, return_attention_scores=True)
    expected, expected_scores = oracle.multi_head_attention(
        weights_of(layer), {"num_memory_key_values": 2}, QUERY, VALUE
    )
    assert_close(output, expected, 4e-2)
    assert_close(scores, expected_scores, 1e-2)


# ------------------------------------------------------------------ the rest


def test_an_archive_of_one_that_was_trained_gives_the_same(tmp_path):
    inputs = keras.Input((T, D))
    model = keras.Model(inputs, made()(inputs, use_causal_mask=True))
    model.compile("sgd", "mse")
    before = to_numpy(model.layers[1].memory_value.value)
    model.fit(QUERY, QUERY, verbose=0)
    assert (to_numpy(model.layers[1].memory_value.value) != before).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].get_config()["num_memory_key_values"] == 2
    assert_close(loaded.predict(QUERY, verbose=0), model.predict(QUERY, verbose=0))


def test_quantized_projections_leave_them_alone():
    layer = made()
    before = to_numpy(layer.memory_key.value)
    expected = run(layer, QUERY)
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
        dense.quantize("int8")
    np.testing.assert_array_equal(to_numpy(layer.memory_key.value), before)
    assert_close(run(layer, QUERY), expected, 0.1)


def test_processes_that_share_a_sequence_would_count_them_again(monkeypatch):
    monkeypatch.setattr(memory_key_values, "splits_sequences", lambda: True)
    with pytest.raises(ValueError, match=r"`num_memory_key_values`.*context_par.*=2"):
        made()(to_tensor(QUERY))
