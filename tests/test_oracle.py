"""The definition that all else is measured against, measured by itself.

Worked numbers, properties that follow from the formulas, and the derivatives by hand
against central differences. No backend runs here.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle

pytestmark = pytest.mark.once


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


# ----------------------------------------------------------------------- positions

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 2.0,
    "original_max_position_embeddings": 8,
}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "llama3": LLAMA3,
}


def test_rotary_by_hand():
    # Position 3, max_wavelength 100: pair 0 turns by 3, pair 1 by 3 * 100^(-2/4) = 0.3.
    x = np.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
    c, s, c_slow, s_slow = np.cos(3), np.sin(3), np.cos(0.3), np.sin(0.3)
    halves = oracle.rotary(x, np.array([3]), max_wavelength=100.0)
    np.testing.assert_allclose(
        halves[0, 0, 0],
        [
            c - 3 * s,
            2 * c_slow - 4 * s_slow,
            s + 3 * c,
            2 * s_slow + 4 * c_slow,
        ],
    )
    neighbours = oracle.rotary(x, np.array([3]), max_wavelength=100.0, interleaved=True)
    np.testing.assert_allclose(
        neighbours[0, 0, 0],
        [
            c - 2 * s,
            s + 2 * c,
            3 * c_slow - 4 * s_slow,
            3 * s_slow + 4 * c_slow,
        ],
    )


def test_rotary_leaves_position_zero_and_the_features_after_rotary_dim():
    x = draw(2, 4, 3, 6)
    turned = oracle.rotary(x, rotary_dim=4)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], oracle.rotary(x[..., :4]))


def test_rotary_positions_are_the_rows_own():
    x = draw(2, 3, 1, 4)
    positions = np.array([[0, 1, 2], [5, 9, 5]])
    turned = oracle.rotary(x, positions)
    for b in range(2):
        row = oracle.rotary(x[b : b + 1], positions[b])
        np.testing.assert_array_equal(turned[b], row[0])


@given(
    scaling=st.sampled_from(list(SCALINGS)),
    interleaved=st.booleans(),
    places=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    shift=st.integers(0, 1000),
)
def test_rotated_products_know_the_difference_of_positions_alone(
    scaling, interleaved, places, shift
):
    query, key = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def product(position, other):
        turned = [
            oracle.rotary(
                x,
                np.array([p]),
                interleaved=interleaved,
                scaling=SCALINGS[scaling],
                lengths=[2001],
            )
            for x, p in [(query, position), (key, other)]
        ]
        return (turned[0] * turned[1]).sum()

    np.testing.assert_allclose(
        product(*places), product(places[0] + shift, places[1] + shift), atol=1e-9
    )


def test_linear_scaling_divides_the_positions():
    x = draw(1, 5, 2, 4)
    scaled = oracle.rotary(x, scaling={"rope_type": "linear", "factor": 4.0})
    np.testing.assert_allclose(scaled, oracle.rotary(x, np.arange(5) / 4))


def test_dynamic_scaling_by_hand():
    # f n / L - (f - 1) = 2 * 12 / 8 - 1 = 2, and d / (d - 2) = 4 / 2: the base times 4.
    frequencies, m = oracle.rotary_frequencies(4, 100.0, DYNAMIC, length=12)
    np.testing.assert_allclose(frequencies, [1.0, 400.0**-0.5])
    assert m == 1.0


def test_dynamic_scaling_begins_beyond_the_original_length():
    frequencies, _ = oracle.rotary_frequencies(4, 100.0, DYNAMIC, length=8)
    np.testing.assert_allclose(frequencies, [1.0, 0.1])


def test_dynamic_scaling_is_by_the_rows_largest_position():
    x = draw(2, 2, 1, 4)
    turned = oracle.rotary(x, np.array([[0, 7], [0, 11]]), scaling=DYNAMIC)
    np.testing.assert_allclose(turned[0], oracle.rotary(x[:1], np.array([0, 7]))[0])
    base = 10_000.0 * 4
    np.testing.assert_allclose(
        turned[1], oracle.rotary(x[1:], np.array([0, 11]), max_wavelength=base)[0]
    )


def test_yarn_by_hand():
    # In 4096 positions pair 1.309 would turn 32 times and pair 2.814 once, so the ramp
    # goes from 1 to 3: pair 2 is in the middle, and pair 3 has the factor in full.
    frequencies, m = oracle.rotary_frequencies(8, 10_000.0, YARN)
    middle = (0.01 + 0.01 / 4) / 2
    np.testing.assert_allclose(frequencies, [1.0, 0.1, middle, 0.001 / 4])
    np.testing.assert_allclose(m, 1.138629436)  # 0.1 ln 4 + 1


def test_yarn_without_truncation_by_hand():
    frequencies, _ = oracle.rotary_frequencies(8, 10_000.0, YARN | {"truncate": False})
    # 8 ln(4096 / 64 pi) / (2 ln 10^4) = 1.30892, and 2.81409 with 2 pi for 64 pi.
    share = (2 - 1.30892) / (2.81409 - 1.30892)
    middle = share * 0.01 / 4 + (1 - share) * 0.01
    np.testing.assert_allclose(frequencies, [1.0, 0.1, middle, 0.001 / 4], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.1 * np.log(4.0) + 1),
        ({"attention_factor": 0.5}, 0.5),
        ({"attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7}, 0.5),
        ({"mscale": 0.7}, 0.1 * np.log(4.0) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 0.7, "mscale_all_dim": 2.0},
            (0.07 * np.log(4.0) + 1) / (0.2 * np.log(4.0) + 1),
        ),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
    ],
    ids=str,
)
def test_yarn_attention_factor(options, expected):
    _, m = oracle.rotary_frequencies(8, 10_000.0, YARN | options)
    np.testing.assert_allclose(m, expected)


def test_yarn_attention_factor_is_on_cos_and_sin():
    x = draw(1, 3, 1, 8)
    twice = oracle.rotary(x, scaling=YARN | {"attention_factor": 2.0})
    once = oracle.rotary(x, scaling=YARN | {"attention_factor": 1.0})
    np.testing.assert_allclose(twice, 2 * once)


def test_llama3_by_hand():
    # In 8192 positions pair 2 turns 13 times, above 4; pair 3 turns 1.30380 times.
    frequencies, m = oracle.rotary_frequencies(8, 10_000.0, LLAMA3)
    share = (1.30380 - 1) / (4 - 1)
    slow = share * 0.001 + (1 - share) * 0.001 / 8
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01, slow], rtol=1e-4)
    assert m == 1.0


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_quick_pairs_are_kept_and_slow_ones_divided(name):
    scaling = SCALINGS[name]
    plain, _ = oracle.rotary_frequencies(128, 500_000.0)
    frequencies, _ = oracle.rotary_frequencies(128, 500_000.0, scaling)
    ratio = frequencies / plain
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / scaling["factor"])
    assert (np.diff(ratio) <= 1e-12).all()
    assert ((ratio > 0.2) & (ratio < 0.9)).any()


def test_axial_rotary_by_hand():
    # Pairs (0, 4), (1, 5) by the first axis, at 1 and 100^-1/2; (2, 6), (3, 7) by the
    # second, anew.
    x, ids = np.eye(8)[:4][None, :, None], np.array([[0.5, 2.0]] * 4)
    turned = oracle.axial_rotary(x, ids, max_wavelength=100.0)[0, :, 0]
    for i, angle in enumerate([0.5, 0.05, 2.0, 0.2]):
        np.testing.assert_allclose(
            turned[i, [i, i + 4]], [np.cos(angle), np.sin(angle)]
        )


def test_axial_rotary_of_shared_frequencies_by_hand():
    # Three pairs and one, at 1, 10^-1/2, 10^-1 and 10^-3/2 of their axes' coordinates.
    x, ids = np.eye(8)[::2][None, :, None], np.array([[3.0, 40.0]] * 4)
    turned = oracle.axial_rotary(
        x,
        ids,
        sections=(3, 1),
        shared_frequencies=True,
        interleaved=True,
        max_wavelength=100.0,
    )[0, :, 0]
    for i, angle in enumerate([3.0, 3 / 10**0.5, 0.3, 40 / 10**1.5]):
        pair = turned[i, [2 * i, 2 * i + 1]]
        np.testing.assert_allclose(pair, [np.cos(angle), np.sin(angle)])


def test_grid_alibi_by_hand():
    ids = np.array([[0, 0], [3, 4]])
    for distance, expected in [("manhattan", 7), ("euclidean", 5)]:
        bias = oracle.grid_alibi_bias([0.5, 2.0], ids, ids, distance)
        far = np.array([[0, expected], [expected, 0]])
        np.testing.assert_allclose(bias, [-0.5 * far, -2.0 * far])


def test_window_rows_of_the_paper():
    # Swin's for a window of 2 by 2, whose table has 3 by 3 rows.
    ids = oracle.grid(2, 2)
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    np.testing.assert_array_equal(oracle.window_rows(ids, ids, (2, 2)), expected)
    table = np.arange(9.0)[:, None] * [1, 10]
    bias = oracle.window_bias(table, ids, ids, (2, 2))
    np.testing.assert_array_equal(bias, [expected, 10 * np.array(expected)])


def test_grid_is_in_row_major_order():
    np.testing.assert_array_equal(
        oracle.grid(2, 3), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    )


def test_alibi_slopes_of_a_power_of_two():
    np.testing.assert_allclose(
        oracle.alibi_slopes(8), 1 / np.array([2, 4, 8, 16, 32, 64, 128, 256])
    )
    np.testing.assert_allclose(oracle.alibi_slopes(1), [1 / 256])
    np.testing.assert_allclose(oracle.alibi_slopes(2), [1 / 16, 1 / 256])


def test_alibi_slopes_of_other_numbers():
    # The eight of 8 heads, then those of 16 heads that lie between the first of them.
    between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(
        oracle.alibi_slopes(12), [*oracle.alibi_slopes(8), *between]
    )
    np.testing.assert_allclose(oracle.alibi_slopes(3), [1 / 16, 1 / 256, 1 / 4])
    np.testing.assert_allclose(
        oracle.alibi_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    )


def test_alibi_bias_by_hand():
    bias = oracle.alibi_bias(np.array([0.5, 2.0]), np.array([1, 4]), np.arange(3))
    distance = np.array([[1, 0, 1], [4, 3, 2]])
    np.testing.assert_array_equal(bias, [-0.5 * distance, -2.0 * distance])


def test_biases_have_a_batch_axis_if_either_side_has():
    flat, rows = np.arange(3), np.array([[0, 1, 2], [3, 4, 5]])
    slopes, table = np.array([0.5, 2.0]), draw(8, 2)
    for bias in (
        lambda i, j: oracle.alibi_bias(slopes, i, j),
        lambda i, j: oracle.relative_position_bias(table, i, j, max_distance=16),
    ):
        assert bias(flat, flat).shape == (2, 3, 3)
        assert bias(rows, flat).shape == bias(flat, rows).shape == (2, 2, 3, 3)
        np.testing.assert_array_equal(bias(rows, flat)[1], bias(rows[1], flat))
        np.testing.assert_array_equal(bias(flat, rows)[1], bias(flat, rows[1]))
        np.testing.assert_array_equal(bias(rows, rows)[1], bias(rows[1], rows[1]))


# With 4 buckets a side, 2 and up split at 2 * (16/2)^(1/2) = 5.66. With 8 buckets for
# one side, 4 and up split at 4 * (16/4)^(b/4) = 5.66, 8 and 11.3.
BUCKETS = {
    (8, 16, True): {
        **{0: 0, -1: 1, -2: 2, -5: 2, -6: 3, -15: 3, -16: 3, -1000: 3},
        **{1: 5, 2: 6, 5: 6, 6: 7, 16: 7, 1000: 7},
    },
    (8, 16, False): {
        **{0: 0, 1: 0, 1000: 0, -1: 1, -2: 2, -3: 3, -4: 4, -5: 4, -6: 5, -7: 5},
        **{-8: 6, -11: 6, -12: 7, -16: 7, -1000: 7},
    },
    # T5's own: 8 and up split at 8 * 16^(b/8) = 8 * 2^(b/2), 64 * 2^(1/2) = 90.5.
    (32, 128, True): {
        **{0: 0, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -22: 10, -23: 11},
        **{-31: 11, -32: 12, -45: 12, -46: 13, -63: 13, -64: 14, -90: 14, -91: 15},
        **{-128: 15, -5000: 15, 1: 17, 7: 23, 8: 24, 64: 30, 91: 31, 5000: 31},
    },
    # 16 and up split at 16 * 8^(b/16).
    (32, 128, False): {
        **{5: 0, 0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -20: 17, -21: 18},
        **{-112: 30, -113: 31, -128: 31, -5000: 31},
    },
    # An odd number of buckets: three of one each, four for 3 and up.
    (7, 48, False): {0: 0, -2: 2, -3: 3, -5: 3, -6: 4, -11: 4, -12: 5, -24: 6, -99: 6},
}


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "bidirectional"), BUCKETS.keys()
)
def test_relative_position_buckets_by_hand(num_buckets, max_distance, bidirectional):
    options = {
        "num_buckets": num_buckets,
        "max_distance": max_distance,
        "bidirectional": bidirectional,
    }
    expected = BUCKETS[num_buckets, max_distance, bidirectional]
    found = {d: oracle.relative_position_bucket(d, **options) for d in expected}
    assert found == expected
    # Of an array: key position - query position.
    for distance, bucket in expected.items():
        buckets = oracle.relative_position_buckets([2000], [2000 + distance], **options)
        np.testing.assert_array_equal(buckets, [[bucket]])


def test_relative_position_bias_by_hand():
    table = draw(8, 2)
    bias = oracle.relative_position_bias(
        table, np.arange(2), np.arange(3), max_distance=16
    )
    buckets = [[0, 5, 6], [1, 0, 5]]
    for n in range(2):
        np.testing.assert_array_equal(bias[n], table[:, n][buckets])


def test_relative_position_table_gradient_is_the_transpose_of_the_bias():
    gradient = draw(3, 2, 4, 5)
    places = np.array([[0, 1, 2, 3], [7, 0, 9, 1], [2, 2, 2, 2]]), np.arange(5)
    options = {"max_distance": 16, "bidirectional": False}
    found = oracle.relative_position_table_gradient(
        gradient,
        oracle.relative_position_buckets(*places, num_buckets=8, **options),
        num_buckets=8,
    )
    # The bias is linear in the table: <gradient, bias(d)> = <found, d> for any d.
    for seed in range(3):
        direction = draw(8, 2, seed=seed)
        bias = oracle.relative_position_bias(direction, *places, **options)
        np.testing.assert_allclose((gradient * bias).sum(), (found * direction).sum())


def test_positions_start_anew_where_the_segment_changes():
    ids = np.array([[4, 4, 4, 1, 1, 4], [0, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(
        oracle.restarted_positions(ids), [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    )


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


# --------------------------------------------------------- positions within the layer


@pytest.fixture
def rotary_weights(layer_weights):
    """Heads of four features, which rotary needs an even number of."""
    shapes = {"query_kernel": (5, 4, 4), "key_kernel": (5, 2, 4)}
    shapes |= {"query_bias": (4, 4), "key_bias": (2, 4), "query_norm": (4,)}
    return layer_weights | {name: draw(*shape) for name, shape in shapes.items()}


def test_rotary_comes_between_the_norm_and_the_scores(rotary_weights):
    w = rotary_weights | {"key_norm": draw(4, seed=1)}
    x = draw(2, 3, 5)
    config = {"qk_norm": "rms", "position": {"kind": "rotary", "interleaved": True}}
    _, scores = oracle.multi_head_attention(w, config, x)
    heads = {}
    for side in ("query", "key"):
        h = np.einsum("td,dnh->tnh", x[1], w[f"{side}_kernel"]) + w[f"{side}_bias"]
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * w[f"{side}_norm"]
        heads[side] = oracle.rotary(h[None], interleaved=True)[0]
    s = np.exp(heads["query"][:, 3] @ heads["key"][:, 1].T / np.sqrt(4))
    np.testing.assert_allclose(scores[1, 3], s / s.sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["alibi", "relative"])
def test_position_bias_is_added_to_the_users(layer_weights, kind):
    weights = layer_weights | {"position_table": draw(8, 4)}
    bias = draw(2, 1, 1, 4)
    x, y = draw(2, 3, 5), draw(2, 4, 5)
    places = np.arange(3), np.arange(4)
    if kind == "alibi":
        position = {"kind": "alibi"}
        added = oracle.alibi_bias([1 / 4, 1 / 16, 1 / 64, 1 / 256], *places)
    else:
        position = {"kind": "relative", "max_distance": 16}
        added = oracle.relative_position_bias(
            weights["position_table"], *places, max_distance=16
        )
    # Bounded scores, so that what the cap leaves alone can be told.
    config = {"logit_soft_cap": 0.5}
    found = oracle.multi_head_attention(
        weights, config | {"position": position}, x, y, attention_bias=bias
    )
    expected = oracle.multi_head_attention(
        weights, config, x, y, attention_bias=bias + added
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other)


def test_a_shift_of_all_positions_changes_nothing(rotary_weights):
    weights = rotary_weights | {"position_table": draw(8, 4)}
    x, y = draw(2, 3, 5), draw(2, 4, 5)
    ids = np.array([[0, 1, 2], [5, 3, 9]]), np.arange(4)
    for kind in ("rotary", "alibi", "relative"):
        config = {"position": {"kind": kind}}
        one, other, plain = (
            oracle.multi_head_attention(weights, config, x, y, position_ids=places)[0]
            for places in (ids, (ids[0] + 7, ids[1] + 7), None)
        )
        np.testing.assert_allclose(one, other)
        assert np.abs(one - plain).max() > 1e-3


def test_one_length_for_both_sides_of_dynamic_scaling(rotary_weights):
    # The keys alone go beyond the original length; the queries' frequencies follow.
    position = {"kind": "rotary"}
    x, y = draw(2, 3, 5), draw(2, 12, 5)
    dynamic, _ = oracle.multi_head_attention(
        rotary_weights, {"position": position | {"scaling": DYNAMIC}}, x, y
    )
    stretched, _ = oracle.multi_head_attention(
        rotary_weights, {"position": position | {"max_wavelength": 40_000.0}}, x, y
    )
    np.testing.assert_allclose(dynamic, stretched)


def test_packed_segments_are_as_if_alone(rotary_weights):
    weights = rotary_weights | {"position_table": draw(8, 4)}
    x = draw(1, 5, 5)
    ids = np.array([[3, 3, 1, 1, 1]])
    for kind in ("rotary", "alibi", "relative"):
        config = {"position": {"kind": kind}}
        packed, _ = oracle.multi_head_attention(weights, config, x, segment_ids=ids)
        for piece in (slice(0, 2), slice(2, 5)):
            alone, _ = oracle.multi_head_attention(weights, config, x[:, piece])
            np.testing.assert_allclose(packed[:, piece], alone)


def test_all_positions_by_hand():
    ids = np.array([[7, 7, 2]])
    shapes = (1, 3), (1, 2)
    for given_arguments, expected in [
        ({}, ([[0, 1, 2]], [[0, 1]])),
        ({"segment_ids": (ids, ids[:, 1:])}, ([[0, 1, 0]], [[0, 0]])),
        ({"position_ids": (ids, np.array([4, 5]))}, ([[7, 7, 2]], [[4, 5]])),
        (
            {"position_ids": (ids, ids[0, :2]), "segment_ids": (ids, ids[:, 1:])},
            ([[7, 7, 2]], [[7, 7]]),
        ),
    ]:
        found = oracle.all_positions(*shapes, **given_arguments)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
