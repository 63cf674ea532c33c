"""Keras masks, explicit masks and mask objects, and how they go together."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from tests.helpers import backend_jit, to_numpy, to_tensor

B, T, S, D = 2, 5, 7, 12
RNG = np.random.default_rng(0)
QUERY, VALUE = (
    RNG.normal(size=(B, T, D)).astype("float32"),
    RNG.normal(size=(B, S, D)).astype("float32"),
)
QUERY_MASK = np.array([[True] * 3 + [False] * 2, [True] * 5])
VALUE_MASK = np.array([[True] * 7, [True] * 4 + [False] * 3])


@pytest.fixture(scope="module")
def layer():
    keras.utils.set_random_seed(1)
    layer = keras_mha.MultiHeadAttention(
        num_heads=3, key_dim=4, bias_initializer="random_normal"
    )
    layer.build((B, T, D), (B, S, D))
    return layer


def scores_of(layer, query=QUERY, value=VALUE, **arguments):
    query, value = (x if x is None else _tensor(x) for x in (query, value))
    _, scores = layer(query, value, return_attention_scores=True, **arguments)
    return to_numpy(scores)


def _tensor(x):
    return to_tensor(x) if isinstance(x, np.ndarray) else x


def masked(x, mask):
    """A tensor that carries a Keras mask, as `Masking` and `Embedding` make it."""
    layer = keras.layers.Masking(mask_value=-9.0)
    return layer(to_tensor(np.where(mask[..., None], x, -9.0).astype("float32")))


def test_each_mask_hides_what_it_should(layer):
    scores = scores_of(layer, query_mask=QUERY_MASK, value_mask=VALUE_MASK)
    seen = QUERY_MASK[:, None, :, None] & VALUE_MASK[:, None, None, :]
    assert (scores[np.broadcast_to(~seen, scores.shape)] == 0).all()
    assert (scores[np.broadcast_to(seen, scores.shape)] > 0).all()


def test_value_mask_and_key_mask_both_count(layer):
    key_mask = np.roll(VALUE_MASK, 1, axis=1)
    both = scores_of(layer, value_mask=VALUE_MASK, key_mask=key_mask)
    merged = scores_of(layer, value_mask=VALUE_MASK & key_mask)
    np.testing.assert_array_equal(both, merged)


@pytest.mark.parametrize("name", ["query_mask", "value_mask", "key_mask"])
def test_an_explicit_mask_does_what_the_implicit_one_does(layer, name):
    mask = QUERY_MASK if name == "query_mask" else VALUE_MASK
    tensors = {"query": to_tensor(QUERY), "value": to_tensor(VALUE)}
    tensors["key"] = to_tensor(VALUE)
    owner = name.removesuffix("_mask")
    source = QUERY if owner == "query" else VALUE
    plain = {**tensors, owner: to_tensor(np.where(mask[..., None], source, -9.0))}
    explicit = layer(**plain, **{name: mask})
    implicit = layer(**{**tensors, owner: masked(source, mask)})
    np.testing.assert_array_equal(to_numpy(implicit), to_numpy(explicit))


def test_an_explicit_mask_goes_before_the_implicit_one(layer):
    value = masked(VALUE, VALUE_MASK)
    scores = scores_of(layer, value=value, value_mask=np.ones((B, S), "bool"))
    assert (scores > 0).all()


def test_all_kinds_of_masks_count_together(layer):
    attention_mask = RNG.random((B, T, S)) < 0.7
    ids = (RNG.integers(0, 2, (B, T)), RNG.integers(0, 2, (B, S)))
    scores = scores_of(
        layer,
        query_mask=QUERY_MASK,
        value_mask=VALUE_MASK,
        attention_mask=attention_mask,
        segment_ids=ids,
        use_causal_mask=True,
    )
    seen = QUERY_MASK[:, :, None] & VALUE_MASK[:, None] & attention_mask
    seen &= ids[0][:, :, None] == ids[1][:, None]
    seen &= np.tril(np.ones((T, S), "bool"))
    assert seen.any() and not seen.all()
    np.testing.assert_array_equal(
        scores > 0, np.broadcast_to(seen[:, None], scores.shape)
    )


@pytest.mark.parametrize(
    ("mask", "dense"),
    [
        (masks.Causal(), np.tril(np.ones((T, S), "bool"))),
        (masks.Padding(VALUE_MASK), np.repeat(VALUE_MASK[:, None], T, axis=1)),
        (
            masks.Causal(1) & ~masks.SlidingWindow(1),
            np.tril(np.ones((T, S), "bool"), 1) & ~np.eye(T, S, dtype="bool"),
        ),
    ],
)
def test_a_mask_object_does_what_its_booleans_do(layer, mask, dense):
    np.testing.assert_array_equal(
        scores_of(layer, attention_mask=mask), scores_of(layer, attention_mask=dense)
    )


def test_whole_numbers_are_booleans(layer):
    mask = (RNG.random((B, T, S)) < 0.7).astype("int32")
    np.testing.assert_array_equal(
        scores_of(layer, attention_mask=mask),
        scores_of(layer, attention_mask=mask.astype("bool")),
    )


def test_a_float_mask_counts_as_booleans_and_warns(layer):
    mask = (RNG.random((B, T, S)) < 0.7).astype("float32")
    with pytest.warns(UserWarning, match="attention_bias"):
        scores = scores_of(layer, attention_mask=mask)
    expected = scores_of(layer, attention_mask=mask.astype("bool"))
    np.testing.assert_array_equal(scores, expected)


def test_an_additive_mask_is_warned_of_where_its_numbers_are_not_known(layer):
    mask = np.where(RNG.random((B, T, S)) < 0.7, 0.0, -1e9).astype("float32")
    compiled = backend_jit(lambda x, y, mask: layer(x, y, attention_mask=mask))
    with pytest.warns(UserWarning, match="attention_bias"):
        output = compiled(*map(to_tensor, (QUERY, VALUE, mask)))
    expected = layer(QUERY, VALUE, attention_mask=mask.astype("bool"))
    np.testing.assert_allclose(to_numpy(output), to_numpy(expected), atol=1e-6)


def test_masks_of_booleans_and_integers_are_not_looked_at(layer, monkeypatch):
    def looked(x):
        raise AssertionError

    monkeypatch.setattr("keras_mha.masks.fields.known_numbers", looked)
    for dtype in ("bool", "int32"):
        layer(QUERY, VALUE, attention_mask=np.ones((T, S), dtype))


def test_nested_lists_are_masks_too(layer):
    mask = RNG.random((B, T, S)) < 0.7
    ids = (RNG.integers(0, 2, (B, T)), RNG.integers(0, 2, (B, S)))
    np.testing.assert_array_equal(
        scores_of(layer, attention_mask=mask.tolist(), value_mask=VALUE_MASK.tolist()),
        scores_of(layer, attention_mask=mask, value_mask=VALUE_MASK),
    )
    np.testing.assert_array_equal(
        scores_of(layer, segment_ids=tuple(map(to_tensor, ids))),
        scores_of(layer, segment_ids=ids),
    )
    own = ids[0].tolist()
    np.testing.assert_array_equal(
        scores_of(layer, QUERY, QUERY, segment_ids=own),
        scores_of(layer, QUERY, QUERY, segment_ids=ids[0]),
    )


def test_the_window_and_the_causal_mask_meet():
    layer = keras_mha.MultiHeadAttention(num_heads=1, key_dim=4, sliding_window=2)
    seen = scores_of(layer, QUERY, QUERY, use_causal_mask=True)[0, 0] > 0
    np.testing.assert_array_equal(seen, np.eye(T) + np.eye(T, k=-1) > 0)


# ---------------------------------------------------------------------- masked rows


def test_a_row_that_sees_nothing_gives_the_output_bias(layer):
    output = layer(to_tensor(QUERY), to_tensor(VALUE), query_mask=QUERY_MASK)
    bias = to_numpy(layer.output_dense.bias)
    hidden = to_numpy(output)[~QUERY_MASK]
    np.testing.assert_allclose(hidden, np.broadcast_to(bias, hidden.shape), atol=1e-6)


def test_packed_segments_equal_separate_sequences(layer):
    """Two sequences packed into one row attend as they do alone."""
    one, two = QUERY[:1], VALUE[:1]
    packed = to_tensor(np.concatenate([one, two], axis=1))
    ids = np.array([[3] * T + [0] * S])
    together = to_numpy(layer(packed, packed, segment_ids=ids, use_causal_mask=True))
    for alone, part in ((one, together[:, :T]), (two, together[:, T:])):
        alone = to_tensor(alone)
        expected = to_numpy(layer(alone, alone, use_causal_mask=True))
        np.testing.assert_allclose(part, expected, atol=1e-5)


# ---------------------------------------------------------------------- Keras masks


def test_self_attention_by_one_input_is_self_attention_by_two(layer):
    x = masked(QUERY, QUERY_MASK)
    np.testing.assert_array_equal(to_numpy(layer(x)), to_numpy(layer(x, x)))


def test_the_querys_mask_goes_on_to_the_output():
    """A layer behind attention sees which tokens are padding."""
    tokens = np.array([[4, 2, 1, 0, 0], [3, 3, 3, 3, 3]])
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(6, D, mask_zero=True)(inputs)
    x = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)(x)
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    states, mean = keras.Model(inputs, [x, pooled])(to_tensor(tokens))
    expected = to_numpy(states)[0, :3].mean(axis=0)
    np.testing.assert_allclose(to_numpy(mean)[0], expected, atol=1e-6)


def test_an_explicit_query_mask_goes_on_to_the_output_too():
    tokens, valid = keras.Input((T, D)), keras.Input((T,), dtype="bool")
    x = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)(tokens, query_mask=valid)
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    states, mean = keras.Model([tokens, valid], [x, pooled])(
        [to_tensor(QUERY), to_tensor(QUERY_MASK)]
    )
    expected = to_numpy(states)[0, :3].mean(axis=0)
    np.testing.assert_allclose(to_numpy(mean)[0], expected, atol=1e-6)


def test_an_explicit_query_mask_goes_on_outside_a_model_too(layer):
    states = layer(to_tensor(QUERY), to_tensor(VALUE), query_mask=QUERY_MASK)
    pooled = keras.layers.GlobalAveragePooling1D()(states)
    expected = to_numpy(states)[0, :3].mean(axis=0)
    np.testing.assert_allclose(to_numpy(pooled)[0], expected, atol=1e-6)


def test_the_callers_own_tensors_keep_their_mask(layer):
    x = masked(QUERY, QUERY_MASK)
    first = to_numpy(layer(x, x))
    np.testing.assert_array_equal(to_numpy(layer(x, x)), first)
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    expected = QUERY[0, :3].mean(axis=0)
    np.testing.assert_allclose(to_numpy(pooled)[0], expected, atol=1e-6)


@pytest.mark.filterwarnings("error:.*destroy the mask.*")
def test_no_warning_says_that_a_mask_was_destroyed(layer):
    x = masked(QUERY, QUERY_MASK)
    layer(x, x)


def test_masking_and_embedding_reach_both_sides_of_a_functional_model():
    source = keras.Input((None,), dtype="int32")
    target = keras.Input((None,), dtype="int32")
    embed = keras.layers.Embedding(9, D, mask_zero=True)
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
    _, scores = layer(embed(target), embed(source), return_attention_scores=True)
    model = keras.Model([target, source], scores)
    scores = to_numpy(model([to_tensor([[1, 2, 0]]), to_tensor([[3, 0, 4, 0]])]))
    seen = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], "bool")
    np.testing.assert_array_equal(scores[0] > 0, np.broadcast_to(seen, (2, 3, 4)))


def test_a_sequential_model_carries_masks_through_two_layers():
    model = keras.Sequential(
        [
            keras.layers.Embedding(6, D, mask_zero=True),
            keras_mha.MultiHeadAttention(num_heads=2, key_dim=4),
            keras_mha.MultiHeadAttention(num_heads=2, key_dim=4),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    short = to_numpy(model(to_tensor([[1, 2, 3]])))
    padded = to_numpy(model(to_tensor([[1, 2, 3, 0, 0]])))
    np.testing.assert_allclose(padded, short, atol=1e-6)


def test_masks_of_images_have_the_images_axes():
    images = RNG.normal(size=(B, 3, 4, D)).astype("float32")
    valid = RNG.random((B, 3, 4)) < 0.7
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
    scores = scores_of(layer, images, images, value_mask=valid)
    assert scores.shape == (B, 2, 3, 4, 3, 4)
    expected = np.broadcast_to(valid[:, None, None, None], scores.shape)
    np.testing.assert_array_equal(scores > 0, expected)


def test_a_mask_of_frames_covers_all_their_patches():
    video = RNG.normal(size=(B, 3, 4, D)).astype("float32")
    frames = np.array([[True, True, False], [True, False, False]])
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
    np.testing.assert_array_equal(
        scores_of(layer, video, video, value_mask=frames),
        scores_of(
            layer, video, video, value_mask=np.repeat(frames[..., None], 4, axis=2)
        ),
    )
