"""The planner chooses a kernel, says why, and can be overruled."""

import keras
import numpy as np
import pytest

from keras_mha.kernels import fused, reference
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import Causal
from keras_mha.ops.planner import plan
from tests.helpers import only_torch

BACKEND = keras.backend.backend()


def a_call(**arguments):
    shape = keras.KerasTensor((2, 5, 4, 8))
    return AttentionCall(shape, shape, shape, **arguments)


def test_the_reference_can_run_every_call():
    chosen = plan(a_call(return_scores=True, dropout=0.5), "reference")
    assert chosen.implementation == "reference"
    assert chosen.kernel is reference.attend


@only_torch
def test_torch_takes_its_own_kernel_where_it_can():
    for call in (a_call(), a_call(mask=Causal()), a_call(bias=np.zeros((1, 1, 5, 5)))):
        chosen = plan(call)
        assert chosen.implementation == "fused"
        assert chosen.kernel is fused.attend


@only_torch
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"return_scores": True}, "scores"),
        ({"dropout": 0.1}, "dropout"),
        ({"logit_soft_cap": 50.0}, "soft cap"),
        ({"sink": np.zeros(4)}, "sink"),
    ],
)
def test_a_call_that_the_fused_kernel_cannot_run_goes_to_the_reference(arguments, why):
    chosen = plan(a_call(**arguments))
    assert chosen.implementation == "reference"
    assert why in chosen.reason
    with pytest.raises(ValueError, match=f"implementation='fused'.*{why}"):
        plan(a_call(**arguments), "fused")


@pytest.mark.skipif(BACKEND == "torch", reason="torch has a fused kernel")
def test_a_backend_without_a_fused_kernel_says_so():
    chosen = plan(a_call())
    assert chosen.implementation == "reference"
    assert BACKEND in chosen.reason
    with pytest.raises(ValueError, match=f"no fused kernel on the {BACKEND} backend"):
        plan(a_call(), "fused")
