"""Heads that talk to each other: each becomes a learned mixture of all.

That the mixtures are those of the definition, with every other option, is tested in
`test_multi_head_attention_numbers.py` and `..._axes.py`.
"""

import keras
import numpy as np
import pytest

import keras_mha
from tests.helpers import to_numpy, to_tensor

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 8)).astype("float32")


def made(talking_heads, **config):
    layer = keras_mha.MultiHeadAttention(4, 3, talking_heads=talking_heads, **config)
    layer.build(X.shape)
    return layer


@pytest.mark.parametrize("where", [None, "pre", "post", "both"])
def test_there_is_a_matrix_for_each_place_and_at_first_it_changes_nothing(where):
    keras.utils.set_random_seed(1)
    plain = made(None)
    keras.utils.set_random_seed(1)
    layer = made(where)
    wanted = {"pre": ["pre"], "post": ["post"], "both": ["pre", "post"], None: []}
    for place in ("pre", "post"):
        matrix = getattr(layer, f"talking_heads_{place}")
        assert (matrix is not None) == (place in wanted[where])
        if matrix is not None:
            assert matrix.path.endswith(f"talking_heads_{place}")
            np.testing.assert_array_equal(to_numpy(matrix.value), np.eye(4))
    x = to_tensor(X)
    np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(plain(x)), atol=1e-6)


def test_a_matrix_says_what_a_head_hears_of_each():
    layer = made("post")
    x = to_tensor(X)
    _, alone = layer(x, return_attention_scores=True)
    matrix = np.zeros((4, 4))
    matrix[3, 0] = 2.0  # the first head hears the last, twice as loud; others nothing
    layer.talking_heads_post.assign(matrix)
    _, scores = layer(x, return_attention_scores=True)
    scores, alone = to_numpy(scores), to_numpy(alone)
    np.testing.assert_allclose(scores[:, 0], 2 * alone[:, 3], atol=1e-6)
    assert not scores[:, 1:].any()


def test_the_scores_are_what_values_are_weighted_by():
    layer = made("post")
    layer.talking_heads_post.assign(RNG.normal(size=(4, 4)))
    _, scores = layer(to_tensor(X), return_attention_scores=True)
    maps = keras_mha.attention_maps(
        layer, to_tensor(X), heads=[1, 3], query_rows=[2, 5]
    )
    expected = to_numpy(scores)[:, [1, 3]][:, :, [2, 5]]
    np.testing.assert_allclose(maps[layer.path], expected, atol=1e-6)


def test_matrices_keep_their_precision_under_a_mixed_policy():
    layer = made("both", dtype="mixed_bfloat16")
    layer.talking_heads_pre.assign(np.eye(4) * 1.001)  # 1 in bfloat16
    assert layer.talking_heads_pre.dtype == "float32"
    assert "bfloat16" in keras.backend.standardize_dtype(layer(to_tensor(X)).dtype)


def test_a_row_that_sees_nothing_gets_zeros():
    layer = made("both", use_bias=False)
    layer.talking_heads_post.assign(RNG.normal(size=(4, 4)))
    mask = np.ones((6, 6), bool)
    mask[2] = False
    output, scores = layer(
        to_tensor(X), attention_mask=mask, return_attention_scores=True
    )
    assert not to_numpy(scores)[:, :, 2].any()
    assert not to_numpy(output)[:, 2].any()
    assert to_numpy(output)[:, 1].any()


def test_hidden_tokens_may_hold_anything():
    layer, valid = made("both"), np.arange(6) < [[4], [6]]
    spoilt = np.where(valid[..., None], X, np.nan).astype("float32")
    clean = np.where(valid[..., None], X, 0).astype("float32")
    found, expected = (
        to_numpy(layer(to_tensor(x), query_mask=valid)) for x in (spoilt, clean)
    )
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-6)


def test_heads_learn_to_talk():
    layer = made("both")
    model = keras.Sequential([keras.Input((6, 8)), layer])
    model.compile("adam", "mse")
    model.fit(X, RNG.normal(size=X.shape), epochs=1, verbose=0)
    for matrix in (layer.talking_heads_pre, layer.talking_heads_post):
        assert (to_numpy(matrix.value) != np.eye(4)).any()
