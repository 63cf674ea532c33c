"""JAX's Pallas kernel for packed segments, interpreted: its numbers are the oracle's.

That it is called on NVIDIA's GPUs is read in programs that are lowered for one.
"""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import positions_first, prepared
from keras_mha.kernels.whole import whole
from tests import oracle
from tests.helpers import (
    kernels_exported,
    only_jax,
    outputs_and_gradients,
    rounded,
    to_tensor,
)

pytestmark = only_jax

B, T, N, K, H, V = 2, 140, 4, 2, 6, 5
RNG = np.random.default_rng(0)
i, j = np.arange(T)[:, None], np.arange(T)
# No number is special, and a segment may go on after another.
IDS = np.stack(
    [np.sort(RNG.integers(-1, 4, T)), RNG.choice([7, 2**31 - 1, -(2**31)], T)]
)
OTHER_IDS = np.roll(IDS, 3, axis=1)
SAME = IDS[:, None, :, None] == IDS[:, None, None, :]
VALID = RNG.uniform(size=(B, T)) < 0.5
VALID[0, IDS[0] == 1] = False  # a segment of which nothing is seen
QUERIES = RNG.uniform(size=(B, T)) < 0.7


def segments(keys=None):
    ids = to_tensor(IDS.astype("int32"))
    return masks.Segments(ids, ids if keys is None else to_tensor(keys.astype("int32")))


def padding():
    return masks.Padding(to_tensor(VALID))


def queries():
    return masks.Dense(to_tensor(QUERIES[:, None, :, None]))


CASES = {
    "segments": (segments, SAME, {}),
    "causal": (lambda: segments() & masks.Causal(), SAME & (j <= i), {}),
    "padding": (lambda: segments() & padding(), SAME & VALID[:, None, None], {}),
    "padding, causal, queries, sinks": (
        lambda: masks.intersect(segments(), masks.Causal(), padding(), queries()),
        SAME & (j <= i) & VALID[:, None, None] & QUERIES[:, None, :, None],
        {"sink": RNG.normal(size=N)},
    ),
    "ids that differ": (
        lambda: segments(OTHER_IDS) & masks.Causal(),
        (IDS[:, None, :, None] == OTHER_IDS[:, None, None, :]) & (j <= i),
        {},
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel's module."""
    from keras_mha.kernels.jax_kernels import triton

    monkeypatch.setattr(triton, "_INTERPRET", True)
    return triton


def attend(triton, mask, tensors, **options):
    call = AttentionCall(*tensors, mask=mask, scale=0.4, **options)
    problem, named = prepared(call)
    output = backends.current().with_gradient(
        triton.forward, triton.backward, whole, problem, named
    )
    return positions_first(output)


def check(triton, case, dtype, atol):
    mask, seen, options = case
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, V))
    arrays = [rounded(RNG.normal(size=shape), dtype) for shape in shapes]
    given = [*arrays, *options.values()]
    cotangent = rounded(RNG.normal(size=(B, T, N, V)), dtype)

    def function(*tensors):
        *tensors, sink = tensors if options else (*tensors, None)
        return attend(triton, mask(), tensors, sink=sink)

    (output,), gradients = outputs_and_gradients(function, given, [cotangent], dtype)
    options = {"mask": seen, "scale": 0.4, **options}
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    np.testing.assert_allclose(output, expected, atol=atol)
    expected = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=cotangent, **options
    )
    names = ("dquery", "dkey", "dvalue", "dsink")
    for name, found in zip(names, gradients, strict=False):
        np.testing.assert_allclose(
            found, expected[name], atol=8 * atol, rtol=1e-4, err_msg=name
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_numbers_are_the_oracles(case, interpreted):
    check(interpreted, case, "float32", 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_in_half_types(dtype, interpreted):
    check(interpreted, CASES["padding, causal, queries, sinks"], dtype, 0.02)


def exported(function, *arguments):
    """The program of a function that was traced here, for an NVIDIA GPU."""
    import jax

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with kernels_exported():
        export = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=unchecked
        )
        return export(*arguments).mlir_module()


def kernels_of(program):
    return re.findall(r'@__gpu\$xla.gpu.triton.*?name = "(\w+)"', program)


@pytest.mark.parametrize("name", ["segments", "padding, causal, queries, sinks"])
def test_programs_for_gpus_call_it(name):
    import jax

    mask, _, options = CASES[name]
    options = {name: to_tensor(x) for name, x in options.items()}
    shapes = ((B, T, N, 20), (B, T, K, 20), (B, T, K, 12))
    tensors = [to_tensor(RNG.normal(size=shape), "bfloat16") for shape in shapes]

    def step(*tensors):
        def attend(*tensors):
            return keras_mha.dot_product_attention(*tensors, mask=mask(), **options)

        output, pull_back = jax.vjp(attend, *tensors)
        return pull_back(output)

    program = exported(step, *tensors)
    forward, backward = ["mha_forward"], ["mha_preprocess_backward", "mha_backward"]
    assert kernels_of(program) == forward + backward
    # Where ids differ tiles run, and of this length there is but one tile.
    assert not re.findall(r"tensor<(?:\d+x)*256x256x\w+>", program)


def test_a_layer_calls_it_where_its_program_is_lowered_for_a_gpu():
    layer = keras_mha.MultiHeadAttention(4, 20, dtype="mixed_bfloat16")
    layer.build((B, T, 12))
    x, ids = to_tensor(np.ones((B, T, 12))), to_tensor(IDS.astype("int32"))

    def call(x, ids):
        return layer(x, segment_ids=ids, use_causal_mask=True)

    assert kernels_of(exported(call, x, ids)) == ["mha_forward"]


# -------------------------------------------------- what it is asked for, and what not


def symbolic(dtype="bfloat16", length=6, columns=6, width=8):
    query = keras.KerasTensor((2, length, 4, width), dtype)
    key = keras.KerasTensor((2, columns, 4, width), dtype)

    def call(mask=None, **options):
        ids = np.zeros((2, length), int), np.zeros((2, columns), int)
        mask = masks.intersect(masks.Segments(*ids), mask)
        return AttentionCall(query, key, key, mask=mask, **options)

    return call


SOME = np.ones((2, 6), bool)
REFUSED = {
    "float32": (symbolic("float32"), {}, "float16 and bfloat16"),
    "wide": (symbolic(width=136), {}, "up to a width of 128"),
    "cross-attention": (symbolic(columns=7), {}, "as many queries as keys"),
    "dropout": (symbolic(), {"dropout": 0.1}, "dropout"),
    "cap": (symbolic(), {"logit_soft_cap": 3.0}, "soft cap"),
    "bias": (symbolic(), {"bias": np.zeros((1, 1, 6, 6))}, "no bias"),
    "sums": (symbolic(), {"return_lse": True}, "rows' sums"),
    "window": (
        symbolic(),
        {"mask": masks.Causal() & masks.SlidingWindow(2)},
        "no window",
    ),
    "prefix, causal": (symbolic(), {"mask": masks.Causal() | masks.Prefix(3)}, "Or"),
    "booleans": (symbolic(), {"mask": masks.Dense(np.ones((6, 6), bool))}, "Dense"),
    "padding of wide heads": (
        symbolic(width=128),
        {"mask": masks.Padding(SOME)},
        "one more feature",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_does_not_take(case):
    from keras_mha.kernels.jax_kernels import triton

    call, options, why = case
    assert why in triton.refusal(call(**options))


def test_it_is_not_taken_without_segments():
    from keras_mha.kernels.jax_kernels import triton

    x = keras.KerasTensor((2, 6, 4, 8), "bfloat16")
    assert "one mask of segments" in triton.refusal(AttentionCall(x, x, x))


def test_the_plan_for_a_gpu_says_why_neither_kernel_runs_a_call():
    x = keras.KerasTensor((2, 6, 4, 8), "bfloat16")
    ids = masks.Segments(np.zeros((2, 6), "int32"))
    plan = keras_mha.plan_attention(x, x, x, mask=ids, device="gpu")
    assert plan.implementation == "fused"
    mask = ids & masks.Causal() & masks.SlidingWindow(2)
    plan = keras_mha.plan_attention(
        x, x, x, mask=mask, device="gpu", implementation="flash"
    )
    assert plan.implementation == "blockwise"
    assert "Segments" in plan.reason and "no window" in plan.reason
