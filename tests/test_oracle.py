"""The definition that all else is measured against, measured by itself.

Worked numbers, properties that follow from the formulas, and the derivatives by hand
against central differences. No backend runs here.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def heads(T: int = 3, S: int = 4, N: int = 4, K: int = 2, H: int = 3, V: int = 2):
    return draw(2, T, N, H), draw(2, S, K, H, seed=1), draw(2, S, K, V, seed=2)


# ------------------------------------------------------------------ worked numbers


def test_worked_example_weights():
    # One head, identity projections: the scores are x x^T / sqrt(3).
    x = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])[None, :, None, :]
    one_hot = np.eye(3)[None, :, None, :]
    output, scores = oracle.dot_product_attention(x, x, one_hot)
    expected = [
        [0.2994, 0.3321, 0.3685],
        [0.2514, 0.3260, 0.4227],
        [0.2078, 0.3149, 0.4773],
    ]
    np.testing.assert_allclose(scores[0, 0], expected, atol=5e-5)
    # With one-hot values the output of a token is its row of weights.
    np.testing.assert_allclose(output[0, :, 0], scores[0, 0])


def test_worked_example_through_the_layer():
    x = np.array([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]])
    one_hot = np.eye(3)[None]
    identity = np.eye(3)[:, None, :]
    weights = {
        "query_kernel": identity,
        "key_kernel": identity,
        "value_kernel": identity,
        "output_kernel": np.eye(3)[None],
    }
    output, scores = oracle.multi_head_attention(weights, {}, x, one_hot, x)
    np.testing.assert_allclose(scores[0, 0, 0], [0.2994, 0.3321, 0.3685], atol=5e-5)
    np.testing.assert_allclose(output[0], scores[0, 0])


def test_sink_is_one_more_logit_without_a_value():
    query, key, value = heads()
    sink = draw(4, seed=3)
    output, scores = oracle.dot_product_attention(query, key, value, sink=sink)
    # By hand for one row: softmax over the logits and the sink, the sink's share lost.
    logits = query[1, 2, 3] @ key[1, :, 1].T / np.sqrt(3)
    shares = np.exp([*logits, sink[3]])
    shares /= shares.sum()
    np.testing.assert_allclose(scores[1, 3, 2], shares[:-1])
    np.testing.assert_allclose(output[1, 2, 3], shares[:-1] @ value[1, :, 1])


def test_soft_cap_bounds_the_logits_before_the_bias():
    query, key, value = heads(S=2)
    bias = np.array([0.0, 7.0])
    _, scores = oracle.dot_product_attention(
        1e6 * np.abs(query), np.abs(key), value, logit_soft_cap=2.0, bias=bias
    )
    # Both logits sit at the cap, so only the bias tells the keys apart.
    np.testing.assert_allclose(scores[..., 1], 1 / (1 + np.exp(-7.0)))


def test_query_heads_read_their_groups_keys_and_values():
    query, key, value = heads(N=4, K=2)
    grouped = oracle.dot_product_attention(query, key, value)
    full = oracle.dot_product_attention(
        query, np.repeat(key, 2, axis=2), np.repeat(value, 2, axis=2)
    )
    for one, other in zip(grouped, full, strict=True):
        np.testing.assert_allclose(one, other)


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("sink", [None, 0.0, np.array([1.0, -1.0, 0.5, 3.0])])
def test_rows_sum_to_one_less_the_sinks_share(sink):
    query, key, value = heads()
    logits = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, 2, axis=2)) / np.sqrt(3)
    total = np.exp(logits).sum(-1)
    lost = 0.0 if sink is None else np.broadcast_to(np.exp(sink), (4,))[None, :, None]
    _, scores = oracle.dot_product_attention(query, key, value, sink=sink)
    np.testing.assert_allclose(scores.sum(-1), total / (total + lost))


def test_masked_key_gets_no_weight_and_changes_nothing():
    query, key, value = heads(S=4)
    mask = np.array([True, False, True, True])
    output, scores = oracle.dot_product_attention(query, key, value, mask=mask)
    assert (scores[..., 1] == 0).all()
    key[:, 1], value[:, 1] = 1e3, 1e3
    again, _ = oracle.dot_product_attention(query, key, value, mask=mask)
    np.testing.assert_array_equal(output, again)


def test_bias_of_minus_infinity_is_a_mask():
    query, key, value = heads()
    visible = draw(2, 4, 3, 4) > 0
    visible[0, 0, 0] = False
    bias = np.where(visible, 0.0, -np.inf)
    by_bias = oracle.dot_product_attention(query, key, value, bias=bias)
    by_mask = oracle.dot_product_attention(query, key, value, mask=visible)
    for one, other in zip(by_bias, by_mask, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sink", [None, 0.0])
def test_row_that_sees_nothing_is_zero_and_has_no_gradient(sink):
    query, key, value = heads()
    mask = np.ones((2, 1, 3, 4), dtype=bool)
    mask[1, :, 2] = False
    bias = np.zeros((2, 4, 3, 4))
    output, scores = oracle.dot_product_attention(
        query, key, value, mask=mask, sink=sink, bias=bias
    )
    assert (output[1, 2] == 0).all()
    assert (scores[1, :, 2] == 0).all()
    assert (output[1, 1] != 0).all()
    found = oracle.dot_product_attention_gradients(
        query,
        key,
        value,
        mask=mask,
        sink=sink,
        bias=bias,
        output_cotangent=np.ones_like(output),
    )
    assert all(np.isfinite(gradient).all() for gradient in found.values())
    assert (found["dquery"][1, 2] == 0).all()
    assert (found["dbias"][1, :, 2] == 0).all()


def test_large_logits_do_not_overflow():
    query, key, value = heads()
    output, scores = oracle.dot_product_attention(1e5 * query, 1e5 * key, value)
    assert np.isfinite(output).all()
    np.testing.assert_allclose(scores.sum(-1), 1.0)


# ----------------------------------------------------------------------- gradients

GRADIENT_CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "mask": {"mask": draw(2, 1, 3, 4, seed=5) > 0},
    "masked rows": {"mask": np.array([True, False, True])[:, None]},
    "bias": {"bias": draw(2, 4, 3, 4)},
    "bias of one axis": {"bias": draw(4)},
    "bias a head": {"bias": draw(4, 1, 1)},
    "bias with -inf": {"bias": np.where(draw(3, 4) > 0, draw(3, 4), -np.inf)},
    "soft cap": {"logit_soft_cap": 1.5},
    "sink of zero": {"sink": 0.0},
    "sink a head": {"sink": draw(4, seed=4)},
    "dropout": {"dropout_multiplier": np.where(draw(2, 4, 3, 4) > 0, 2.0, 0.0)},
    "all": {
        "scale": 0.8,
        "mask": draw(2, 1, 3, 4, seed=5) > -0.7,
        "bias": draw(1, 4, 1, 4),
        "logit_soft_cap": 1.2,
        "sink": draw(4, seed=4),
        "dropout_multiplier": np.where(draw(2, 4, 3, 4) > -1, 1.25, 0.0),
    },
}


@pytest.mark.parametrize("through_scores", [False, True], ids=["output", "scores"])
@pytest.mark.parametrize("options", GRADIENT_CASES.values(), ids=GRADIENT_CASES.keys())
def test_gradients_are_the_differences_of_the_definition(options, through_scores):
    query, key, value = heads()
    output_cotangent = draw(2, 3, 4, 2, seed=6)
    scores_cotangent = draw(2, 4, 3, 4, seed=7) if through_scores else np.zeros(1)
    given = {"query": query, "key": key, "value": value} | {
        name: np.asarray(options[name]) for name in ("bias", "sink") if name in options
    }
    fixed = {name: x for name, x in options.items() if name not in given}

    def loss(**arrays):
        output, scores = oracle.dot_product_attention(**arrays, **fixed)
        return (output * output_cotangent).sum() + (scores * scores_cotangent).sum()

    found = oracle.dot_product_attention_gradients(
        **given,
        **fixed,
        output_cotangent=output_cotangent,
        scores_cotangent=scores_cotangent if through_scores else None,
    )
    assert set(found) == {f"d{name}" for name in given}
    for name, array in given.items():
        expected = central_differences(lambda x, n=name: loss(**given | {n: x}), array)
        np.testing.assert_allclose(found[f"d{name}"], expected, atol=1e-7, err_msg=name)


def central_differences(function, array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """(f(x + step e) - f(x - step e)) / (2 step) for each entry; 0 where x is -inf."""
    found = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        if not np.isfinite(array[index]):
            continue
        nudge = np.zeros(array.shape)
        nudge[index] = step
        found[index] = (function(array + nudge) - function(array - nudge)) / (2 * step)
    return found


# ----------------------------------------------------------------------- the layer


@pytest.fixture
def layer_weights():
    D, N, K, H, V, E = 5, 4, 2, 3, 2, 6
    shapes = {
        "query_kernel": (D, N, H),
        "query_bias": (N, H),
        "key_kernel": (D, K, H),
        "key_bias": (K, H),
        "value_kernel": (D, K, V),
        "value_bias": (K, V),
        "gate_kernel": (D, N, V),
        "gate_bias": (N, V),
        "output_kernel": (N, V, E),
        "output_bias": (E,),
        "query_norm": (H,),
        "key_norm": (H,),
        "sink": (N,),
    }
    return {
        name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())
    }


def test_layer_is_projections_around_the_attention(layer_weights):
    w = layer_weights
    x, y = draw(2, 3, 5), draw(2, 4, 5)
    output, scores = oracle.multi_head_attention(w, {}, x, y)
    # Head 3 of row 1, written out; it reads key/value head 1 of 2.
    q = x[1] @ w["query_kernel"][:, 3] + w["query_bias"][3]
    k = y[1] @ w["key_kernel"][:, 1] + w["key_bias"][1]
    s = np.exp(q @ k.T / np.sqrt(3))
    np.testing.assert_allclose(scores[1, 3], s / s.sum(-1, keepdims=True))
    # The output is the sum of the heads' outputs through their blocks of the kernel.
    total = w["output_bias"]
    for n in range(4):
        v = y[1] @ w["value_kernel"][:, n // 2] + w["value_bias"][n // 2]
        total = total + scores[1, n] @ v @ w["output_kernel"][n]
    np.testing.assert_allclose(output[1], total)


def test_output_at_a_row_that_sees_nothing_is_the_output_bias(layer_weights):
    x = draw(2, 3, 5)
    valid = np.array([[True, True, False], [True, True, True]])
    output, _ = oracle.multi_head_attention(
        layer_weights, {"use_gate": True}, x, query_mask=valid
    )
    np.testing.assert_array_equal(output[0, 2], layer_weights["output_bias"])


def test_gate_halves_the_heads_when_its_logits_are_zero(layer_weights):
    w = layer_weights | {"gate_kernel": np.zeros((5, 4, 2)), "gate_bias": None}
    x = draw(2, 3, 5)
    plain, _ = oracle.multi_head_attention(w, {}, x)
    gated, _ = oracle.multi_head_attention(w, {"use_gate": True}, x)
    bias = w["output_bias"]
    np.testing.assert_allclose(gated - bias, (plain - bias) / 2)


def test_output_kernel_of_several_axes(layer_weights):
    kernel = layer_weights["output_kernel"]
    x = draw(2, 3, 5)
    flat, _ = oracle.multi_head_attention(layer_weights, {}, x)
    split, _ = oracle.multi_head_attention(
        layer_weights
        | {
            "output_kernel": kernel.reshape(4, 2, 2, 3),
            "output_bias": layer_weights["output_bias"].reshape(2, 3),
        },
        {},
        x,
    )
    np.testing.assert_allclose(split, flat.reshape(2, 3, 2, 3))


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
def test_normalize(kind):
    x = np.array([1.0, 2.0, 3.0, -4.0])
    gain = np.array([1.0, 2.0, 3.0, 4.0])
    expected = {
        "rms": x / np.sqrt(30 / 4 + 0.1) * gain,
        "layer": (x - 0.5) / np.sqrt(29 / 4 + 0.1) * gain,
        "l2": x / np.sqrt(30),
    }
    np.testing.assert_allclose(oracle.normalize(x, kind, 0.1, gain), expected[kind])


def test_l2_norm_makes_scores_cosines_times_the_root_of_key_dim(layer_weights):
    x = draw(2, 3, 5)
    _, scores = oracle.multi_head_attention(layer_weights, {"qk_norm": "l2"}, x)
    q = x[0] @ layer_weights["query_kernel"][:, 0] + layer_weights["query_bias"][0]
    k = x[0] @ layer_weights["key_kernel"][:, 0] + layer_weights["key_bias"][0]
    cosines = (q @ k.T) / np.outer(np.linalg.norm(q, axis=1), np.linalg.norm(k, axis=1))
    s = np.exp(np.sqrt(3) * cosines)
    np.testing.assert_allclose(scores[0, 0], s / s.sum(-1, keepdims=True))


def test_combined_mask_by_hand():
    mask = oracle.combined_mask(3, 4, use_causal_mask=True, sliding_window=2)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    np.testing.assert_array_equal(mask[0, 0], np.array(expected, dtype=bool))
    mask = oracle.combined_mask(
        2,
        3,
        query_mask=np.array([[1, 0]]),
        value_mask=np.array([[1, 1, 0]]),
        key_mask=np.array([[0, 1, 1]]),
    )
    np.testing.assert_array_equal(mask[0, 0], [[False, True, False], [False] * 3])
    mask = oracle.combined_mask(
        2, 3, segment_ids=(np.array([[0, 7]]), np.array([[7, 0, 7]]))
    )
    np.testing.assert_array_equal(
        mask[0, 0], [[False, True, False], [True, False, True]]
    )


def test_rank_three_mask_is_batch_first():
    per_batch = draw(2, 2, 3) > 0
    mask = oracle.combined_mask(2, 3, attention_mask=per_batch)
    assert mask.shape == (2, 1, 2, 3)
    np.testing.assert_array_equal(mask[:, 0], per_batch)
