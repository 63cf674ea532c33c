"""Off a CPU half operands stay half in products, and sums are float32.

No other device is asked here: the switch that one would turn is forced on.
"""

import re

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.kernels import blockwise, reference, thresholds
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.half_products import factors_of_scale
from keras_mha.masks import Causal
from keras_mha.ops import planner
from tests import oracle
from tests.helpers import (
    only_jax,
    only_tensorflow,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

LENGTH, HEADS, GROUPS, WIDTH = 48, 4, 2, 16
SCALE = 0.3  # no power of two
KERNELS = {"blockwise": blockwise.attend, "reference": reference.attend}


def drawn(dtype):
    """Query, key, value, and a gradient of the output, as they are in a half type."""
    rng = np.random.default_rng(3)
    shapes = [(2, LENGTH, n, WIDTH) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    return [rounded(2 * rng.normal(size=shape), dtype) for shape in shapes]


def exact(arrays):
    *qkv, cotangent = arrays
    mask = np.tri(LENGTH, dtype=bool)
    output, _ = oracle.dot_product_attention(*qkv, mask=mask, scale=SCALE)
    found = oracle.dot_product_attention_gradients(
        *qkv, output_cotangent=cotangent, mask=mask, scale=SCALE
    )
    return [output, *(found[name] for name in ("dquery", "dkey", "dvalue"))]


def errors(function, arrays, dtype):
    """Root mean squares, of the output and the three gradients."""
    *qkv, cotangent = arrays
    outputs, gradients = outputs_and_gradients(function, qkv, [cotangent], dtype)
    found = zip((*outputs, *gradients), exact(arrays), strict=True)
    return [float(np.sqrt(np.mean((x - y) ** 2))) for x, y in found]


def ours(kernel, device):
    def attend(query, key, value):
        call = AttentionCall(
            query, key, value, mask=Causal(), scale=SCALE, device=device
        )
        return KERNELS[kernel](call).output

    return attend


def keras_layers(query, key, value):
    """What `keras.layers.MultiHeadAttention` computes without a fused kernel."""
    ops = keras.ops
    key, value = (ops.repeat(x, HEADS // GROUPS, axis=2) for x in (key, value))
    scores = ops.einsum("bsnh,btnh->bnts", key, query * SCALE)
    softmax = keras.layers.Softmax(dtype=keras.backend.standardize_dtype(query.dtype))
    scores = softmax(scores, mask=ops.convert_to_tensor(np.tri(LENGTH, dtype=bool)))
    return ops.einsum("bnts,bsnh->btnh", scores, value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
def test_half_products_err_no_more_than_those_of_keras(kernel, dtype):
    arrays = drawn(dtype)
    theirs = errors(keras_layers, arrays, dtype)
    mine = errors(ours(kernel, "gpu"), arrays, dtype)
    # Processors multiply half types by kernels of their own, some of which round less
    # in a product of one shape than of another: by up to 4 % where it was looked at.
    margin = 1.1 if keras.backend.backend() == "tensorflow" else 1.0
    assert all(x <= margin * y for x, y in zip(mine, theirs, strict=True)), (
        mine,
        theirs,
    )


@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
def test_a_cpu_multiplies_what_float32_makes_of_half_types(kernel):
    arrays = drawn("bfloat16")
    on_cpu = errors(ours(kernel, "cpu"), arrays, "bfloat16")
    elsewhere = errors(ours(kernel, "gpu"), arrays, "bfloat16")
    assert on_cpu[0] < elsewhere[0]
    assert errors(ours(kernel, None), arrays, "bfloat16") == on_cpu


@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
def test_float32_is_not_cut_down_on_any_device(kernel):
    arrays = drawn("float32")
    assert max(errors(ours(kernel, "gpu"), arrays, "float32")) < 1e-5


@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
def test_dropout_scales_up_what_is_kept(kernel):
    arrays = drawn("bfloat16")[:3]

    def attend(device):
        def function(*tensors):
            call = AttentionCall(
                *tensors, scale=SCALE, dropout=0.3, seed=5, device=device
            )
            return KERNELS[kernel](call).output

        cotangent = np.ones((2, LENGTH, HEADS, WIDTH))
        return outputs_and_gradients(function, arrays, [cotangent], "bfloat16")

    (output,), gradients = attend("gpu")
    (expected,), expected_gradients = attend("cpu")
    np.testing.assert_allclose(output, expected, atol=0.25)
    for x, y in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


ROUNDED = {"tensorflow": list(KERNELS), "torch": ["reference"], "jax": []}


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_products_are_not_rounded_to_the_half_type(kernel):
    """Logits near 100 that differ by less than bfloat16's step of 0.5 there."""
    query, value = np.ones((1, 1, 1, 2)), np.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    key = np.array([[64.0, 36.0], [64.0, 36.25]]).reshape(1, 2, 1, 2)
    tensors = [to_tensor(x, "bfloat16") for x in (query, key, value)]
    call = AttentionCall(*tensors, device="gpu")
    output = to_numpy(KERNELS[kernel](call).output)
    # But where the backend has no such product, or none with a gradient.
    is_rounded = kernel in ROUNDED[keras.backend.backend()]
    expected = 0.5 if is_rounded else 1 / (1 + np.exp(-0.25))
    np.testing.assert_allclose(output, expected, atol=2e-3)


@pytest.mark.parametrize("scale", [0.125, 0.3, -0.7, 5.0, 0.0, 1e-7])
def test_a_half_query_is_scaled_by_a_power_of_two_alone(scale):
    early, late = factors_of_scale(scale, to_tensor(np.ones(1), "float16"))
    assert early * late == scale
    assert np.log2(early) == int(np.log2(early))
    assert early >= 2**-8  # a number of float16 is not lost
    assert factors_of_scale(scale, to_tensor(np.ones(1), "float32")) == (scale, 1.0)


# ------------------------------------------------------------ TensorFlow, as on a GPU


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    from keras_mha.kernels import backends

    monkeypatch.setattr(backends.current(), "device_kind", lambda x: "gpu")


@only_tensorflow
@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("memory", [2**34, 2**12])
def test_a_layer_of_half_types_trains_as_on_a_gpu(
    as_on_a_gpu, monkeypatch, memory, xla
):
    """With whole scores, which fit into 16 GiB, and in tiles, where they do not."""
    monkeypatch.setattr(thresholds, "MEMORY", memory)
    plans = []
    plan = planner.plan
    monkeypatch.setattr(
        planner, "plan", lambda *call: plans.append(plan(*call)) or plans[-1]
    )
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(1).normal(size=(4, 48, 16)).astype("float32")
    layer = keras_mha.MultiHeadAttention(2, 8, dropout=0.1, dtype="mixed_bfloat16")
    inputs = keras.Input((48, 16))
    model = keras.Model(inputs, layer(inputs, use_causal_mask=True))
    model.compile("adam", "mse", jit_compile=xla)
    before = model.evaluate(x, 0 * x, verbose=0)
    model.fit(x, 0 * x, epochs=3, batch_size=2, verbose=0)
    assert model.evaluate(x, 0 * x, verbose=0) < before
    taken = {each.implementation for each in plans}
    assert taken == {"reference" if memory == 2**34 else "blockwise"}


# ------------------------------------------------ programs of JAX for other platforms


def products(platform, length, dtype):
    """The operands' dtypes of all products of a training step that is exported."""
    import jax
    from jax import export
    from jax import numpy as jnp

    def loss(*tensors):
        output = keras_mha.dot_product_attention(*tensors, mask=Causal())
        return jnp.sum(jnp.square(output.astype("float32")))

    x = jax.ShapeDtypeStruct((2, length, 4, 64), dtype)
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    module = export.export(step, platforms=[platform])(x, x, x).mlir_module()
    pattern = r"dot_general[^\n]*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)"
    return [dtype for pair in re.findall(pattern, module) for dtype in pair]


@only_jax
@pytest.mark.parametrize("length", [128, 1024])
@pytest.mark.parametrize("platform", ["rocm", "cpu"])
def test_a_program_multiplies_as_its_platform_does_best(platform, length):
    """Not as that on which it is written."""
    found = products(platform, length, "bfloat16")
    assert len(found) >= 2 * 5  # forward and gradient
    assert set(found) == {"f32" if platform == "cpu" else "bf16"}


@only_jax
def test_a_program_for_several_platforms_multiplies_as_each_does_best():
    import jax
    from jax import export

    x = jax.ShapeDtypeStruct((2, 1024, 4, 64), "bfloat16")
    step = jax.jit(lambda x: keras_mha.dot_product_attention(x, x, x))
    module = export.export(step, platforms=["cpu", "rocm"])(x).mlir_module()
    found = re.findall(r"dot_general[^\n]*: \(tensor<[^>]*x(\w+)>, tensor", module)
    assert set(found) == {"f32", "bf16"}


@only_jax
def test_a_program_can_be_exported_for_every_platform_at_once():
    """It is to run under later versions of JAX, which promises them none of a GPU's
    kernels; those of a TPU it does."""
    import jax
    from jax import export

    def loss(x):
        output = keras_mha.dot_product_attention(x, x, x, mask=Causal())
        return output.astype("float32").sum()

    x = jax.ShapeDtypeStruct((2, 1024, 4, 64), "bfloat16")
    exported = export.export(jax.jit(jax.grad(loss)), platforms=["cpu", "tpu", "cuda"])
    module = exported(x).mlir_module()
    assert "tpu_custom_call" in module
    assert "__cudnn" not in module
