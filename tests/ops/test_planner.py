"""The planner chooses a kernel, says why, and can be overruled."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.kernels import blockwise, fused, reference, row_chunks
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import Causal, SlidingWindow
from keras_mha.ops.planner import plan
from tests.helpers import only_jax, only_tensorflow, only_torch

BACKEND = keras.backend.backend()
without_fused = pytest.mark.skipif(
    BACKEND == "torch", reason="torch has a fused kernel"
)
SHORT, LONG = 5, 4096


def a_call(length=SHORT, **arguments):
    x = keras.KerasTensor((2, length, 4, 8))
    return AttentionCall(x, x, x, **arguments)


def test_the_reference_can_run_every_call():
    chosen = plan(a_call(return_scores=True, dropout=0.5), "reference")
    assert chosen.implementation == "reference"
    assert chosen.kernel is reference.attend


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_asking_for_the_scores_takes_the_reference(length):
    chosen = plan(a_call(length, return_scores=True))
    assert chosen.implementation == "reference"
    assert "scores" in chosen.reason


@only_torch
@pytest.mark.parametrize("length", [SHORT, LONG])
def test_torch_takes_its_own_kernel_where_it_can(length):
    for options in (
        {},
        {"mask": Causal()},
        {"mask": SlidingWindow(3)},
        {"bias": np.zeros((1, 1, 1, 1))},
    ):
        for implementation in ("auto", "flash"):
            chosen = plan(a_call(length, **options), implementation)
            assert chosen.implementation == "fused"
            assert chosen.kernel is fused.attend


@only_torch
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"logit_soft_cap": 50.0}, "soft cap"),
        ({"sink": np.zeros(4), "mask": SlidingWindow(3)}, "sink"),
    ],
)
def test_what_the_fused_kernel_cannot_run_goes_to_tiles_if_long(arguments, why):
    for length, taken in ((SHORT, "reference"), (LONG, "blockwise")):
        chosen = plan(a_call(length, **arguments))
        assert chosen.implementation == taken
        assert why in chosen.reason
        with pytest.raises(ValueError, match=f"implementation='fused'.*{why}"):
            plan(a_call(length, **arguments), "fused")


@only_torch
@pytest.mark.parametrize(
    ("batch", "length", "taken"),
    [
        (1, 512, "reference"),
        (4, 512, "blockwise"),
        (1, 1024, "blockwise"),
        (64, 128, "reference"),
    ],
)
def test_tiles_pay_earlier_where_there_are_many_scores_in_all(batch, length, taken):
    x = keras.KerasTensor((batch, length, 8, 64))
    assert plan(AttentionCall(x, x, x, dropout=0.1)).implementation == taken


@only_tensorflow
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3)], ids=["causal", "window"])
@pytest.mark.parametrize(
    ("batch", "length", "taken"),
    [
        (1, 768, "reference"),
        (1, 1024, "blockwise"),
        (8, 704, "blockwise"),
        (64, 512, "reference"),
    ],
)
def test_tiles_of_batches_pay_earlier_with_every_mask(batch, length, taken, mask):
    x = keras.KerasTensor((batch, length, 8, 64))
    assert plan(AttentionCall(x, x, x, mask=mask)).implementation == taken


@only_jax
@pytest.mark.parametrize(
    ("batch", "length", "taken"),
    [
        (1, 384, "reference"),
        (1, 512, "blockwise"),
        (8, 256, "reference"),
        (8, 384, "blockwise"),
    ],
)
def test_tiles_of_batches_pay_earlier_on_jax(batch, length, taken):
    x = keras.KerasTensor((batch, length, 8, 64))
    assert plan(AttentionCall(x, x, x)).implementation == taken


@without_fused
def test_a_backend_without_a_fused_kernel_takes_tiles_for_long_sequences():
    for length, tiles in ((SHORT, False), (LONG, True), (None, True)):
        chosen = plan(a_call(length))
        assert chosen.implementation == ("blockwise" if tiles else "reference")
        assert BACKEND in chosen.reason
    with pytest.raises(ValueError, match=f"no fused kernel on the {BACKEND} backend"):
        plan(a_call(), "fused")


@pytest.mark.parametrize("length", [SHORT, LONG, None])
def test_flash_never_takes_the_reference(length):
    for options in ({}, {"dropout": 0.1}, {"logit_soft_cap": 3.0}):
        chosen = plan(a_call(length, **options), "flash")
        assert chosen.implementation in ("fused", "blockwise")


@pytest.mark.parametrize("implementation", ["auto", "flash"])
def test_nothing_to_attend_to_is_no_work_for_tiles(implementation):
    chosen = plan(a_call(0, sink=np.zeros(4)), implementation)
    assert chosen.implementation == "reference"
    assert "no scores" in chosen.reason


def test_dropping_everything_is_no_work_for_tiles():
    chosen = plan(a_call(LONG, dropout=1.0))
    assert chosen.implementation == "reference"
    assert "dropout=1" in chosen.reason


@pytest.mark.parametrize(
    ("length", "kernel"), [(SHORT, reference), (LONG, row_chunks), (None, row_chunks)]
)
def test_heads_that_talk_need_the_formula_of_some_rows_if_long(length, kernel):
    mixing = np.eye(4), None
    chosen = plan(a_call(length, talking_heads=mixing))
    assert chosen.implementation == "reference"
    assert chosen.kernel is kernel.attend
    assert "all heads" in chosen.reason
    assert ("some rows at a time" in chosen.reason) == (kernel is row_chunks)
    for wish in ("fused", "blockwise", "flash"):
        with pytest.raises(ValueError, match=f"implementation='{wish}'.*all heads"):
            plan(a_call(length, talking_heads=mixing), wish)


def test_scores_of_heads_that_talk_are_of_all_rows():
    chosen = plan(a_call(LONG, talking_heads=(np.eye(4), None), return_scores=True))
    assert chosen.kernel is reference.attend
    chosen = plan(a_call(LONG, talking_heads=(np.eye(4), None)), "reference")
    assert chosen.kernel is reference.attend


@pytest.mark.parametrize("length", [SHORT, LONG, None])
def test_the_rows_sums_come_of_the_formula_some_rows_at_a_time_if_long(length):
    chosen = plan(a_call(length, return_lse=True))
    if length == SHORT:
        assert chosen.kernel is reference.attend
    else:
        assert chosen.implementation == "blockwise"
        assert chosen.kernel is row_chunks.attend
    assert plan(a_call(length, return_lse=True), "flash").kernel is row_chunks.attend
    with pytest.raises(ValueError, match="implementation='fused'"):
        plan(a_call(length, return_lse=True), "fused")


# ---------------------------------------------------------- keras_mha.plan_attention


def test_a_user_can_ask_which_implementation_a_call_takes():
    x = keras.KerasTensor((1, LONG, 8, 64))
    chosen = keras_mha.plan_attention(x, x, x, mask=Causal(), dropout=0.1)
    assert chosen.implementation == "blockwise"
    assert chosen.reason and "kernel" in chosen.reason
    assert "function" not in repr(chosen)
    chosen = keras_mha.plan_attention(x, x, x, return_scores=True)
    assert chosen.implementation == "reference"


def test_asking_checks_the_call():
    x = keras.KerasTensor((1, 8, 8, 64))
    with pytest.raises(ValueError, match=r"implementation='flash'.*scores"):
        keras_mha.plan_attention(x, x, x, return_scores=True, implementation="flash")
    with pytest.raises(ValueError, match="same length"):
        keras_mha.plan_attention(x, x, keras.KerasTensor((1, 9, 8, 64)))


@pytest.mark.parametrize("implementation", ["auto", "flash", "blockwise", "reference"])
def test_what_is_said_is_what_is_run(implementation, monkeypatch):
    ran = []
    kernels = [(module, "attend") for module in (fused, blockwise, reference)]
    if BACKEND == "jax":
        kernels.append((fused, "attend_where_lowered"))  # in tiles, on a CPU
    for module, function in kernels:
        name, kernel = module.__name__.rsplit(".", 1)[1], getattr(module, function)
        name = "blockwise" if function == "attend_where_lowered" else name

        def attend(call, name=name, kernel=kernel):
            ran.append(name)
            return kernel(call)

        monkeypatch.setattr(module, function, attend)
    x = keras.ops.ones((1, 5, 2, 8))
    options = {"mask": Causal(), "implementation": implementation}
    keras_mha.dot_product_attention(x, x, x, **options)
    assert ran == [keras_mha.plan_attention(x, x, x, **options).implementation]


# ----------------------------------------------------------- for a kind of device


def test_one_can_ask_for_a_device_that_is_not_there():
    x = keras.KerasTensor((8, 2048, 8, 64), "float32")
    options = {"mask": Causal(), "return_lse": True}  # which no fused kernel has
    ask = lambda device: keras_mha.plan_attention(  # noqa: E731
        x, x, x, device=device, **options
    )
    assert ask(None) == ask("cpu")
    assert ask("cpu").implementation == "blockwise"
    # 8 x 8 x 2048 x 2048 scores are 1 GiB; of 16 GiB a sixty-fourth is for them.
    assert ask("gpu").implementation == ask("tpu").implementation == "blockwise"
    x = x[:1, :1024]
    assert ask("gpu").implementation == ask("tpu").implementation == "reference"
    assert "tiles pay from" in ask("gpu").reason


def test_a_device_has_a_name_that_is_known():
    x = keras.KerasTensor((1, 8, 8, 64))
    with pytest.raises(ValueError, match="`device` must be one of 'cpu', 'gpu', 'tpu'"):
        keras_mha.plan_attention(x, x, x, device="cuda")
