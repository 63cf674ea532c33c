"""On TensorFlow, gradients of products of few rows read the kernel as it lies."""

from __future__ import annotations

import numpy as np
import pytest

import keras_mha
from tests.helpers import only_tensorflow, to_numpy, to_tensor

pytestmark = only_tensorflow


def product(x, kernel):
    from keras_mha.kernels.backends.tensorflow_few_rows import product

    return product(x, kernel)


def arrays(rows=4, width=64, out=128):
    """`x`, the kernel and a gradient of their product."""
    random = np.random.default_rng(0).normal
    shapes = [(rows, width), (width, out), (rows, out)]
    return [to_tensor(random(size=shape).astype("float32")) for shape in shapes]


def pulled_back(function, x, kernel, given):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch((x, kernel))
        y = function(x, kernel)
    return tape.gradient(y, (x, kernel), given)


def products_by_transposed_kernels(x, kernel, given):
    """How many products of a gradient's graph have their right factor transposed."""
    import tensorflow as tf

    program = tf.function(lambda *given: pulled_back(product, *given))
    operations = program.get_concrete_function(x, kernel, given).graph.get_operations()
    return sum(
        operation.type == "MatMul" and operation.get_attr("transpose_b")
        for operation in operations
        if operation.inputs and operation.inputs[-1].shape == kernel.shape
    )


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((16, 128, 128), 0),
        ((128, 512, 512), 0),
        ((16, 128, 512), 0),
        ((1, 512, 512), 1),
        ((32, 128, 128), 1),
        ((257, 1024, 1024), 1),
    ],
    ids=["few", "more", "not square", "one", "many", "more than were measured"],
)
def test_gradients_of_few_rows_transpose_no_kernel(shape, count):
    assert products_by_transposed_kernels(*arrays(*shape)) == count


def test_half_types_and_unknown_rows_are_left_to_tensorflow():
    import tensorflow as tf

    halves = [tf.cast(x, "bfloat16") for x in arrays(16, 128, 128)]
    assert products_by_transposed_kernels(*halves) == 1
    specs = [tf.TensorSpec((None, 128)), tf.TensorSpec((128, 128))]
    assert products_by_transposed_kernels(*specs, specs[0]) == 1


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_gradients_are_those_of_the_product(jit_compile):
    import tensorflow as tf

    x, kernel, given = arrays()
    program = tf.function(pulled_back, jit_compile=jit_compile)
    found = program(product, x, kernel, given)
    exact = [to_numpy(array).astype("float64") for array in (x, kernel, given)]
    expected = exact[2] @ exact[1].T, exact[0].T @ exact[2]
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(ours), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients():
    import tensorflow as tf

    x, kernel, given = arrays()

    @tf.function
    def second(function):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel, given))
            of_x, of_kernel = pulled_back(function, x, kernel, given)
            total = tf.reduce_sum(of_x**3) + tf.reduce_sum(of_kernel**3)
        return tape.gradient(total, (x, kernel, given))

    for ours, wanted in zip(second(product), second(tf.matmul), strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(wanted), rtol=1e-3)


@pytest.mark.parametrize("is_around", [False, True], ids=["within", "around"])
def test_forward_mode(is_around):
    import tensorflow as tf

    x, kernel, _ = arrays()
    tangents = tf.ones_like(x), tf.ones_like(kernel)
    function = tf.function(product) if is_around else product

    def pushed_forward():
        with tf.autodiff.ForwardAccumulator((x, kernel), tangents) as accumulator:
            y = function(x, kernel)
        return accumulator.jvp(y)

    found = (pushed_forward if is_around else tf.function(pushed_forward))()
    wanted = tf.matmul(tangents[0], kernel) + tf.matmul(x, tangents[1])
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), rtol=1e-4, atol=1e-4)


def test_a_saved_model_has_them_too(tmp_path):
    import tensorflow as tf

    layer = keras_mha.MultiHeadAttention(2, 64)
    x = arrays(16, 128)[0][None]
    layer.build(x.shape)

    def gradient(call):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x) ** 2
        return tape.gradient(y, x)

    module = tf.Module()
    module.layer = layer
    module.call = tf.function(layer, input_signature=[tf.TensorSpec(x.shape)])
    tf.saved_model.save(module, tmp_path / "saved")
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(
        to_numpy(gradient(loaded.call)), to_numpy(gradient(layer)), rtol=1e-3, atol=1e-5
    )
