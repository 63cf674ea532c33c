"""`keras_mha.dot_product_attention` against the float64 definition.

First calls drawn at random, forward and backward; then what each promise says, plainly.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mha
from keras_mha import masks
from tests import oracle
from tests.helpers import (
    backend_jit,
    only_jax,
    only_tensorflow,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

BACKEND = keras.backend.backend()
DTYPES = ["float32", "bfloat16", "float16"]
HALF_TYPES = ["bfloat16", "float16"]
# PyTorch is the backend that ships a fused kernel for every device.
FUSED = ["fused"] if BACKEND == "torch" else []
IMPLEMENTATIONS = ["auto", "blockwise", "reference", *FUSED]

# Of a half type the inputs are rounded before the definition sees them, so what is left
# is the rounding of the result and of the weights: a few units in the last place.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def assert_close(found: Any, expected: np.ndarray, dtype: str, what: str = "") -> None:
    tolerance = TOLERANCE[dtype]
    # A sum's error in a half type goes with its largest terms, not with itself.
    size = 1.0 if dtype == "float32" else max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * size, err_msg=what
    )


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def heads(B=2, T=3, S=4, N=4, K=2, H=3, V=5) -> tuple[np.ndarray, ...]:
    return draw(B, T, N, H), draw(B, S, K, H, seed=1), draw(B, S, K, V, seed=2)


def attend(query, key, value, **options):
    """The call under test on arrays; returns float64 arrays."""
    tensors = [to_tensor(x) for x in (query, key, value)]
    found = keras_mha.dot_product_attention(*tensors, **options)
    if isinstance(found, tuple):
        return tuple(to_numpy(x) for x in found)
    return to_numpy(found)


@pytest.mark.filterwarnings("error:.*softmax over axis")
def test_one_key_gets_all_the_attention_and_no_warning():
    query, key, value = heads(S=1)
    _, scores = attend(query, key, value, return_scores=True)
    # On some processors TensorFlow's softmax of one number is the last below 1.
    np.testing.assert_allclose(scores, np.ones_like(scores), rtol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_need_not_be_positive(scale, implementation):
    # Alike in heads and widths: only these does torch give to its fastest kernel.
    arrays = heads(S=3, K=4, V=3)
    found = attend(
        *arrays, scale=scale, mask=masks.Causal(), implementation=implementation
    )
    mask = np.tril(np.ones((3, 3), "bool"))
    expected, _ = oracle.dot_product_attention(*arrays, scale=scale, mask=mask)
    assert_close(found, expected, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("lowest", "masks_the_row"),
    [(-np.inf, True), (np.finfo("float32").min, True), (-1e9, False)],
)
def test_a_row_of_very_low_bias_is_masked_or_not_everywhere_alike(
    lowest, masks_the_row, implementation
):
    bias = np.zeros((3, 4))
    bias[1] = lowest
    found = attend(*heads(), bias=to_tensor(bias), implementation=implementation)
    assert np.isfinite(found).all()
    assert (found[:, 1] == 0).all() == masks_the_row


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_float32_bias_beyond_float16_stays_finite(implementation):
    bias = np.zeros((3, 4))
    bias[1, :2] = bias[2] = -1e9
    tensors = [to_tensor(x, "float16") for x in heads()]
    found = to_numpy(
        keras_mha.dot_product_attention(
            *tensors, bias=to_tensor(bias), implementation=implementation
        )
    )
    assert np.isfinite(found).all()
    assert (found != 0).all()


def test_large_segment_ids_are_told_apart():
    if BACKEND == "jax":
        pytest.skip("JAX has int64 only when told so")
    ids = to_tensor(np.array([[0, 2**32, 0]]), "int64")
    query = to_tensor(draw(1, 3, 1, 2))
    _, scores = keras_mha.dot_product_attention(
        query, query, query, mask=masks.Segments(ids), return_scores=True
    )
    scores = to_numpy(scores)
    np.testing.assert_array_equal(scores[0, 0] > 0, np.array(SAME_SEGMENT, "bool"))


SAME_SEGMENT = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has float64 only when told so")
def test_float64_keeps_its_precision():
    arrays = heads()
    tensors = [to_tensor(x, "float64") for x in arrays]
    found = keras_mha.dot_product_attention(*tensors, implementation="reference")
    expected, _ = oracle.dot_product_attention(*arrays)
    np.testing.assert_allclose(to_numpy(found), expected, atol=1e-14)


# ------------------------------------------------------------- calls drawn at random

# A shape is a word: b, t, s, n are the sizes, 1 is itself.
MASK_SHAPES = ["ts", "bts", "bnts", "1s", "t1", "1ts", "b1s", "b1ts", "b11s", "1n1s"]
BIAS_SHAPES = ["", "s", "t1", "ts", "n11", "nts", "n1s", "11ts", "b11s", "1nts", "bnts"]

# Few sizes, since a compiler starts anew for each; always some with T != S.
SPECS = {
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 3),
    "lengths": st.sampled_from([(1, 5), (4, 7), (9, 3), (5, 1), (6, 6)]),
    "heads": st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    "widths": st.sampled_from([(4, 3), (3, 5), (4, 4)]),
    "mask": st.sampled_from([None, *MASK_SHAPES]),
    "mask_dtype": st.sampled_from(["bool", "int32"]),
    "hidden_share": st.sampled_from([0.2, 0.7, 1.0]),
    "bias": st.sampled_from([None, *BIAS_SHAPES]),
    "bias_hides": st.booleans(),
    "scale": st.sampled_from([None, 0.25, 1.5]),
    "logit_soft_cap": st.sampled_from([None, 1.5, 30.0]),
    "sink": st.sampled_from([None, 0.0, 0.7, "a head"]),
    "return_scores": st.booleans(),
}
# What a backend's own kernel has no room for.
FUSED_SPECS = SPECS | {
    "logit_soft_cap": st.none(),
    "sink": st.none(),
    "return_scores": st.just(False),
}


def check_call(spec: dict[str, Any], dtype: str, implementation: str) -> None:
    """Outputs, scores and all gradients of one call against the definition."""
    rng = np.random.default_rng(spec["seed"])
    sizes = {"b": spec["batch"], "1": 1}
    sizes["t"], sizes["s"] = spec["lengths"]
    sizes["n"], sizes["k"] = spec["heads"]
    sizes["h"], sizes["v"] = spec["widths"]

    def shape(word: str) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in word)

    arrays = {
        "query": rng.normal(size=shape("btnh")),
        "key": rng.normal(size=shape("bskh")),
        "value": rng.normal(size=shape("bskv")),
    }
    options = {"scale": spec["scale"], "logit_soft_cap": spec["logit_soft_cap"]}
    mask = None
    if spec["mask"] is not None:
        mask = rng.uniform(size=shape(spec["mask"])) >= spec["hidden_share"]
    if spec["bias"] is not None:
        arrays["bias"] = np.asarray(rng.normal(size=shape(spec["bias"])))
        if spec["bias_hides"]:
            arrays["bias"][rng.uniform(size=arrays["bias"].shape) < 0.4] = -np.inf
    if spec["sink"] == "a head":
        arrays["sink"] = rng.normal(size=sizes["n"])
    elif spec["sink"] is not None:
        options["sink"] = spec["sink"]

    arrays = {name: rounded(array, dtype) for name, array in arrays.items()}
    cotangents = [rounded(rng.normal(size=shape("btnv")), dtype)]
    if spec["return_scores"]:
        cotangents.append(rounded(rng.normal(size=shape("bnts")), dtype))

    def function(*tensors):
        return keras_mha.dot_product_attention(
            **dict(zip(arrays, tensors, strict=True)),
            mask=None if mask is None else to_tensor(mask, spec["mask_dtype"]),
            return_scores=spec["return_scores"],
            implementation=implementation,
            **options,
        )

    found, found_gradients = outputs_and_gradients(
        function, list(arrays.values()), cotangents, dtype
    )
    everything = arrays | options
    if mask is not None:
        everything["mask"] = oracle.head_first(mask)
    expected = oracle.dot_product_attention(**everything)
    expected_gradients = oracle.dot_product_attention_gradients(
        **everything,
        output_cotangent=cotangents[0],
        scores_cotangent=cotangents[1] if spec["return_scores"] else None,
    )
    assert len(found) == len(cotangents)
    for array, other, what in zip(found, expected, ["output", "scores"], strict=False):
        assert_close(array, other, dtype, what)
    for name, gradient in zip(arrays, found_gradients, strict=True):
        assert_close(gradient, expected_gradients[f"d{name}"], dtype, f"d{name}")


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@given(spec=st.fixed_dictionaries(SPECS))
def test_any_call(implementation, spec):
    check_call(spec, "float32", implementation)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@settings(max_examples=settings().max_examples // 2)
@given(spec=st.fixed_dictionaries(SPECS))
def test_any_call_in_a_half_type(dtype, spec):
    check_call(spec, dtype, "auto")


@settings(max_examples=settings().max_examples // 2)
@pytest.mark.parametrize("dtype", DTYPES)
@given(spec=st.fixed_dictionaries(SPECS | {"return_scores": st.just(False)}))
def test_any_call_in_tiles(dtype, spec):
    check_call(spec, dtype, "blockwise")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", FUSED)
@given(spec=st.fixed_dictionaries(FUSED_SPECS))
def test_any_call_that_a_fused_kernel_can_run(implementation, dtype, spec):
    check_call(spec, dtype, implementation)


# ------------------------------------------------------------------- asking for scores

SCORE_CASES = {
    "plain": {},
    "hidden keys": {"mask": draw(2, 3, 4, seed=3) > 0},
    "hidden rows": {"mask": np.array([[True], [False], [True]])},
    "bias": {"bias": draw(4, 3, 4)},
    "bias that hides a row": {"bias": np.array([[0.0], [-np.inf], [1.0]])},
    "soft cap": {"logit_soft_cap": 1.5},
    "sink": {"sink": 0.0},
}


def as_options(case: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    kinds = {"mask": "bool", "bias": dtype, "sink": dtype}
    return {
        name: to_tensor(x, kinds[name]) if isinstance(x, np.ndarray) else x
        for name, x in case.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SCORE_CASES.values(), ids=SCORE_CASES.keys())
def test_asking_for_scores_never_changes_the_output(case, dtype):
    tensors = [to_tensor(x, dtype) for x in heads()]
    options = as_options(case, dtype)
    output = keras_mha.dot_product_attention(*tensors, **options)
    same, _ = keras_mha.dot_product_attention(*tensors, return_scores=True, **options)
    if dtype == "float32":
        np.testing.assert_allclose(to_numpy(output), to_numpy(same), atol=1e-6)
    else:
        assert_close(to_numpy(output), to_numpy(same), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_scores_come_in_the_dtype_of_the_inputs(dtype):
    tensors = [to_tensor(x, dtype) for x in heads()]
    for x in keras_mha.dot_product_attention(*tensors, return_scores=True):
        assert keras.backend.standardize_dtype(x.dtype) == dtype


def test_scores_with_a_sink_sum_to_less_than_one():
    _, scores = attend(*heads(), sink=0.0, return_scores=True)
    assert (scores.sum(-1) < 1 - 1e-3).all()


# ------------------------------------------------------------------ fully masked rows

HIDING_ROW_1 = {
    "by a mask": {"mask": np.array([[True], [False], [True]])},
    "by a mask a batch row": {"mask": np.array([[[True], [False], [True]]] * 2)},
    "by a bias": {"bias": np.array([[0.0], [-np.inf], [1.0]])},
    "by a mask and a bias": {
        "mask": np.arange(12).reshape(3, 4) != 5,
        "bias": np.array([[0.0] * 4, [-np.inf, 0.0, -np.inf, -np.inf], [0.0] * 4]),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", HIDING_ROW_1.values(), ids=HIDING_ROW_1.keys())
def test_fully_masked_row_is_zero_with_zero_gradients(case, implementation, dtype):
    check_that_row_1_is_zero(case, dtype, implementation=implementation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_fully_masked_row_with_a_sink_is_zero_with_zero_gradients(
    implementation, dtype
):
    case = HIDING_ROW_1["by a mask and a bias"]
    check_that_row_1_is_zero(case, dtype, sink=0.0, implementation=implementation)


def check_that_row_1_is_zero(case: dict[str, Any], dtype: str, **options: Any) -> None:
    bias = case.get("bias", np.zeros((3, 4)))
    mask = to_tensor(case.get("mask", np.ones((3, 4), dtype=bool)))

    def function(query, key, value, bias):
        return keras_mha.dot_product_attention(
            query, key, value, bias=bias, mask=mask, **options
        )

    (output,), gradients = outputs_and_gradients(
        function, [*heads(), bias], [draw(2, 3, 4, 5)], dtype
    )
    assert (output[:, 1] == 0).all()
    assert (output[:, [0, 2]] != 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    dquery, _, _, dbias = gradients
    assert (dquery[:, 1] == 0).all()
    assert (dquery[:, [0, 2]] != 0).any()
    assert (dbias[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_call_in_which_nobody_sees_anything(implementation, dtype):
    def function(query, key, value):
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            mask=to_tensor(np.zeros((3, 4), dtype=bool)),
            implementation=implementation,
        )

    (output,), gradients = outputs_and_gradients(
        function, heads(), [draw(2, 3, 4, 5)], dtype
    )
    assert (output == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_a_fully_masked_row_are_zero(dtype):
    tensors = [to_tensor(x, dtype) for x in heads()]
    mask = to_tensor(np.array([[True], [False], [True]]))
    _, scores = keras_mha.dot_product_attention(*tensors, mask=mask, return_scores=True)
    assert (to_numpy(scores)[:, :, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_with_one_visible_key_copies_its_value(implementation, dtype):
    query, key, value = heads()
    tensors = [to_tensor(x, dtype) for x in (query, key, value)]
    output = keras_mha.dot_product_attention(
        *tensors,
        mask=to_tensor(np.arange(4) == np.array([[3]])),
        implementation=implementation,
    )
    for n in range(4):
        expected = np.broadcast_to(rounded(value, dtype)[:, 3:, n // 2], (2, 3, 5))
        assert_close(to_numpy(output)[:, :, n], expected, dtype)


# ------------------------------------------------------------------- number formats


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_logits_beyond_its_range(implementation):
    # q . k is 160000 and more; the largest float16 is 65504.
    query, key, value = (rounded(x, "float16") for x in heads(H=4))
    query, key = 200.0 + query.round(), 200.0 + key.round()
    output = keras_mha.dot_product_attention(
        *(to_tensor(x, "float16") for x in (query, key, value)),
        implementation=implementation,
    )
    expected, _ = oracle.dot_product_attention(query, key, value)
    assert_close(to_numpy(output), expected, "float16")


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_bfloat16_scores_are_worked_out_in_float32(implementation):
    # Logits near 100 that differ by less than bfloat16's step of 0.5 there.
    query = np.full((1, 1, 1, 1), 16.0)
    key = np.array([6.25, 6.2578125 - 0.0078125, 6.28125, 6.3125]).reshape(1, 4, 1, 1)
    value = np.eye(4).reshape(1, 4, 1, 4)
    output = keras_mha.dot_product_attention(
        *(to_tensor(x, "bfloat16") for x in (query, key, value)),
        implementation=implementation,
    )
    expected, _ = oracle.dot_product_attention(query, rounded(key, "bfloat16"), value)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(to_numpy(output), expected, rtol=2**-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_float32_logits_do_not_overflow(implementation):
    query, key, value = heads()
    output = attend(1e10 * query, 1e10 * key, value, implementation=implementation)
    expected, _ = oracle.dot_product_attention(1e10 * query, 1e10 * key, value)
    assert_close(output, expected, "float32")


# --------------------------------------------------------------------- mask objects

i, j = np.arange(3)[:, None], np.arange(4)[None, :]
VALID = np.array([[True, True, False, True], [False, True, True, True]])
QUERY_IDS, KEY_IDS = np.array([[0, 0, 1], [5, 2, 2]]), np.array([[0, 1, 1, 1], [5] * 4])
DENSE = draw(2, 1, 3, 4) > 0
SEGMENTS = (QUERY_IDS[:, :, None] == KEY_IDS[:, None, :])[:, None]
PADDING = VALID[:, None, None, :]


class Strided(masks.Mask):
    """A user's own mask, by positions alone."""

    def allowed(self, rows, columns):
        return (rows - columns) % 2 == 0


MASK_OBJECTS = {
    "causal": (lambda: masks.Causal(), j <= i),
    "causal with offset": (lambda: masks.Causal(offset=1), j <= i + 1),
    "causal with negative offset": (lambda: masks.Causal(offset=-2), j <= i - 2),
    "window": (lambda: masks.SlidingWindow(2), np.abs(i - j) < 2),
    "padding": (lambda: masks.Padding(to_tensor(VALID)), PADDING),
    "segments": (
        lambda: masks.Segments(to_tensor(QUERY_IDS), to_tensor(KEY_IDS)),
        SEGMENTS,
    ),
    "prefix": (lambda: masks.Prefix(2), np.broadcast_to(j < 2, (3, 4))),
    "dense": (lambda: masks.Dense(to_tensor(DENSE)), DENSE),
    "a user's own": (Strided, (i - j) % 2 == 0),
    "causal and window": (
        lambda: masks.Causal() & masks.SlidingWindow(2),
        (j <= i) & (np.abs(i - j) < 2),
    ),
    "causal or prefix": (lambda: masks.Causal() | masks.Prefix(2), (j <= i) | (j < 2)),
    "not a window": (lambda: ~masks.SlidingWindow(2), np.abs(i - j) >= 2),
    "padding and not causal": (
        lambda: masks.Padding(to_tensor(VALID)) & ~masks.Causal(),
        PADDING & ~(j <= i),
    ),
    "segments and causal or dense": (
        lambda: (
            masks.Segments(to_tensor(QUERY_IDS), to_tensor(KEY_IDS)) & masks.Causal()
            | masks.Dense(to_tensor(DENSE))
        ),
        (SEGMENTS & (j <= i)) | DENSE,
    ),
    "a user's own and a window": (
        lambda: Strided() & masks.SlidingWindow(3),
        ((i - j) % 2 == 0) & (np.abs(i - j) < 3),
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("make", "booleans"), MASK_OBJECTS.values(), ids=MASK_OBJECTS.keys()
)
def test_mask_object_equals_its_booleans(make, booleans, implementation):
    query, key, value = heads()
    found = attend(query, key, value, mask=make(), implementation=implementation)
    as_tensor = to_tensor(np.broadcast_to(booleans, (2, 4, 3, 4)))
    same = attend(query, key, value, mask=as_tensor, implementation=implementation)
    np.testing.assert_allclose(found, same, atol=1e-6)
    expected, _ = oracle.dot_product_attention(query, key, value, mask=booleans)
    assert_close(found, expected, "float32")


class FewerThanCausal(masks.Causal):
    """A user's subclass, which hides more than its base."""

    def block(self, tile):
        even = tile.column_indices % 2 == 0
        return keras.ops.logical_and(super().block(tile), even)

    def status(self, tile):
        return "mixed"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_subclass_of_a_mask_is_not_taken_for_its_base(implementation):
    arrays = heads(S=3, K=4, V=3)
    found = attend(*arrays, mask=FewerThanCausal(), implementation=implementation)
    even = np.tril(np.ones((3, 3), "bool")) & (np.arange(3) % 2 == 0)
    expected, _ = oracle.dot_product_attention(*arrays, mask=even)
    assert_close(found, expected, "float32")


# -------------------------------------------------------------------------- dropout

RATE = 0.3


def dropped_weights(implementation: str, seed: Any, length: int = 64) -> np.ndarray:
    """The (B, N, T, S) weights after dropout: with one-hot values they are the output.

    Equal keys give every weight the size 1 / length, so that dropping shows alone.
    """
    query, key = np.ones((2, length, 4, 2)), np.ones((2, length, 4, 2))
    value = np.broadcast_to(np.eye(length)[:, None], (2, length, 4, length))
    output = attend(
        query, key, value, dropout=RATE, seed=seed, implementation=implementation
    )
    return np.moveaxis(output, 2, 1)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_dropout_with_the_same_seed_repeats_exactly(implementation):
    first = dropped_weights(implementation, seed=7)
    np.testing.assert_array_equal(first, dropped_weights(implementation, seed=7))
    assert (first != dropped_weights(implementation, seed=8)).any()


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_dropout_drops_at_its_rate_and_scales_the_rest_up(implementation):
    weights = dropped_weights(implementation, seed=1)
    kept = weights != 0
    # 32768 draws: five standard deviations are about 0.013.
    assert abs(kept.mean() - (1 - RATE)) < 0.013
    np.testing.assert_allclose(weights[kept], 1 / 64 / (1 - RATE), rtol=1e-5)
    # Each batch row, head, query and key is drawn for by itself.
    for axis in range(4):
        assert (np.diff(kept.astype(int), axis=axis) != 0).mean() > 0.3


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_dropout_keeps_the_expectation(implementation):
    weights = np.mean(
        [dropped_weights(implementation, seed, length=8) for seed in range(60)], axis=0
    )
    # Every weight has mean 1 / 8 over the 60 draws, and the mean of all is sharper.
    np.testing.assert_allclose(weights.mean(), 1 / 8, rtol=0.02)
    np.testing.assert_allclose(weights, 1 / 8, atol=0.05)


def test_dropout_leaves_the_scores_as_they_were():
    query, key, value = heads()
    _, scores = attend(query, key, value, return_scores=True)
    _, same = attend(query, key, value, return_scores=True, dropout=0.5, seed=3)
    np.testing.assert_allclose(scores, same, atol=1e-6)


def test_dropout_with_scores_asked_for_drops_the_same_weights():
    query, key, value = heads()
    output = attend(query, key, value, dropout=0.5, seed=3)
    same, _ = attend(query, key, value, dropout=0.5, seed=3, return_scores=True)
    np.testing.assert_allclose(output, same, atol=1e-6)


def test_dropout_draws_anew_from_a_generator_and_its_twin_repeats_it():
    generator = keras.random.SeedGenerator(5)
    first = dropped_weights("auto", generator, length=8)
    second = dropped_weights("auto", generator, length=8)
    assert (first != second).any()
    twin = keras.random.SeedGenerator(5)
    np.testing.assert_array_equal(first, dropped_weights("auto", twin, length=8))


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_gradients_go_through_the_weights_that_were_kept(implementation):
    query, key, _ = heads(N=2, K=2, H=3)
    one_hot = np.broadcast_to(np.eye(4)[:, None], (2, 4, 2, 4))
    cotangent = draw(2, 3, 2, 4)

    def function(query, key, value):
        return keras_mha.dot_product_attention(
            query, key, value, dropout=0.5, seed=11, implementation=implementation
        )

    (output,), gradients = outputs_and_gradients(
        function, [query, key, one_hot], [cotangent]
    )
    # With one-hot values the output shows which weights were kept.
    multiplier = np.where(np.moveaxis(output, 2, 1) != 0, 2.0, 0.0)
    assert {0.0, 2.0} == set(multiplier.flat)
    expected = oracle.dot_product_attention_gradients(
        query, key, one_hot, dropout_multiplier=multiplier, output_cotangent=cotangent
    )
    for name, gradient in zip(["dquery", "dkey", "dvalue"], gradients, strict=True):
        assert_close(gradient, expected[name], "float32", name)


# ------------------------------------------------------------------------- compiled

XLA = [False, True] if BACKEND == "tensorflow" else [False]
COMPILED_CASES = {
    "plain": ({}, {}),
    "causal": (
        {"mask": lambda q, k: masks.Causal()},
        {"mask": lambda T, S: np.arange(S) <= np.arange(T)[:, None]},
    ),
    "window": (
        {"mask": lambda q, k: masks.Causal() & masks.SlidingWindow(2)},
        {
            "mask": lambda T, S: (
                (np.arange(S) <= np.arange(T)[:, None])
                & (np.arange(T)[:, None] - np.arange(S) < 2)
            )
        },
    ),
    "sink and cap": ({"sink": 0.0, "logit_soft_cap": 2.0},) * 2,
    "hidden rows": (
        {"mask": lambda q, k: masks.Causal(offset=-1)},
        {"mask": lambda T, S: np.arange(S) <= np.arange(T)[:, None] - 1},
    ),
}


def resolve(options: dict[str, Any], *arguments: Any) -> dict[str, Any]:
    return {n: x(*arguments) if callable(x) else x for n, x in options.items()}


@pytest.mark.parametrize("xla", XLA)
@pytest.mark.parametrize("implementation", ["auto", "blockwise"])
@pytest.mark.parametrize("case", COMPILED_CASES.values(), ids=COMPILED_CASES.keys())
def test_compiled_call(case, implementation, xla):
    ours, theirs = case

    def function(query, key, value):
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            implementation=implementation,
            **resolve(ours, query, key),
        )

    arrays, cotangent = heads(), draw(2, 3, 4, 5)
    (output,), gradients = outputs_and_gradients(
        backend_jit(function, xla=xla), arrays, [cotangent]
    )
    options = resolve(theirs, 3, 4)
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    assert_close(output, expected, "float32")
    expected = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=cotangent, **options
    )
    for name, gradient in zip(["dquery", "dkey", "dvalue"], gradients, strict=True):
        assert_close(gradient, expected[name], "float32", name)


@pytest.mark.parametrize("xla", XLA)
def test_compiled_call_with_mask_bias_and_sink_as_arguments(xla):
    def function(query, key, value, mask, bias, sink):
        return keras_mha.dot_product_attention(
            query, key, value, mask=mask, bias=bias, sink=sink, return_scores=True
        )

    arrays = heads()
    mask, bias, sink = draw(2, 3, 4) > 0, draw(4, 1, 4), draw(4)
    tensors = [to_tensor(x) for x in (*arrays, mask, bias, sink)]
    found = backend_jit(function, xla=xla)(*tensors)
    expected = oracle.dot_product_attention(
        *arrays, mask=mask[:, None], bias=bias, sink=sink
    )
    for x, y in zip(found, expected, strict=True):
        assert_close(to_numpy(x), y, "float32")


@only_tensorflow
@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("implementation", ["auto", "blockwise"])
@pytest.mark.parametrize("case", COMPILED_CASES.values(), ids=COMPILED_CASES.keys())
def test_tf_function_with_dynamic_batch_and_lengths(case, implementation, xla):
    import tensorflow as tf

    ours, theirs = case

    @tf.function(
        jit_compile=xla,
        input_signature=[
            tf.TensorSpec((None, None, 4, 3)),
            tf.TensorSpec((None, None, 2, 3)),
            tf.TensorSpec((None, None, 2, 5)),
        ],
    )
    def function(query, key, value):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            output = keras_mha.dot_product_attention(
                query,
                key,
                value,
                implementation=implementation,
                **resolve(ours, query, key),
            )
        return output, tape.gradient(output, [query, key, value])

    for batch, queries, keys in [(2, 3, 4), (1, 6, 2)]:
        arrays = heads(batch, queries, keys)
        output, gradients = function(*(to_tensor(x) for x in arrays))
        options = resolve(theirs, queries, keys)
        expected, _ = oracle.dot_product_attention(*arrays, **options)
        assert_close(to_numpy(output), expected, "float32")
        expected = oracle.dot_product_attention_gradients(
            *arrays, output_cotangent=np.ones(output.shape), **options
        )
        for name, gradient in zip(["dquery", "dkey", "dvalue"], gradients, strict=True):
            assert_close(to_numpy(gradient), expected[name], "float32", name)


@only_jax
@pytest.mark.parametrize("implementation", ["auto", "blockwise"])
def test_under_vmap(implementation):
    import functools

    import jax

    arrays = heads()
    stacked = [to_tensor(np.stack([x, 2 * x])) for x in arrays]
    function = functools.partial(
        keras_mha.dot_product_attention, implementation=implementation
    )
    output = jax.vmap(function)(*stacked)
    for factor, found in zip([1, 2], output, strict=True):
        expected, _ = oracle.dot_product_attention(*(factor * x for x in arrays))
        assert_close(to_numpy(found), expected, "float32")


# ------------------------------------------------------------------------- symbolic


@pytest.mark.parametrize("lengths", [(3, 4), (None, None), (3, None)])
@pytest.mark.parametrize("batch", [2, None])
def test_symbolic_shapes_and_dtypes(batch, lengths):
    queries, keys = lengths
    output, scores = keras_mha.dot_product_attention(
        keras.KerasTensor((batch, queries, 4, 3), dtype="bfloat16"),
        keras.KerasTensor((batch, keys, 2, 3), dtype="bfloat16"),
        keras.KerasTensor((batch, keys, 2, 5), dtype="bfloat16"),
        return_scores=True,
    )
    assert output.shape == (batch, queries, 4, 5)
    assert scores.shape == (batch, 4, queries, keys)
    assert output.dtype == scores.dtype == "bfloat16"


def test_symbolic_call_without_scores_gives_one_tensor():
    output = keras_mha.dot_product_attention(
        keras.KerasTensor((2, 3, 4, 3)),
        keras.KerasTensor((2, 6, 1, 3)),
        keras.KerasTensor((2, 6, 1, 7)),
        mask=masks.Causal(),
    )
    assert isinstance(output, keras.KerasTensor)
    assert output.shape == (2, 3, 4, 7)


def test_functional_model():
    query = keras.Input((None, 4, 3))
    key = keras.Input((None, 2, 3))
    value = keras.Input((None, 2, 5))
    outputs = keras_mha.dot_product_attention(
        query, key, value, mask=masks.Causal(offset=1), sink=0.0, return_scores=True
    )
    model = keras.Model([query, key, value], outputs)
    arrays = heads()
    found = model([to_tensor(x) for x in arrays])
    expected = oracle.dot_product_attention(*arrays, mask=j <= i + 1, sink=0.0)
    for x, y in zip(found, expected, strict=True):
        assert_close(to_numpy(x), y, "float32")


def test_functional_model_with_mask_and_bias_as_inputs():
    inputs = {
        "query": keras.Input((3, 4, 3)),
        "key": keras.Input((4, 2, 3)),
        "value": keras.Input((4, 2, 5)),
        "mask": keras.Input((3, 4), dtype="bool"),
        "bias": keras.Input((4, 3, 4)),
    }
    output = keras_mha.dot_product_attention(**inputs)
    model = keras.Model(list(inputs.values()), output)
    query, key, value = heads()
    mask, bias = draw(2, 3, 4) > 0, draw(2, 4, 3, 4)
    arrays = [query, key, value, mask, bias]
    output = model([to_tensor(x) for x in arrays])
    expected, _ = oracle.dot_product_attention(
        query, key, value, mask=mask[:, None], bias=bias
    )
    assert_close(to_numpy(output), expected, "float32")
