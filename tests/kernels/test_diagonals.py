"""Biases that follow from the distance, given to torch's CPU kernel as views."""

from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import biases, masks
from keras_mha.biases import ByDistance, Positions, Slopes
from tests import oracle
from tests.helpers import (
    backend_jit,
    only_torch,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

pytestmark = only_torch

SLOPES = 2.0, 0.5, 0.1, 0.01
MOST = 10  # the distance from which on all share a number
# B, T, S, N, K, H, V
SHAPES = {
    "as many keys, grouped heads": (2, 77, 77, 4, 2, 8, 8),
    "more keys, narrow values": (1, 70, 93, 4, 4, 8, 5),
    "more queries, wide values": (2, 93, 40, 4, 1, 8, 11),
    "few keys": (1, 50, 3, 4, 4, 8, 8),
}


@pytest.fixture
def taken(monkeypatch):
    """What was attended to this way, from now on; slices are small."""
    from keras_mha.kernels.torch_kernels import diagonal_gradients, diagonals, sdpa

    monkeypatch.setattr(sdpa, "_WHOLE", 0)
    monkeypatch.setattr(diagonals, "_ROWS", 16)
    monkeypatch.setattr(diagonals, "_STEP", 8)
    monkeypatch.setattr(diagonal_gradients, "_ROWS", 16)
    calls, attend = [], diagonals.attend

    def recorded(call, *tensors):
        calls.append(call)
        return attend(call, *tensors)

    monkeypatch.setattr(diagonals, "attend", recorded)
    return calls


def drawn(shape, seed=0):
    """Arrays for query, key, value and the output's gradient."""
    B, T, S, N, K, H, V = shape
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V)
    return [rng.normal(size=each) for each in shapes]


def distances(shape):
    return np.arange(shape[2]) - np.arange(shape[1])[:, None]


def causal_or_not(is_causal, shape):
    """The mask, and its booleans."""
    if not is_causal:
        return None, None
    return masks.Causal(), distances(shape) <= 0


def spread(values, shape):
    """What the oracle adds for values of the distances, (N, T, S)."""
    most = values.shape[1] // 2
    return values[:, np.clip(distances(shape), -most, most) + most]


def gathered(d_bias, values, shape):
    """The gradient of the values, given that of what is added."""
    most = values.shape[1] // 2
    found = np.zeros(values.shape)
    place = np.clip(distances(shape), -most, most) + most
    for head, added in enumerate(d_bias.sum(0)):
        np.add.at(found[head], place, added)
    return found


def check(found, expected, tolerance=1e-5):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        size = max(1.0, np.abs(other).max())
        message = f"result {number}"
        np.testing.assert_allclose(
            one / size, other / size, atol=tolerance, rtol=0, err_msg=message
        )


def check_attention(
    shape,
    is_causal,
    values=None,
    dtype="float32",
    tolerance=1e-5,
    wrap=lambda function: function,
):
    """Output and gradients against the definition: of ALiBi, or of given values, which
    are trained."""
    *arrays, cotangent = (rounded(x, dtype) for x in drawn(shape))
    mask, booleans = causal_or_not(is_causal, shape)
    if values is None:
        inputs, bias = arrays, -np.array(SLOPES)[:, None, None] * abs(distances(shape))
    else:
        values = rounded(values, dtype)
        inputs, bias = [*arrays, values], spread(values, shape)

    def function(query, key, value, *trained):
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            position_bias=ByDistance(*trained) if trained else Slopes(SLOPES),
            implementation="fused",
        )

    (output,), gradients = outputs_and_gradients(
        wrap(function), inputs, [cotangent], dtype
    )
    batch, rows, columns, heads = shape[:4]
    bias = np.broadcast_to(bias, (batch, heads, rows, columns))
    options = {"mask": booleans, "bias": bias}
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    by_name = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=cotangent, **options
    )
    expected = [expected, by_name["dquery"], by_name["dkey"], by_name["dvalue"]]
    if values is not None:
        expected.append(gathered(by_name["dbias"], values, shape))
    check([output, *gradients], expected, tolerance)


def values_of(seed=1, most=MOST):
    return np.random.default_rng(seed).normal(size=(4, 2 * most + 1))


VALUES = {
    "alibi": None,
    "trained": values_of(),
    "trained, and none far": values_of(most=100),
    "trained, and all far": values_of(most=0),
    "trained, and next ones far": values_of(most=1),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(shape, values, is_causal, taken):
    check_attention(shape, is_causal, values)
    assert taken


@pytest.mark.parametrize("values", [None, values_of()], ids=["alibi", "trained"])
def test_compiled(values, taken):
    shape = SHAPES["as many keys, grouped heads"]
    check_attention(shape, True, values, wrap=backend_jit)
    assert taken


@pytest.mark.parametrize("values", [None, values_of()], ids=["alibi", "trained"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float64", 1e-6)]
)
def test_other_types(dtype, tolerance, values, taken):
    shape = SHAPES["as many keys, grouped heads"]
    check_attention(shape, True, values, dtype, tolerance)
    assert taken


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_heads_share_a_call_where_there_are_many_threads(threads, taken, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check_attention(SHAPES["more keys, narrow values"], True)
    assert taken


@pytest.mark.parametrize("values", [None, values_of()], ids=["alibi", "trained"])
def test_a_gradient_can_be_differentiated_again(values, taken):
    import torch

    shape = SHAPES["as many keys, grouped heads"]
    *arrays, cotangent = drawn(shape)

    def second(implementation):
        arrays_given = arrays if values is None else [*arrays, values]
        tensors = [to_tensor(x).requires_grad_() for x in arrays_given]
        bias = Slopes(SLOPES) if values is None else ByDistance(tensors[3])
        output = keras_mha.dot_product_attention(
            *tensors[:3],
            mask=masks.Causal(),
            position_bias=bias,
            implementation=implementation,
        )
        gradient = to_tensor(cotangent)
        found = torch.autograd.grad(output, tensors, gradient, create_graph=True)
        total = sum((x * x).sum() for x in found)
        return [to_numpy(x) for x in torch.autograd.grad(total, tensors)]

    check(second("fused"), second("reference"))
    assert taken


def test_numbers_are_the_same_where_the_operators_are_not_there(taken, monkeypatch):
    from keras_mha.kernels.torch_kernels import flash_cpu

    monkeypatch.setattr(flash_cpu, "IS_THERE", False)
    check_attention(SHAPES["as many keys, grouped heads"], True)
    assert not taken


# --------------------------------------------------------- keys that are not looked at


def looked_at(query, key, is_causal, slopes):
    """Which pairs are worked out, (N, T, S)."""
    from keras_mha.kernels.torch_kernels import diagonal_gradients, diagonals

    _, rows, heads, width = query.shape
    most = max(rows, key.shape[1]) - 1
    numbers = -np.array(slopes)[:, None] * abs(np.arange(-most, most + 1))
    scores = diagonal_gradients.Scores.of(
        *(to_tensor(x.swapaxes(1, 2)) for x in (query, key, key)),
        to_tensor(numbers),
        is_causal,
        width**-0.5,
    )
    found = np.zeros((heads, rows, key.shape[1]), bool)
    for piece in diagonals._pieces(scores, 16):
        found[piece] = True
    return found[:, :, ::-1]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("lengths", [(90, 90), (60, 120), (150, 40)])
def test_keys_that_are_left_out_weigh_nothing(lengths, size, is_causal, taken):
    shape = (2, *lengths, 4, 4, 8, 8)
    slopes = 20.0, 2.0, 1.0, 0.1
    for seed in range(5):
        query, key = (size * x for x in drawn(shape, seed)[:2])
        # The two that are largest point the same way: no product can be larger.
        rng = np.random.default_rng(seed)
        i, j = (rng.integers(length) for length in lengths)
        query[:, i] *= 3
        key[:, j] = 2 * query[:, i]
        _, weights = oracle.dot_product_attention(
            query,
            key,
            key,
            mask=causal_or_not(is_causal, shape)[1],
            bias=-np.array(slopes)[:, None, None] * abs(distances(shape)),
        )
        largest = weights.max(axis=-1, keepdims=True)
        left_out = ~looked_at(query, key, is_causal, slopes)
        left_out = np.broadcast_to(left_out, weights.shape)
        assert (weights < 1.01e-30 * largest)[left_out].all()


@pytest.mark.parametrize("size", [1e3, 1e10, 1e30, np.nan, np.inf])
def test_where_numbers_are_large_or_none_nothing_is_left_out(size, taken):
    query, key, *_ = drawn((1, 90, 90, 4, 4, 8, 8))
    assert looked_at(query, size * key, False, SLOPES).all()


@pytest.mark.parametrize("size", [1.0, 1e4, 1e7])
def test_own_keys_are_looked_at_however_products_are_rounded(size, taken):
    # All products of a head are as large as they can be.
    shape = (1, 90, 90, 64, 64, 8, 8)
    same = np.broadcast_to(size * drawn(shape)[0][:, :1], (1, 90, 64, 8))
    found = looked_at(same, same, False, (0.5,) * 64)
    assert found[:, np.arange(90), np.arange(90)].all()


def test_far_keys_of_alibi_are_not_looked_at(taken):
    shape = (1, 200, 200, 2, 2, 8, 8)
    *arrays, cotangent = drawn(shape)
    arrays[2][:, :20] = np.nan
    function = functools.partial(
        keras_mha.dot_product_attention,
        mask=masks.Causal(),
        position_bias=Slopes((2.0, 1.0)),
        implementation="fused",
    )
    (output,), _ = outputs_and_gradients(function, arrays, [cotangent])
    assert np.isfinite(output[:, 150:]).all()
    assert np.isnan(output[:, :20]).all()


# ---------------------------------------------------------------- which calls these are


class Squares(biases.DistanceBias):
    """A bias of a user's own, which goes on to change."""

    def __init__(self, factor):
        self.factor, self.positions = factor, Positions()

    def of_distances(self, distances, tile):
        squares = keras.ops.cast(distances * distances, "float32")
        return (
            -keras.ops.reshape(self.factor, (-1, *(1,) * len(squares.shape))) * squares
        )


class Shifted(Slopes):
    """One whose numbers are not those of distances alone."""

    def block(self, tile):
        return super().block(tile) + keras.ops.cast(tile.column_indices, "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    bias: object
    mask: object = None
    is_taken: bool = True


TABLE = np.zeros((4, 2 * MOST + 1))
IDS = np.arange(77)[None]
CASES = {
    "counted": Case(lambda: Slopes(SLOPES)),
    "a bias of a user's own": Case(lambda: Squares(to_tensor(np.ones(4) / 50))),
    "a window": Case(lambda: Slopes(SLOPES), masks.SlidingWindow(9), False),
    "given positions": Case(
        lambda: Slopes(SLOPES, Positions(to_tensor(IDS), to_tensor(IDS))),
        is_taken=False,
    ),
    "a block of its own": Case(lambda: Shifted(SLOPES), is_taken=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_biases_that_follow_from_the_distance_take_this_way(case, taken):
    *arrays, _ = drawn(SHAPES["as many keys, grouped heads"])
    tensors = [to_tensor(x) for x in arrays]
    found, expected = (
        keras_mha.dot_product_attention(
            *tensors,
            mask=case.mask,
            position_bias=case.bias(),
            implementation=implementation,
        )
        for implementation in ("fused", "reference")
    )
    check([to_numpy(found)], [to_numpy(expected)])
    assert bool(taken) == case.is_taken


def test_a_bias_is_trained_this_way_if_far_distances_share_a_number():
    tensors = [to_tensor(x) for x in drawn((1, 600, 600, 4, 4, 8, 8))[:3]]

    def plan(bias):
        return keras_mha.plan_attention(*tensors, position_bias=bias)

    factor, table = (to_tensor(x).requires_grad_() for x in (np.ones(4), TABLE))
    assert plan(ByDistance(table)).implementation == "fused"
    assert plan(Squares(factor)).implementation != "fused"
    assert "gradient of a bias" in plan(Squares(factor)).reason
