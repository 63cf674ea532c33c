"""Outputs and gradients on the device, against the float64 definition."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import keras_mha
from tests import oracle
from tests.accelerator.cases import CASES, DISTANCES, B, H, N, T
from tests.accelerator.device import BACKEND, KIND, needs_accelerator
from tests.helpers import outputs_and_gradients, rounded

pytestmark = needs_accelerator

# Of the largest number that is compared. Half types are rounded before products and
# after them; a TPU multiplies float32 in pieces of bfloat16.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
if KIND == "tpu":
    TOLERANCES["float32"] = 1e-3


@pytest.fixture(autouse=True)
def all_digits():
    """Has the framework multiply float32 with all of its digits."""
    with contextlib.ExitStack() as stack:
        if BACKEND == "jax":
            import jax

            stack.enter_context(jax.default_matmul_precision("highest"))
        elif BACKEND == "tensorflow":
            import tensorflow as tf

            execution = tf.config.experimental
            before = execution.tensor_float_32_execution_enabled()
            stack.callback(execution.enable_tensor_float_32_execution, before)
            execution.enable_tensor_float_32_execution(False)
        else:
            import torch

            before = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        yield


def arrays_of(case, dtype):
    rng = np.random.default_rng(1)
    shapes = [(B, T, heads, H) for heads in (N, case.groups, case.groups, N)]
    return [rounded(rng.normal(size=shape), dtype) for shape in shapes]


def attention(case):
    names = [*case.learned, *(["table"] if case.table is not None else [])]

    def function(query, key, value, *others):
        options = dict(zip(names, others, strict=True)) | case.given
        table = options.pop("table", None)
        if case.position_bias is not None:
            options["position_bias"] = case.position_bias(table)
        return keras_mha.dot_product_attention(
            query, key, value, mask=case.mask(), **options
        )

    return function


def of_table(d_bias):
    """The gradient of a table, from that of the bias that was looked up in it."""
    found = np.zeros((N, 33))
    for n in range(N):
        np.add.at(found[n], DISTANCES, d_bias[0, n])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case, dtype):
    *arrays, cotangent = arrays_of(case, dtype)
    learned = {name: rounded(x, dtype) for name, x in case.learned.items()}
    given = [*arrays, *learned.values()]
    options = {"mask": case.booleans, **case.given, **learned}
    if case.bias is not None:
        options["bias"] = case.bias
    if case.table is not None:
        table = rounded(case.table, dtype)
        given.append(table)
        options["bias"] = table[:, DISTANCES][None]

    (output,), found = outputs_and_gradients(attention(case), given, [cotangent], dtype)
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    gradients = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=cotangent, **options
    )
    names = ["dquery", "dkey", "dvalue", *(f"d{name}" for name in learned)]
    if case.table is not None:
        names.append("dtable")
        gradients["dtable"] = of_table(gradients["dbias"])
    check("output", output, expected, dtype)
    sees_nothing = ~np.broadcast_to(case.booleans, (B, N, T, T)).any(axis=3)
    for x in (output, found[0]):
        assert not x.transpose(0, 2, 1, 3)[sees_nothing].any()
    for name, gradient in zip(names, found, strict=True):
        check(name, gradient, gradients[name], dtype)


def check(name, found, expected, dtype):
    assert np.isfinite(found).all(), name
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < TOLERANCES[dtype], f"{name}: {error:.1e}"
