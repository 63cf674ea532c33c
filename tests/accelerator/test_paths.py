"""The planner's fused paths are what the device runs."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from tests.accelerator.cases import CASES, B, H, N, T
from tests.accelerator.device import BACKEND, KIND, needs_device_itself
from tests.helpers import to_tensor

pytestmark = needs_device_itself

# Of half types, by backend and device; what no kernel takes goes to tiles.
FUSED = {
    ("torch", "gpu"): [*CASES],
    ("jax", "gpu"): ["plain", "causal", "causal, as many key heads"],
    ("jax", "tpu"): [
        "plain",
        "causal",
        "padding",
        "padding on the right, causal",
        "window",
        "segments",
        "soft cap",
    ],
}
LENGTH = 2048
IN_PROGRAM = {"gpu": "cudnn", "tpu": "tpu_custom_call"}


def mask_of(name):
    """The mask of a case, of another length."""
    masks = keras_mha.masks
    return {
        "causal": masks.Causal(),
        "window": masks.Causal() & masks.SlidingWindow(256),
        "soft cap": masks.Causal(),
    }.get(name)


@pytest.mark.parametrize("name", FUSED.get((BACKEND, KIND), []))
def test_the_device_is_planned_a_kernel_of_its_own(name):
    case = CASES[name]
    options = {name: to_tensor(x) for name, x in case.learned.items()} | case.given
    if case.position_bias is not None:
        table = None if case.table is None else to_tensor(case.table)
        options["position_bias"] = case.position_bias(table)
    x, y = (keras.KerasTensor((B, T, n, H), "bfloat16") for n in (N, case.groups))
    plan = keras_mha.plan_attention(x, y, y, mask=case.mask(), **options)
    assert plan.implementation == "fused", plan.reason


@pytest.mark.skipif(BACKEND != "jax", reason="speaks of the JAX backend")
@pytest.mark.parametrize("name", ["causal", "window", "soft cap"])
def test_its_kernel_is_in_the_program(name):
    import jax

    if name not in FUSED.get((BACKEND, KIND), []):
        pytest.skip("the device has no kernel for it")
    x = to_tensor(np.ones((1, LENGTH, 4, 64)), "bfloat16")
    function = lambda x: keras_mha.dot_product_attention(  # noqa: E731
        x, x, x, mask=mask_of(name), **CASES[name].given
    )
    assert IN_PROGRAM[KIND] in jax.jit(function).lower(x).as_text().lower()


@pytest.mark.skipif(BACKEND != "torch", reason="speaks of the PyTorch backend")
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("causal", "attention"), ("window", "flex"), ("soft cap", "flex")],
)
def test_its_kernel_is_what_runs(name, kernel):
    import torch

    x = to_tensor(np.ones((1, LENGTH, 4, 64)), "bfloat16")

    def call():
        return keras_mha.dot_product_attention(
            x, x, x, mask=mask_of(name), **CASES[name].given
        )

    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profile.key_averages()).lower()
    kinds = {"attention": ("flash", "fmha", "attention"), "flex": ("flex_attention",)}
    assert any(kind in names for kind in kinds[kernel]), names
