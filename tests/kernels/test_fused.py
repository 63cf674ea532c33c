"""The backend's own kernel: on slices of the rows, and its argument's names."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import fused
from keras_mha.kernels.call import AttentionCall
from tests import oracle
from tests.helpers import (
    backend_jit,
    only_jax,
    only_tensorflow,
    only_torch,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

B, T, S, N, K, H, V = 2, 77, 93, 4, 2, 8, 5
i, j = np.arange(T)[:, None], np.arange(S)
RNG = np.random.default_rng(0)
VALID = RNG.uniform(size=(B, S)) < 0.6
DENSE = RNG.uniform(size=(B, N, T, S)) < 0.3

CASES = {
    "window": (
        lambda: masks.Causal() & masks.SlidingWindow(9),
        (j <= i) & (i - j < 9),
    ),
    "padding and rows that see nothing": (
        lambda: masks.Causal(-20) & masks.Padding(to_tensor(VALID)),
        (j <= i - 20) & VALID[:, None, None],
    ),
    "dense": (lambda: masks.Dense(to_tensor(DENSE)), DENSE),
    "prefix": (lambda: masks.Causal() | masks.Prefix(30), (j <= i) | (j < 30)),
    "the future": (lambda: ~masks.Causal(), j > i),
}


QUERIES = RNG.uniform(size=(B, T)) < 0.6
CASES |= {
    "hidden queries": (
        lambda: masks.Dense(to_tensor(QUERIES[:, None, :, None])),
        np.broadcast_to(QUERIES[:, None, :, None], (B, 1, T, S)),
    ),
    "hidden queries and padding": (
        lambda: (
            masks.Padding(to_tensor(VALID))
            & masks.Dense(to_tensor(QUERIES[:, None, :, None]))
            & masks.Dense(to_tensor(DENSE[:1, :, :, :1]))
        ),
        VALID[:, None, None] & QUERIES[:, None, :, None] & DENSE[:1, :, :, :1],
    ),
}


@pytest.fixture
def small_slices(monkeypatch):
    from keras_mha.kernels.torch_kernels import sdpa

    monkeypatch.setattr(sdpa, "_WHOLE", 0)
    monkeypatch.setattr(sdpa, "_ROWS", 16)


@only_torch
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [None, (B, 1, T, S), (1, N, 1, S)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_slices_of_the_rows(case, bias, compiled, small_slices):
    mask, booleans = case
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V))
    arrays = [RNG.normal(size=shape) for shape in shapes]
    options = {} if bias is None else {"bias": RNG.normal(size=bias)}
    cotangent = RNG.normal(size=(B, T, N, V))

    def function(*tensors):
        given = {name: to_tensor(x) for name, x in options.items()}
        return keras_mha.dot_product_attention(
            *tensors, mask=mask(), **given, implementation="fused"
        )

    if compiled:
        function = backend_jit(function)
    (output,), gradients = outputs_and_gradients(function, arrays, [cotangent])
    expected, _ = oracle.dot_product_attention(*arrays, mask=booleans, **options)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    expected = oracle.dot_product_attention_gradients(
        *arrays, mask=booleans, output_cotangent=cotangent, **options
    )
    for name, found in zip(("dquery", "dkey", "dvalue"), gradients, strict=True):
        np.testing.assert_allclose(found, expected[name], atol=1e-5, err_msg=name)


@only_torch
def test_keys_that_no_row_of_a_slice_may_see_are_not_looked_at(small_slices):
    arrays = [RNG.normal(size=(1, T, 2, 8)) for _ in range(3)]
    arrays[1][:, 40:] = np.nan
    window = masks.Causal() & masks.SlidingWindow(4)
    output = keras_mha.dot_product_attention(
        *(to_tensor(x) for x in arrays), mask=window, implementation="fused"
    )
    # Rows 32 to 47 are one slice; those before it never meet key 40.
    assert bool((output[:, :32] == output[:, :32]).all())


@only_torch
def test_a_long_call_whose_bias_is_trained_goes_to_the_tiles(small_slices):
    bias = to_tensor(np.zeros((T, S))).requires_grad_()
    tensors = [to_tensor(RNG.normal(size=(1, n, 2, 8))) for n in (T, S, S)]
    with pytest.raises(ValueError, match=r"'fused'.*gradient of a bias"):
        keras_mha.dot_product_attention(*tensors, bias=bias, implementation="fused")
    plan = keras_mha.plan_attention(*tensors, bias=bias, implementation="flash")
    assert plan.implementation == "blockwise"


@only_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_bias_keeps_its_precision_beside_a_half_type(dtype):
    arrays = [rounded(RNG.normal(size=(1, 20, 2, 8)), dtype) for _ in range(3)]
    bias = 300 + 3 * np.sin(np.arange(400.0)).reshape(20, 20)
    output = keras_mha.dot_product_attention(
        *(to_tensor(x, dtype) for x in arrays),
        bias=to_tensor(bias),
        implementation="fused",
    )
    expected, _ = oracle.dot_product_attention(*arrays, bias=bias)
    np.testing.assert_allclose(to_numpy(output), expected, atol=0.02)


@only_torch
def test_a_window_can_be_exported_with_a_dynamic_length():
    import torch

    class Window(torch.nn.Module):
        def forward(self, x):
            mask = masks.Causal() & masks.SlidingWindow(3)
            return keras_mha.dot_product_attention(x, x, x, mask=mask)

    x = to_tensor(RNG.normal(size=(1, 20, 2, 8)))
    length = torch.export.Dim("length", min=2, max=2048)
    exported = torch.export.export(Window(), (x,), dynamic_shapes=({1: length},))
    longer = to_tensor(RNG.normal(size=(1, 30, 2, 8)))
    np.testing.assert_allclose(
        to_numpy(exported.module()(longer)), to_numpy(Window()(longer)), atol=1e-6
    )


# ------------------------------------------------------- what others put in its place
# Profilers and tracers wrap torch's function, torch's context_parallel replaces it.


@pytest.fixture
def wrapped(monkeypatch):
    """The names of torch's functions that are called, from now on."""
    from torch.nn import functional

    called = []

    def wrap(name):
        function = getattr(functional, name)

        def wrapper(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(functional, name, wrapper)

    wrap("scaled_dot_product_attention")
    wrap("pad")
    return called


@only_torch
@pytest.mark.parametrize("implementation", ["auto", "flash", "fused"])
def test_a_function_put_in_place_of_torchs_is_called(wrapped, implementation):
    arrays = [RNG.normal(size=shape) for shape in ((1, 6, 2, 8), (1, 6, 2, 8))]
    tensors = [to_tensor(x) for x in (*arrays, arrays[1][..., :5])]
    keras_mha.dot_product_attention(*tensors, implementation=implementation)
    assert wrapped == ["pad"] * 3 + ["scaled_dot_product_attention"]


@only_torch
def test_a_function_put_in_place_of_torchs_is_called_for_slices(wrapped, small_slices):
    function = lambda *x: keras_mha.dot_product_attention(  # noqa: E731
        *x, mask=masks.SlidingWindow(4), implementation="fused"
    )
    arrays = [RNG.normal(size=(1, 40, 2, 8)) for _ in range(3)]
    outputs_and_gradients(function, arrays, [np.ones((1, 40, 2, 8))])
    assert wrapped == ["scaled_dot_product_attention"] * 6  # forward, and once more


@only_torch
@pytest.mark.parametrize("length", [6, 40])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_put_in_place_of_torchs_is_called_by_the_layer(
    length, compiled, small_slices, request
):
    layer = keras_mha.MultiHeadAttention(2, 8)
    layer.build((1, length, 8))
    call = backend_jit(layer) if compiled else layer
    x = to_tensor(RNG.normal(size=(1, length, 8)))
    before = to_numpy(call(x, use_causal_mask=True))
    called = request.getfixturevalue("wrapped")  # only now: a program is kept
    np.testing.assert_allclose(to_numpy(call(x, use_causal_mask=True)), before)
    assert called == ["scaled_dot_product_attention"]


# ------------------------------------------------------------- JAX and TensorFlow


def a_call(**options):
    x = keras.KerasTensor((2, 6, 4, 8), "bfloat16")
    return AttentionCall(x, x, x, **options)


@only_jax
def test_on_a_cpu_jax_has_no_fused_kernel():
    name, why = fused.choose(a_call())
    assert name is None
    assert "but on NVIDIA's GPUs and on TPUs" in why


@only_tensorflow
def test_tensorflow_ships_none():
    why = "no fused kernel on the tensorflow backend"
    assert fused.choose(a_call()) == (None, why)


@only_torch
def test_hidden_queries_need_no_mask_of_all_scores(monkeypatch):
    import torch

    attend, given = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args, attn_mask=None, **kwargs):
        given.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    query, key = (to_tensor(RNG.normal(size=(B, n, N, H))) for n in (T, S))
    hidden = masks.Dense(to_tensor(QUERIES[:, None, :, None]))
    keras_mha.dot_product_attention(query, key, key, mask=hidden)
    padding = masks.Padding(to_tensor(VALID))
    keras_mha.dot_product_attention(query, key, key, mask=padding & hidden)
    assert given[0] is None
    assert given[1].shape == (B, 1, 1, S)


@pytest.fixture
def four_threads():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def key_heads_given(monkeypatch):
    """With how many key heads torch's function is called, from now on."""
    import torch

    attend, given = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, **options):
        given.append(key.shape[1])
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return given


@only_torch
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("heads", "key_heads", "given"),
    [(8, 1, 8), (8, 2, 8), (8, 4, 4), (12, 6, 12), (12, 12, 12), (10, 5, 10)],
)
def test_no_thread_waits_for_another_to_work_out_the_gradient(
    heads, key_heads, given, compiled, four_threads, small_slices, key_heads_given
):
    shapes = (1, T, heads, H), (1, T, key_heads, H), (1, T, key_heads, V)
    arrays = [RNG.normal(size=shape) for shape in shapes]
    cotangent = RNG.normal(size=(1, T, heads, V))

    def function(*tensors):
        return keras_mha.dot_product_attention(*tensors, mask=masks.Causal())

    if compiled:
        function = backend_jit(function)
    (output,), gradients = outputs_and_gradients(function, arrays, [cotangent])
    assert key_heads_given == [given]
    causal = np.tri(T, dtype=bool)
    expected, _ = oracle.dot_product_attention(*arrays, mask=causal)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    expected = oracle.dot_product_attention_gradients(
        *arrays, mask=causal, output_cotangent=cotangent
    )
    for name, found in zip(("dquery", "dkey", "dvalue"), gradients, strict=True):
        np.testing.assert_allclose(found, expected[name], atol=1e-5, err_msg=name)


@only_torch
def test_keys_are_not_copied_where_they_are_few_or_nothing_is_trained(
    four_threads, key_heads_given, monkeypatch
):
    from keras_mha.kernels.torch_kernels import sdpa

    query, key = (to_tensor(RNG.normal(size=(1, T, heads, H))) for heads in (8, 1))
    keras_mha.dot_product_attention(query.requires_grad_(), key, key)
    monkeypatch.setattr(sdpa, "_WHOLE", 0)
    keras_mha.dot_product_attention(query.detach(), key, key)
    assert key_heads_given == [1, 1]
