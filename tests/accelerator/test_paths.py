"""The planner's fused paths are what the device runs."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from tests.accelerator.cases import CASES, B, H, N, T
from tests.accelerator.device import (
    BACKEND,
    IS_FORCED,
    KIND,
    needs_accelerator,
    needs_device_itself,
)
from tests.helpers import to_tensor

SDPA, FLEX = "scaled_dot_product_attention", "flex_attention"
CUDNN, TRITON, SPLASH = "cuDNN", "Pallas (Triton)", "splash attention"
# Of half types. What is not named here goes to tiles.
KERNELS = {
    ("torch", "gpu"): {
        **dict.fromkeys(CASES, FLEX),
        **dict.fromkeys(("plain", "causal", "causal, as many key heads"), SDPA),
        "padding": SDPA,
    },
    ("jax", "gpu"): {
        **dict.fromkeys(("plain", "causal", "causal, as many key heads"), CUDNN),
        **dict.fromkeys(("padding", "padding on the right, causal"), CUDNN),
        **dict.fromkeys(("window", "sink"), CUDNN),
        "segments": TRITON,
    },
    ("jax", "tpu"): {
        **dict.fromkeys(("plain", "causal", "causal, as many key heads"), SPLASH),
        **dict.fromkeys(("padding", "padding on the right, causal"), SPLASH),
        **dict.fromkeys(("window", "segments", "a user's mask"), SPLASH),
        **dict.fromkeys(("soft cap", "sink"), SPLASH),
    },
}
# On a CPU the planner can be asked what others would run.
ASKED = [
    (kind, name)
    for (backend, kind), names in KERNELS.items()
    for name in names
    if backend == BACKEND and (IS_FORCED or kind == KIND)
] or [pytest.param("", "", marks=pytest.mark.skip(f"{BACKEND} has no kernel here"))]
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


@needs_accelerator
@pytest.mark.parametrize(("kind", "name"), ASKED)
def test_a_kernel_of_the_device_is_planned(kind, name):
    case = CASES[name]
    options = {name: to_tensor(x) for name, x in case.learned.items()} | case.given
    if case.position_bias is not None:
        table = None if case.table is None else to_tensor(case.table)
        options["position_bias"] = case.position_bias(table)
    x, y = (keras.KerasTensor((B, T, n, H), "bfloat16") for n in (N, case.groups))
    plan = keras_mha.plan_attention(
        x, y, y, mask=case.mask(), device=None if kind == KIND else kind, **options
    )
    assert plan.fused_kernel == KERNELS[BACKEND, kind][name], plan.reason


@needs_device_itself
@pytest.mark.skipif(BACKEND != "jax", reason="speaks of the JAX backend")
@pytest.mark.parametrize("name", ["causal", "window", "soft cap"])
def test_its_kernel_is_in_the_program(name):
    import jax

    if name not in KERNELS[BACKEND, KIND]:
        pytest.skip("the device has no kernel for it")
    x = to_tensor(np.ones((1, LENGTH, 4, 64)), "bfloat16")
    function = lambda x: keras_mha.dot_product_attention(  # noqa: E731
        x, x, x, mask=mask_of(name), **CASES[name].given
    )
    assert IN_PROGRAM[KIND] in jax.jit(function).lower(x).as_text().lower()


@needs_device_itself
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
