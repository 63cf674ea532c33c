"""Decoding with a cache gives what one call over the whole sequence gives."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mha
from keras_mha._keras import get_keras_mask
from keras_mha.layers.cache import slot_positions
from tests.helpers import backend_jit, call_at_once, to_numpy, to_tensor

BACKEND = keras.backend.backend()
BATCH, LENGTH, FEATURES = 2, 12, 10
DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 4.0,
    "original_max_position_embeddings": 4,
}
POSITIONS = {
    "none": lambda: None,
    "rotary": keras_mha.RotaryEmbedding,
    "ALiBi": keras_mha.ALiBi,
    "T5": lambda: keras_mha.RelativePositionBias(num_buckets=8, max_distance=9),
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def made(position=None, shape=(None, None, FEATURES), seed=0, **config):
    """A layer with weights of some size in all places, biases included."""
    arguments = {"num_heads": 4, "key_dim": 6, "num_key_value_heads": 2, **config}
    layer = keras_mha.MultiHeadAttention(position=position, **arguments)
    layer.build(shape)
    draws = np.random.default_rng(seed)
    layer.set_weights([draws.normal(size=w.shape) * 0.5 for w in layer.weights])
    return layer


def whole(layer, x, **arguments):
    return to_numpy(
        call_at_once(
            lambda x: layer(x, use_causal_mask=True, **arguments), [to_tensor(x)]
        )
    )


def in_chunks(layer, x, lengths, max_length=None):
    """The outputs of one call for each chunk, side by side, and the last cache."""
    assert sum(lengths) == x.shape[1]

    def run(x):
        cache = layer.init_cache(x.shape[0], max_length or x.shape[1])
        outputs, start = [], 0
        for length in lengths:
            chunk = x[:, start : start + length]
            output, cache = layer(chunk, cache=cache, use_causal_mask=True)
            outputs.append(output)
            start += length
        return keras.ops.concatenate(outputs, axis=1), cache

    output, cache = call_at_once(run, [to_tensor(x)])
    return to_numpy(output), {name: to_numpy(x) for name, x in cache.items()}


def assert_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ chunks

CHUNKS = {
    "at once": [12],
    "prompt, then steps": [8, 1, 1, 1, 1],
    "chunks": [3, 5, 1, 3],
    "steps": [1] * 12,
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("position", POSITIONS)
def test_chunks_give_what_one_call_gives(position, chunks):
    x = draw(BATCH, LENGTH, FEATURES)
    layer = made(POSITIONS[position]())
    found, cache = in_chunks(layer, x, CHUNKS[chunks], max_length=15)
    assert_close(found, whole(layer, x))
    assert cache["length"].tolist() == [12, 12]
    assert cache["key"].shape == (2, 15, 2, 6)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_window_needs_no_more_slots_than_it_is_long(position, chunks):
    x = draw(BATCH, LENGTH, FEATURES)
    layer = made(POSITIONS[position](), sliding_window=5)
    found, cache = in_chunks(layer, x, CHUNKS[chunks])
    assert_close(found, whole(layer, x))
    assert cache["key"].shape[1] == 5


def test_a_window_longer_than_the_cache_makes_no_ring():
    x = draw(BATCH, LENGTH, FEATURES)
    layer = made(sliding_window=50)
    found, cache = in_chunks(layer, x, [7, 1, 4])
    assert_close(found, whole(layer, x))
    assert cache["key"].shape[1] == LENGTH
    with pytest.raises(ValueError, match="has room for max_length=12"):
        layer(to_tensor(x[:, :1]), cache=as_tensors(cache))


def as_tensors(cache):
    return {
        name: to_tensor(x, "int32" if name == "length" else "float32")
        for name, x in cache.items()
    }


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": None, "value_dim": 5},
        {"num_key_value_heads": 1, "use_gate": True, "output_shape": 7},
        {"qk_norm": "rms", "attention_sink": "learned", "logit_soft_cap": 3.0},
        {"num_memory_key_values": 2, "qk_norm": "rms"},
        {"talking_heads": "both", "num_key_value_heads": 2},
        {"num_memory_key_values": 1, "sliding_window": 3, "flash_attention": True},
        {"flash_attention": True, "dropout": 0.3},
        {"flash_attention": False, "use_bias": False},
    ],
    ids=lambda config: next(iter(config)),
)
def test_every_option_of_the_layer_goes_with_a_cache(config):
    x = draw(BATCH, LENGTH, FEATURES)
    layer = made(keras_mha.RotaryEmbedding(4, interleaved=True), **config)
    found, _ = in_chunks(layer, x, [6, 1, 1, 4])
    assert_close(found, whole(layer, x))


def test_long_prompts_are_attended_in_tiles():
    x = draw(1, 700, FEATURES)
    layer = made(keras_mha.ALiBi(), flash_attention=True)
    found, _ = in_chunks(layer, x, [550, 149, 1], max_length=1100)
    assert_close(found, whole(layer, x))


def test_a_known_empty_cache_skips_what_no_query_sees():
    """Eagerly, where the length is known; a compiled call looks at every tile."""
    x = to_tensor(draw(1, 700, FEATURES))
    layer = made(keras_mha.RotaryEmbedding(), flash_attention=True)
    cache = layer.init_cache(1, 1400)
    output, _ = layer(x, cache=cache, use_causal_mask=True)
    assert_close(to_numpy(output), whole(layer, to_numpy(x)))


@st.composite
def decodings(draw):
    """Chunks of one to six tokens, some of them padding, and a layer to read them."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))
    valid = np.array([draw(rows), draw(rows)])
    window = draw(st.sampled_from([None, 1, 3, 8]))
    return lengths, valid, window, draw(st.sampled_from(sorted(POSITIONS)))


@given(decodings())
def test_each_row_decodes_as_if_it_were_alone_and_without_padding(decoding):
    lengths, valid, window, position = decoding
    layer = made(POSITIONS[position](), sliding_window=window)
    x = draw(*valid.shape, FEATURES)

    def run(x, valid):
        cache = layer.init_cache(2, x.shape[1])
        outputs, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            output, cache = layer(
                x[:, part],
                query_mask=valid[:, part],
                cache=cache,
                use_causal_mask=True,
            )
            outputs.append(output)
            start += length
        return keras.ops.concatenate(outputs, axis=1), cache["length"]

    found, length = call_at_once(run, [to_tensor(x), to_tensor(valid, "bool")])
    found = to_numpy(found)
    assert to_numpy(length).tolist() == valid.sum(axis=1).tolist()
    for row in range(2):
        real = valid[row]
        if real.any():
            expected = whole(layer, x[row : row + 1, real])
            assert_close(found[row, real], expected[0])
        alone = to_numpy(layer.output_dense.bias)
        padding = found[row, ~real]
        assert_close(padding, np.broadcast_to(alone, padding.shape))


def test_the_length_of_a_text_scales_every_position_of_it():
    """With dynamic scaling a step is the end of a call over all that came before."""
    layer = made(keras_mha.RotaryEmbedding(scaling=DYNAMIC))
    x = draw(BATCH, LENGTH, FEATURES)
    found, _ = in_chunks(layer, x, [3, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    for end in (3, 4, 5, 9, 12):
        expected = whole(layer, x[:, :end])
        assert_close(found[:, end - 1], expected[:, -1])


def test_position_ids_place_the_new_tokens():
    layer = made(keras_mha.RotaryEmbedding())
    x = to_tensor(draw(BATCH, 5, FEATURES))
    ids = to_tensor([3, 4, 9, 11, 12], "int32")
    expected = to_numpy(layer(x, use_causal_mask=True, position_ids=ids))
    cache, found = layer.init_cache(BATCH, 5), []
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        output, cache = layer(
            x[:, part], cache=cache, use_causal_mask=True, position_ids=ids[part]
        )
        found.append(to_numpy(output))
    assert_close(np.concatenate(found, axis=1), expected)


def test_without_a_causal_mask_the_new_tokens_see_each_other():
    layer = made()
    x = to_tensor(draw(BATCH, 6, FEATURES))
    cache = layer.init_cache(BATCH, 9)
    _, cache = layer(x[:, :4], cache=cache, use_causal_mask=True)
    output, _ = layer(x[:, 4:], cache=cache)
    mask = np.ones((6, 6), bool)
    expected = layer(x, attention_mask=to_tensor(mask, "bool"))
    assert_close(to_numpy(output), to_numpy(expected)[:, 4:])


def test_scores_are_those_of_one_call_with_zeros_for_empty_slots():
    layer = made(keras_mha.RotaryEmbedding())
    x = to_tensor(draw(BATCH, 6, FEATURES))
    _, expected = layer(x, use_causal_mask=True, return_attention_scores=True)
    _, cache = layer(x[:, :4], cache=layer.init_cache(BATCH, 8), use_causal_mask=True)
    _, scores, cache = layer(
        x[:, 4:], cache=cache, use_causal_mask=True, return_attention_scores=True
    )
    assert to_numpy(cache["length"]).tolist() == [6, 6]
    scores = to_numpy(scores)
    assert scores.shape == (BATCH, 4, 2, 8)
    assert_close(scores[..., :6], to_numpy(expected)[:, :, 4:])
    assert not scores[..., 6:].any()


def test_mask_and_bias_of_a_step_are_for_the_slots():
    layer = made()
    x = to_tensor(draw(BATCH, 5, FEATURES))
    mask, bias = np.random.default_rng(1).random((5, 7)) < 0.7, draw(4, 5, 7)
    expected = layer(
        x,
        use_causal_mask=True,
        attention_mask=to_tensor(mask[:, :5], "bool"),
        attention_bias=to_tensor(bias[:, :, :5]),
    )
    _, cache = layer(x[:, :4], cache=layer.init_cache(BATCH, 7), use_causal_mask=True)
    output, _ = layer(
        x[:, 4:],
        cache=cache,
        use_causal_mask=True,
        attention_mask=to_tensor(mask[4:], "bool"),
        attention_bias=to_tensor(bias[:, 4:]),
    )
    assert_close(to_numpy(output), to_numpy(expected)[:, 4:])


def test_an_old_cache_can_be_gone_on_from_twice():
    layer = made(sliding_window=4)
    x = to_tensor(draw(BATCH, 7, FEATURES))
    _, cache = layer(x[:, :5], cache=layer.init_cache(BATCH, 9), use_causal_mask=True)
    kept = {name: to_numpy(part) for name, part in cache.items()}
    first, _ = layer(x[:, 5:6], cache=cache, use_causal_mask=True)
    other, _ = layer(x[:, 6:7], cache=cache, use_causal_mask=True)
    again, _ = layer(x[:, 5:6], cache=cache, use_causal_mask=True)
    np.testing.assert_array_equal(to_numpy(first), to_numpy(again))
    assert np.abs(to_numpy(first) - to_numpy(other)).max() > 1e-3
    for name, part in kept.items():
        np.testing.assert_array_equal(to_numpy(cache[name]), part)


def test_scores_of_a_ring_have_the_old_slots_and_then_the_new_tokens():
    layer = made(sliding_window=3)
    for count, columns in ((1, 3), (5, 8), (None, None)):
        symbolic = layer(
            keras.Input((count, FEATURES), batch_size=BATCH),
            cache=layer.init_cache(BATCH, 9),
            return_attention_scores=True,
        )
        assert symbolic[1].shape == (BATCH, 4, count, columns)
        if count is not None:
            x = to_tensor(draw(BATCH, count, FEATURES))
            cache = layer.init_cache(BATCH, 9)
            _, scores, _ = layer(x, cache=cache, return_attention_scores=True)
            assert tuple(scores.shape) == (BATCH, 4, count, columns)


def test_a_chunk_of_no_tokens_changes_nothing():
    # No groups of heads: TensorFlow's own product of no rows fails with them.
    layer = made(keras_mha.RotaryEmbedding(), num_key_value_heads=None)
    x = to_tensor(draw(BATCH, 3, FEATURES))
    _, cache = layer(x, cache=layer.init_cache(BATCH, 4), use_causal_mask=True)
    output, after = layer(x[:, :0], cache=cache, use_causal_mask=True)
    assert tuple(output.shape) == (BATCH, 0, FEATURES)
    for name in cache:
        np.testing.assert_array_equal(to_numpy(after[name]), to_numpy(cache[name]))


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_slots_hold_the_last_positions(slots):
    lengths = np.arange(10)
    expected = np.full((10, slots), -1)
    for length in lengths:
        for position in range(length):
            expected[length, position % slots] = position
    found = to_numpy(slot_positions(to_tensor(lengths, "int32"), slots))
    np.testing.assert_array_equal(np.maximum(found, -1), expected)


# --------------------------------------------------------------------------- no room


def test_no_room_is_an_error_that_leaves_the_cache_as_it_was():
    layer = made()
    x = to_tensor(draw(BATCH, 3, FEATURES))
    _, cache = layer(x, cache=layer.init_cache(BATCH, 4), use_causal_mask=True)
    kept = {name: to_numpy(part) for name, part in cache.items()}
    with pytest.raises(
        ValueError, match=r"max_length=4 positions: row 0 holds 3 and cannot take 2"
    ):
        layer(x[:, :2], cache=cache, use_causal_mask=True)
    for name, part in kept.items():
        np.testing.assert_array_equal(to_numpy(cache[name]), part)


@pytest.mark.parametrize("count", [1, 2])
def test_a_compiled_program_marks_rows_without_room_and_overwrites_nothing(count):
    layer = made(keras_mha.RotaryEmbedding())
    step = backend_jit(lambda x, cache: layer(x, cache=cache, use_causal_mask=True))
    x = to_tensor(draw(BATCH, 4, FEATURES))
    # Row 0 is full after this, row 1 has room for two more.
    valid = to_tensor([[True] * 4, [True, True, False, False]], "bool")
    _, cache = layer(
        x, query_mask=valid, cache=layer.init_cache(BATCH, 4), use_causal_mask=True
    )
    new = to_tensor(draw(BATCH, count, FEATURES, seed=1))
    output, after = step(new, cache)
    output = to_numpy(output)
    assert np.isnan(output[0]).all()
    text = np.concatenate([to_numpy(x)[1:, :2], to_numpy(new)[1:]], axis=1)
    assert_close(output[1:], whole(layer, text)[:, 2:])
    assert to_numpy(after["length"]).tolist() == [4, 2 + count]
    for name in ("key", "value"):
        np.testing.assert_array_equal(
            to_numpy(after[name])[0], to_numpy(cache[name])[0]
        )


def test_a_mask_of_whole_rows():
    layer = made()
    x = to_tensor(draw(BATCH, 4, FEATURES))
    rows = to_tensor([True, False], "bool")
    cache = layer.init_cache(BATCH, 5)
    _, cache = layer(x, query_mask=rows, cache=cache, use_causal_mask=True)
    assert to_numpy(cache["length"]).tolist() == [4, 0]


def test_a_row_that_is_done_can_stay_masked():
    layer = made()
    x = to_tensor(draw(BATCH, 4, FEATURES))
    _, cache = layer(x, cache=layer.init_cache(BATCH, 5), use_causal_mask=True)
    done = to_tensor([[False], [True]], "bool")
    _, cache = layer(x[:, :1], query_mask=done, cache=cache, use_causal_mask=True)
    assert to_numpy(cache["length"]).tolist() == [4, 5]
    no_one = to_tensor([[False], [False]], "bool")
    _, cache = layer(x[:, :1], query_mask=no_one, cache=cache, use_causal_mask=True)
    assert to_numpy(cache["length"]).tolist() == [4, 5]


# -------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("xla", [False, True] if BACKEND == "tensorflow" else [False])
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_steps(window, xla):
    layer = made(keras_mha.RotaryEmbedding(), sliding_window=window)
    call = backend_jit(
        lambda x, cache: layer(x, cache=cache, use_causal_mask=True), xla=xla
    )
    x = draw(BATCH, LENGTH, FEATURES)
    cache, found = layer.init_cache(BATCH, LENGTH), []
    for start, end in ((0, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        output, cache = call(to_tensor(x[:, start:end]), cache)
        found.append(to_numpy(output))
    assert_close(np.concatenate(found, axis=1), whole(layer, x))


@pytest.mark.parametrize("xla", [False, True] if BACKEND == "tensorflow" else [False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch's loops are Python's")
def test_the_cache_is_the_carry_of_a_compiled_loop(window, xla):
    layer = made(keras_mha.ALiBi(), sliding_window=window)
    x = draw(BATCH, LENGTH, FEATURES)
    loop = {"jax": _scanned, "tensorflow": _while_loop}[BACKEND]
    cache = layer.init_cache(BATCH, LENGTH)
    found = to_numpy(loop(layer, to_tensor(x), cache, xla))
    assert_close(found[:, :, 0].transpose(1, 0, 2), whole(layer, x))


def _scanned(layer, x, cache, xla):
    import jax

    def step(cache, token):
        output, cache = layer(token, cache=cache, use_causal_mask=True)
        return cache, output

    tokens = keras.ops.transpose(x, (1, 0, 2))[:, :, None]
    return jax.jit(lambda cache, tokens: jax.lax.scan(step, cache, tokens)[1])(
        cache, tokens
    )


def _while_loop(layer, x, cache, xla):
    import tensorflow as tf

    def step(i, cache, outputs):
        token = tf.gather(x, [i], axis=1)
        output, cache = layer(token, cache=cache, use_causal_mask=True)
        return i + 1, cache, outputs.write(i, output)

    @tf.function(jit_compile=xla)
    def run(cache):
        outputs = tf.TensorArray("float32", LENGTH, element_shape=(BATCH, 1, FEATURES))
        carry = (0, cache, outputs)
        return tf.while_loop(lambda i, *_: i < LENGTH, step, carry)[2].stack()

    return run(cache)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="speaks of TensorFlow's variables")
def test_a_cache_can_be_kept_in_variables():
    import tensorflow as tf

    layer = made(keras_mha.RotaryEmbedding())
    x = draw(BATCH, 4, FEATURES)
    cache = layer.init_cache(BATCH, 4)
    variables = {name: tf.Variable(part) for name, part in cache.items()}

    @tf.function
    def step(token):
        output, new = layer(token, cache=variables, use_causal_mask=True)
        for name, variable in variables.items():
            variable.assign(new[name])
        return output

    found = [to_numpy(step(to_tensor(x[:, i : i + 1]))) for i in range(4)]
    assert_close(np.concatenate(found, axis=1), whole(layer, x))


def test_a_functional_model_takes_and_returns_a_cache(tmp_path):
    layer = made(keras_mha.RotaryEmbedding())
    x = to_tensor(draw(BATCH, 3, FEATURES))
    empty = layer.init_cache(BATCH, 5)
    inputs = keras.Input((None, FEATURES), batch_size=BATCH)
    cache = {
        name: keras.Input(
            batch_shape=tuple(part.shape),
            dtype=keras.backend.standardize_dtype(part.dtype),
        )
        for name, part in empty.items()
    }
    outputs = layer(
        inputs, cache=cache, use_causal_mask=True, return_attention_scores=True
    )
    output, scores, new_cache = outputs
    assert output.shape == (BATCH, None, FEATURES)
    assert scores.shape == (BATCH, 4, None, 5)
    assert {n: tuple(c.shape) for n, c in new_cache.items()} == {
        n: tuple(c.shape) for n, c in cache.items()
    }
    model = keras.Model([inputs, cache], [output, new_cache])
    model.save(tmp_path / "decoder.keras")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    for each in (model, loaded):
        first, after = each([x[:, :2], empty])
        last, after = each([x[:, 2:], after])
        found = np.concatenate([to_numpy(first), to_numpy(last)], axis=1)
        assert_close(found, whole(layer, to_numpy(x)))


# ---------------------------------------------------------------------------- dtypes


def test_a_cache_is_in_the_compute_dtype():
    layer = made(dtype="mixed_bfloat16")
    cache = layer.init_cache(BATCH, 4)
    dtypes = {n: keras.backend.standardize_dtype(x.dtype) for n, x in cache.items()}
    assert dtypes == {"key": "bfloat16", "value": "bfloat16", "length": "int32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cache_keeps_a_dtype_of_its_own(dtype):
    layer = made(keras_mha.RotaryEmbedding())
    x = draw(BATCH, 6, FEATURES)
    cache, found = layer.init_cache(BATCH, 6, dtype=dtype), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        output, cache = layer(to_tensor(x[:, part]), cache=cache, use_causal_mask=True)
        assert keras.backend.standardize_dtype(output.dtype) == "float32"
        found.append(to_numpy(output))
    for name in ("key", "value"):
        assert keras.backend.standardize_dtype(cache[name].dtype) == dtype
    tolerance = {"bfloat16": 5e-2, "float16": 5e-3}[dtype]
    assert_close(np.concatenate(found, axis=1), whole(layer, x), tolerance)


# ---------------------------------------------------------------------------- memory


@pytest.mark.parametrize("position", POSITIONS)
def test_a_memory_is_projected_once(position):
    layer = keras_mha.MultiHeadAttention(
        4, 6, num_key_value_heads=2, value_dim=5, position=POSITIONS[position]()
    )
    query, value, key = draw(BATCH, 3, 10), draw(BATCH, 7, 8), draw(BATCH, 7, 9)
    tensors = [to_tensor(x) for x in (query, value, key)]
    expected = to_numpy(layer(*tensors))
    cache = layer.init_cache(memory=(tensors[1], tensors[2]))
    assert {name: tuple(x.shape) for name, x in cache.items()} == {
        "key": (BATCH, 7, 2, 6),
        "value": (BATCH, 7, 2, 5),
    }
    found, same = layer(tensors[0], cache=cache)
    assert_close(to_numpy(found), expected)
    for name in cache:
        np.testing.assert_array_equal(to_numpy(same[name]), to_numpy(cache[name]))


def test_queries_of_a_memory_come_one_by_one_with_their_positions():
    layer = keras_mha.MultiHeadAttention(4, 6, position=keras_mha.RotaryEmbedding())
    query, memory = to_tensor(draw(BATCH, 3, 10)), to_tensor(draw(BATCH, 7, 8))
    expected = to_numpy(layer(query, memory))
    cache, found = layer.init_cache(memory=memory), []
    for i in range(3):
        ids = (to_tensor([i], "int32"), to_tensor(np.arange(7), "int32"))
        output, cache = layer(query[:, i : i + 1], cache=cache, position_ids=ids)
        found.append(to_numpy(output))
    assert_close(np.concatenate(found, axis=1), expected)


@pytest.mark.parametrize("given", ["value_mask", "the value's own Keras mask"])
def test_padding_of_a_memory_is_kept_with_it(given):
    layer = keras_mha.MultiHeadAttention(4, 6)
    query = to_tensor(draw(BATCH, 3, 10))
    words = np.array([[5, 2, 0, 0], [1, 3, 4, 0]])
    embedding = keras.layers.Embedding(6, 8, mask_zero=True)
    memory = embedding(to_tensor(words, "int32"))
    expected = to_numpy(layer(query, memory))
    assert np.abs(expected - to_numpy(layer(query, memory * 1.0))).max() > 1e-4
    if given == "value_mask":
        mask = to_tensor(words != 0, "bool")
        cache = layer.init_cache(memory=memory * 1.0, value_mask=mask)
    else:
        cache = layer.init_cache(memory=memory)
    found, _ = layer(query, cache=cache)
    assert_close(to_numpy(found), expected)


def test_the_mask_of_the_query_goes_on_to_the_output():
    layer = made()
    words = to_tensor([[3, 1, 2], [4, 0, 0]], "int32")
    x = keras.layers.Embedding(6, FEATURES, mask_zero=True)(words)
    output, cache = layer(x, cache=layer.init_cache(BATCH, 5), use_causal_mask=True)
    assert to_numpy(cache["length"]).tolist() == [3, 1]
    np.testing.assert_array_equal(
        to_numpy(get_keras_mask(output)), to_numpy(words) != 0
    )
