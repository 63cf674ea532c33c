"""The rows' sums that attention returns, and what they are for: parts are joined."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends, row_chunks, tiling
from tests import oracle
from tests.helpers import (
    backend_jit,
    call_at_once,
    outputs_and_gradients,
    to_numpy,
    to_tensor,
)

BACKEND = keras.backend.backend()

B, T, S, N, K, H, V = 2, 7, 9, 4, 2, 3, 5
RNG = np.random.default_rng(0)
QUERY, KEY = RNG.normal(size=(B, T, N, H)), RNG.normal(size=(B, S, K, H))
VALUE = RNG.normal(size=(B, S, K, V))
HEADS = [QUERY, KEY, VALUE]
DENSE = RNG.uniform(size=(B, N, T, S)) < 0.6
DENSE[0, :, 4] = False  # a row that sees nothing
BIAS = RNG.normal(size=(1, N, 1, S))

CALLS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "mask": {"mask": DENSE},
    "bias": {"bias": BIAS, "mask": DENSE},
    "sink": {"sink": RNG.normal(size=N), "mask": DENSE},
    "cap": {"logit_soft_cap": 1.5},
    "talking heads": {"talking_heads": (RNG.normal(size=(N, N)), None)},
}


@pytest.fixture(params=["at once", "some rows at a time"])
def implementation(request, monkeypatch):
    if request.param == "at once":
        return "reference"
    monkeypatch.setattr(tiling, "_MULTIPLE", 2)
    monkeypatch.setattr(row_chunks, "AT_ONCE", 2 * B * N * S)
    monkeypatch.setattr(backends.current(), "FEW_SCORES", 1)
    return "auto"


def attend(*heads, implementation="reference", **options):
    options = {
        name: to_tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }
    return keras_mha.dot_product_attention(
        *heads, return_lse=True, implementation=implementation, **options
    )


@pytest.mark.parametrize("name", CALLS)
def test_the_sums_of_rows_are_those_of_the_definition(name, implementation):
    options = CALLS[name]
    heads = [to_tensor(x) for x in HEADS]
    output, lse = call_at_once(
        lambda *heads: attend(*heads, implementation=implementation, **options), heads
    )
    expected, _ = oracle.dot_product_attention(*HEADS, **options)
    np.testing.assert_allclose(to_numpy(output), expected, rtol=1e-5, atol=1e-5)
    expected = oracle.log_sums(QUERY, KEY, **options)
    np.testing.assert_allclose(to_numpy(lse), expected, rtol=1e-5, atol=1e-5)
    if "mask" in options and "sink" not in options:
        assert np.isneginf(expected[0, :, 4]).all()


def test_dropout_drops_weights_and_no_part_of_the_sums(implementation):
    heads = [to_tensor(x) for x in HEADS]
    options = {"implementation": implementation, "dropout": 0.5, "seed": 1}
    _, lse = attend(*heads, **options)
    np.testing.assert_allclose(to_numpy(lse), oracle.log_sums(QUERY, KEY), atol=1e-5)


def test_gradients_of_the_sums_are_those_of_the_definition(implementation):
    cotangent = RNG.normal(size=(B, N, T))
    others = {"bias": BIAS, "sink": RNG.normal(size=N), "mask": DENSE}

    def definition(query, key):
        return (oracle.log_sums(query, key, **others) * cotangent).sum()

    _, found = outputs_and_gradients(
        lambda *heads: attend(*heads, implementation=implementation, **others),
        HEADS,
        [None, cotangent],
    )
    for place, gradient in enumerate(found[:2]):
        direction = RNG.normal(size=HEADS[place].shape)
        moved = [list(HEADS[:2]), list(HEADS[:2])]
        for arrays, step in zip(moved, (1e-5, -1e-5), strict=True):
            arrays[place] = arrays[place] + step * direction
        ahead, behind = (definition(*arrays) for arrays in moved)
        expected = (ahead - behind) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-4)
    assert not found[2].any()  # of the value


def test_a_row_that_sees_nothing_has_no_gradient(implementation):
    sees_nothing = np.isneginf(oracle.log_sums(QUERY, KEY, mask=DENSE))
    _, (query, *_) = outputs_and_gradients(
        lambda *heads: attend(*heads, implementation=implementation, mask=DENSE),
        HEADS,
        [None, sees_nothing.astype("float64")],
    )
    assert not query.any()  # nor NaN


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sums_of_half_types_are_float32(dtype, implementation):
    heads = [to_tensor(x, dtype) for x in HEADS]
    output, lse = attend(*heads, implementation=implementation)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert keras.backend.standardize_dtype(lse.dtype) == "float32"
    exact = [to_numpy(x) for x in heads[:2]]
    np.testing.assert_allclose(to_numpy(lse), oracle.log_sums(*exact), atol=2e-5)


@pytest.mark.parametrize("xla", [False, True] if BACKEND == "tensorflow" else [False])
def test_compiled(xla, implementation):
    def function(*heads):
        return attend(*heads, implementation=implementation, mask=masks.Causal())

    heads = [to_tensor(x, "bfloat16") for x in HEADS]
    found = backend_jit(function, xla=xla)(*heads)
    expected = attend(*heads, mask=masks.Causal())
    for one, two, tolerance in zip(found, expected, (2e-2, 1e-5), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(to_numpy(one), to_numpy(two), atol=tolerance)


def test_they_come_after_the_scores():
    heads = [to_tensor(x) for x in HEADS]
    output, scores, lse = attend(*heads, return_scores=True)
    assert [len(x.shape) for x in (output, scores, lse)] == [4, 4, 3]


def test_shapes_are_known_beforehand():
    inputs = [keras.Input(x.shape[1:]) for x in HEADS]
    output, lse = keras_mha.dot_product_attention(*inputs, return_lse=True)
    merged = keras_mha.merge_attention([(output, lse), (output, lse)])
    assert [x.shape for x in merged] == [(None, T, N, V), (None, N, T)]
    model = keras.Model(inputs, merged)
    found, expected = (
        model([to_tensor(x) for x in HEADS]),
        attend(*map(to_tensor, HEADS)),
    )
    np.testing.assert_allclose(to_numpy(found[0]), to_numpy(expected[0]), atol=1e-6)
    doubled = to_numpy(expected[1]) + np.log(2)
    np.testing.assert_allclose(to_numpy(found[1]), doubled, atol=1e-5)


# ------------------------------------------------------------------------- parts

PARTS = (slice(0, 2), slice(2, 8), slice(8, 9))


def in_parts(query, key, value):
    parts = [
        attend(query, key[:, part], value[:, part], mask=DENSE[..., part])
        for part in PARTS
    ]
    first = keras_mha.merge_attention(parts[:2])
    return keras_mha.merge_attention([first, parts[2]])


def test_parts_are_joined_to_what_one_call_gives_and_so_are_gradients():
    """Some rows see nothing in a part, one in no part."""
    cotangents = [RNG.normal(size=(B, T, N, V)), RNG.normal(size=(B, N, T))]
    cotangents[1][0, :, 4] = 0.0  # of minus infinity
    results = [
        outputs_and_gradients(function, HEADS, cotangents)
        for function in (in_parts, lambda *heads: attend(*heads, mask=DENSE))
    ]
    for one, two in zip(*(outputs + found for outputs, found in results), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    assert not results[0][0][0][0, 4].any()


def test_one_part_is_left_as_it_is():
    part = attend(*map(to_tensor, HEADS), mask=masks.Causal())
    for one, two in zip(keras_mha.merge_attention([part]), part, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(two), atol=1e-6)


def test_large_logits_do_not_overflow():
    parts = [attend(to_tensor(QUERY * 1e4), *map(to_tensor, HEADS[1:]))] * 2
    output, lse = keras_mha.merge_attention(parts)
    np.testing.assert_allclose(to_numpy(output), to_numpy(parts[0][0]), rtol=1e-4)
    assert np.isfinite(to_numpy(lse)).all()
