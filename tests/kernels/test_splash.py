"""Attention by splash attention, interpreted, against the float64 definition.

With blocks of 128 the sequences have two rows and three columns of blocks, and lengths
and widths that are no multiple of anything.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_mha import masks
from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import prepared
from keras_mha.kernels.whole import whole
from tests import oracle
from tests.helpers import (
    call_at_once,
    only_jax,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

pytestmark = only_jax
B, T, S, N, K, H, V = 2, 200, 300, 4, 2, 20, 24
i, j = np.arange(T)[:, None], np.arange(S)
RNG = np.random.default_rng(0)
VALID = j < np.array([[170], [90]])
NONE_VALID = j < np.array([[250], [0]])
SEES = np.arange(T) >= np.array([[30], [150]])
IDS = np.sort(RNG.integers(-2, 2, size=(B, T))).astype("int32")
KEY_IDS = np.sort(RNG.integers(-2, 2, size=(B, S))).astype("int32")
SAME_ID = (IDS[:, :, None] == KEY_IDS[:, None])[:, None]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    if keras.backend.backend() != "jax":
        yield
        return
    from keras_mha.kernels.jax_kernels import splash_blocks, splash_kernel

    if not splash_kernel.is_as_known():
        pytest.skip("this version of jax has another splash attention")
    with pytest.MonkeyPatch.context() as patch, splash_kernel.interpreted():
        patch.setattr(splash_blocks, "BLOCK", 128)
        yield


def attend(query, key, value, **options):
    """The output, shape `(B, T, N, V)`."""
    from keras_mha.kernels.jax_kernels import splash

    options = {"scale": query.shape[3] ** -0.5} | options
    call = AttentionCall(query, key, value, **options)
    assert splash.refusal(call) is None
    output = backends.current().with_gradient(
        splash.forward, splash.backward, whole, *prepared(call)
    )
    output = keras.ops.transpose(output, (0, 4, 1, 3, 2))
    return keras.ops.reshape(output, (*query.shape[:3], -1))


def draw(dtype="float32", **shapes):
    sizes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, V)}
    rng = np.random.default_rng(3)
    return {
        name: rounded(rng.normal(size=shape), dtype)
        for name, shape in (sizes | shapes).items()
    }


# A case: arrays' shapes, what the call is given, and the mask's booleans.
CASES = {
    "no mask and one key head": (
        {"query": (B, 128, N, 64), "key": (B, 256, 1, 64), "value": (B, 256, 1, 64)},
        {},
        None,
    ),
    "causal, each sample's own padding": (
        {},
        {"mask": lambda: masks.Causal() & masks.Padding(to_tensor(VALID))},
        (j <= i) & VALID[:, None, None],
    ),
    "window, soft cap": (
        {},
        {
            "mask": lambda: masks.Causal(30) & masks.SlidingWindow(40),
            "logit_soft_cap": 1.5,
        },
        (j <= i + 30) & (abs(i - j) < 40),
    ),
    "blocks and a sample of padding alone": (
        {},
        {
            "mask": lambda: (
                masks.Where(lambda i, j: i // 70 == j // 70)
                & masks.Padding(to_tensor(NONE_VALID))
            )
        },
        (i // 70 == j // 70) & NONE_VALID[:, None, None],
    ),
    "segments, padding of queries and keys, causal": (
        {},
        {
            "mask": lambda: (
                masks.Segments(to_tensor(IDS), to_tensor(KEY_IDS))
                & masks.Padding(to_tensor(VALID))
                & masks.Dense(to_tensor(SEES[:, None, :, None]))
                & masks.Causal()
            )
        },
        SAME_ID & VALID[:, None, None] & SEES[:, None, :, None] & (j <= i),
    ),
    "prefix or not causal, sink": (
        {"sink": (N,)},
        {"mask": lambda: masks.Prefix(20) | ~masks.Causal(-50)},
        (j < 20) | ~(j <= i - 50),
    ),
    "rows before all keys, whole blocks of them, sink": (
        {"sink": (N,)},
        {"mask": lambda: masks.Causal(-150)},
        j <= i - 150,
    ),
    "rows before all keys": ({}, {"mask": lambda: masks.Causal(-150)}, j <= i - 150),
    "not causal, a negative scale": (
        {},
        {"mask": lambda: ~masks.Causal(100), "scale": -0.3},
        j > i + 100,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name):
    shapes, given, booleans = CASES[name]
    check(shapes, given, booleans, "float32", 1e-5)


def test_numbers_and_gradients_of_bfloat16():
    shapes, given, booleans = CASES["causal, each sample's own padding"]
    check(shapes, given, booleans, "bfloat16", 3e-2)


def check(shapes, given, booleans, dtype, tolerance):
    arrays = draw(dtype, **shapes)
    cotangent = rounded(
        RNG.normal(size=(*arrays["query"].shape[:3], arrays["value"].shape[3])), dtype
    )

    def function(*tensors):
        options = {name: x() if callable(x) else x for name, x in given.items()}
        return attend(**dict(zip(arrays, tensors, strict=True)), **options)

    (output,), gradients = outputs_and_gradients(
        function, list(arrays.values()), [cotangent], dtype
    )
    everything = arrays | {n: x for n, x in given.items() if n != "mask"}
    everything["mask"] = booleans
    expected, _ = oracle.dot_product_attention(**everything)
    expected_gradients = oracle.dot_product_attention_gradients(
        **everything, output_cotangent=cotangent
    )
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance)
    for name, found in zip(arrays, gradients, strict=True):
        wanted = expected_gradients[f"d{name}"]
        size = np.abs(wanted).max()
        np.testing.assert_allclose(
            found, wanted, rtol=tolerance, atol=tolerance * size, err_msg=name
        )
        if booleans is not None and name == "query":
            seen = np.broadcast_to(booleans.any(-1), found[..., 0].swapaxes(1, 2).shape)
            assert not found.swapaxes(1, 2)[~seen].any()


# Where the scale is no power of two, the query is rounded once more than by Keras: an
# error as large as that of rounding the result.
@pytest.mark.parametrize(("width", "times"), [(64, 1.01), (80, 1.5)])
def test_errors_of_bfloat16_are_about_those_of_keras(width, times):
    shape = (1, 256, 2, width)
    arrays = draw("bfloat16", query=shape, key=shape, value=shape)
    cotangent = rounded(RNG.normal(size=shape), "bfloat16")
    expected, _ = oracle.dot_product_attention(**arrays)
    gradients = oracle.dot_product_attention_gradients(
        **arrays, output_cotangent=cotangent
    )
    wanted = expected, *(gradients[f"d{name}"] for name in arrays)

    def of_keras(query, key, value):
        return keras.ops.dot_product_attention(query, key, value, flash_attention=False)

    def errors(function):
        output, gradients = outputs_and_gradients(
            function, list(arrays.values()), [cotangent], "bfloat16"
        )
        pairs = zip((*output, *gradients), wanted, strict=True)
        return np.array([np.abs(found - x).mean() for found, x in pairs])

    assert (errors(attend) <= times * errors(of_keras)).all()


def test_calls_mapped_by_jax_are_calls_of_their_own():
    import jax

    arrays = draw(query=(2, 1, 128, 2, 8), key=(1, 128, 2, 8), value=(2, 1, 128, 2, 8))
    valid = np.arange(128) < np.array([[[30]], [[128]]])

    def function(query, key, value, valid):
        return attend(query, key, value, mask=masks.Padding(valid))

    axes = (0, None, 0, 0)
    tensors = [to_tensor(x) for x in (*arrays.values(), valid)]
    found = to_numpy(call_at_once(jax.vmap(function, axes), tensors))
    for index in range(2):
        query, key, value = arrays.values()
        expected, _ = oracle.dot_product_attention(
            query[index], key, value[index], mask=valid[index][:, None, None]
        )
        np.testing.assert_allclose(found[index], expected, rtol=1e-5, atol=1e-5)
