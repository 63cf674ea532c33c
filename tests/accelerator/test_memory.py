"""Memory on the device grows with the length, not with its square."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from tests.accelerator.device import BACKEND, IS_FORCED, finish, needs_accelerator
from tests.helpers import to_tensor

pytestmark = needs_accelerator

LENGTH = 1024 if IS_FORCED else 4096
CALLS = {
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.Causal() & masks.SlidingWindow(256)},
    "soft cap": {"mask": masks.Causal(), "logit_soft_cap": 30.0},
    "dropout": {"mask": masks.Causal(), "dropout": 0.1, "seed": 3},
}


def loss(options):
    def function(x):
        output = keras_mha.dot_product_attention(
            x, x, x, implementation="flash", **options
        )
        return keras.ops.sum(keras.ops.cast(output, "float32"))

    return function


def peak_of_jax(x, options):
    import jax

    program = jax.jit(jax.grad(loss(options))).lower(x).compile()
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def peak_of_torch(x, options):
    import torch

    if x.device.type != "cuda":
        pytest.skip("PyTorch counts what a GPU holds only")

    def step():
        y = x.detach().requires_grad_()
        loss(options)(y).backward()
        finish(y.grad)

    step()  # what is compiled and kept is not of the step
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_of_tensorflow(x, options):
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow counts what a GPU holds only")

    def step():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = loss(options)(x)
        finish(tape.gradient(y, x))

    step()
    experimental = tf.config.experimental
    experimental.reset_memory_stats("GPU:0")
    before = experimental.get_memory_info("GPU:0")["current"]
    step()
    return experimental.get_memory_info("GPU:0")["peak"] - before


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_twice_the_length_takes_twice_the_memory(options):
    peak = {
        "jax": peak_of_jax,
        "torch": peak_of_torch,
        "tensorflow": peak_of_tensorflow,
    }[BACKEND]
    rng = np.random.default_rng(0)
    peaks = []
    for length in (LENGTH, 2 * LENGTH):
        x = to_tensor(rng.normal(size=(1, length, 8, 64)), "bfloat16")
        peaks.append(peak(x, options))
    assert peaks[1] / peaks[0] < 2.2, peaks
