"""What the tests need from a backend, said once for all three.

Nothing here knows of attention. A backend's library is imported inside the function
that needs it, so that this module loads under every backend.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest

only_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="speaks of the JAX backend"
)
only_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="speaks of the TensorFlow backend"
)
only_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="speaks of the PyTorch backend"
)


needs_window_of_keras = pytest.mark.skipif(
    "sliding_window" not in signature(keras.layers.MultiHeadAttention).parameters,
    reason="the layer of this version of Keras has no sliding_window",
)


def to_tensor(array: Any, dtype: str | None = None) -> Any:
    """The backend's tensor; float64 arrays become float32 unless a dtype is named."""
    array = np.asarray(array)
    if dtype is None and array.dtype == np.float64:
        dtype = "float32"
    # Cast by NumPy: in JAX a cast is a program to compile, for each shape anew.
    return keras.ops.convert_to_tensor(as_dtype(array, dtype) if dtype else array)


def to_numpy(tensor: Any) -> np.ndarray:
    """A NumPy array; every float type comes as float64, which holds it exactly."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    # TensorFlow makes no NumPy array of a bfloat16 that has no axes.
    if dtype == "bfloat16" and keras.backend.backend() == "tensorflow":
        tensor = keras.ops.cast(tensor, "float32")
    array = keras.ops.convert_to_numpy(tensor)
    return array.astype("float64") if "float" in dtype else array


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values that are left of `array` once it was stored as `dtype`."""
    return as_dtype(array, dtype).astype("float64")


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array.astype(dtype)`, where NumPy has no bfloat16 of its own."""
    return np.asarray(array).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    )


def outputs_and_gradients(
    function: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    cotangents: Sequence[np.ndarray | None],
    dtype: str = "float32",
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs `function` on the arrays and goes back through it once.

    Args:
        function: takes a tensor for each array; returns a tensor or a tuple of them.
        arrays: where the gradients are taken.
        cotangents: one for each tensor returned, None for zeros.
        dtype: of the tensors that `function` is given.

    Returns:
        The tensors returned, and for each array the gradient of
        sum_k sum(function(*arrays)[k] * cotangents[k]), all as float64.
    """
    tensors = [to_tensor(array, dtype) for array in arrays]

    def as_tuple(*inputs):
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    run = {
        "tensorflow": _pull_back_tensorflow,
        "jax": _pull_back_jax,
        "torch": _pull_back_torch,
    }[keras.backend.backend()]
    outputs, gradients = run(as_tuple, tensors, cotangents)
    return [to_numpy(x) for x in outputs], [to_numpy(x) for x in gradients]


def gradients(
    function: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    cotangent: np.ndarray,
    dtype: str = "float32",
) -> list[np.ndarray]:
    """Gradients of sum(function(*tensors) * cotangent), one for each array."""
    return outputs_and_gradients(function, arrays, [cotangent], dtype)[1]


def _like(cotangent: np.ndarray | None, output: Any) -> Any:
    if cotangent is None:
        return keras.ops.zeros_like(output)
    return to_tensor(cotangent, keras.backend.standardize_dtype(output.dtype))


def _pull_back_tensorflow(function, tensors, cotangents):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = function(*tensors)
    weights = [_like(c, x) for c, x in zip(cotangents, outputs, strict=True)]
    found = tape.gradient(outputs, tensors, weights, unconnected_gradients="zero")
    return outputs, [tf.convert_to_tensor(gradient) for gradient in found]


def _pull_back_jax(function, tensors, cotangents):
    import jax

    def run(*inputs):
        outputs, pull_back = jax.vjp(function, *inputs)
        weights = [_like(c, x) for c, x in zip(cotangents, outputs, strict=True)]
        return outputs, pull_back(tuple(weights))

    return call_at_once(run, tensors)


def _pull_back_torch(function, tensors, cotangents):
    import torch

    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*tensors)
    weights = [_like(c, x) for c, x in zip(cotangents, outputs, strict=True)]
    found = torch.autograd.grad(
        outputs, tensors, weights, allow_unused=True, materialize_grads=True
    )
    return [output.detach() for output in outputs], found


def second_derivatives(
    function: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    cotangent: np.ndarray,
    directions: Sequence[np.ndarray],
    dtype: str = "float32",
) -> list[np.ndarray]:
    """Differentiates the gradient once more, going back through it.

    Returns:
        The gradients of sum_k sum(g_k * directions[k]), where the g_k are those of
        sum(function(*arrays) * cotangent).
    """
    tensors = [to_tensor(array, dtype) for array in arrays]
    cotangent = to_tensor(cotangent, dtype)
    directions = [to_tensor(direction, dtype) for direction in directions]
    run = {
        "tensorflow": _second_derivatives_tensorflow,
        "jax": _second_derivatives_jax,
        "torch": _second_derivatives_torch,
    }[keras.backend.backend()]
    return [to_numpy(x) for x in run(function, tensors, cotangent, directions)]


def _sum_of_products(xs, ys):
    return sum(keras.ops.sum(x * y) for x, y in zip(xs, ys, strict=True))


def _second_derivatives_tensorflow(function, tensors, cotangent, directions):
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            loss = tf.reduce_sum(function(*tensors) * cotangent)
        first = inner.gradient(loss, tensors)
        product = _sum_of_products(first, directions)
    found = outer.gradient(product, tensors, unconnected_gradients="zero")
    return [tf.convert_to_tensor(gradient) for gradient in found]


def _second_derivatives_jax(function, tensors, cotangent, directions):
    import jax

    every = tuple(range(len(tensors)))

    def product(*inputs):
        def loss(*inputs):
            return (function(*inputs) * cotangent).sum()

        return _sum_of_products(jax.grad(loss, every)(*inputs), directions)

    return call_at_once(jax.grad(product, every), tensors)


def _second_derivatives_torch(function, tensors, cotangent, directions):
    import torch

    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = (function(*tensors) * cotangent).sum()
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    product = _sum_of_products(first, directions)
    return torch.autograd.grad(
        product, tensors, allow_unused=True, materialize_grads=True
    )


def tangent(
    function: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    directions: Sequence[np.ndarray],
) -> np.ndarray:
    """Returns the derivative of `function(*arrays)` along the directions, found in
    forward mode."""
    tensors = [to_tensor(array) for array in arrays]
    directions = [to_tensor(direction) for direction in directions]
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def run(*inputs):
            return jax.jvp(function, inputs, tuple(directions))[1]

        return to_numpy(call_at_once(run, tensors))
    if backend == "torch":
        import torch

        return to_numpy(torch.func.jvp(function, (*tensors,), (*directions,))[1])
    import tensorflow as tf

    with tf.autodiff.ForwardAccumulator(tensors, directions) as accumulator:
        output = function(*tensors)
    return to_numpy(accumulator.jvp(output))


def call_at_once(function: Callable[..., Any], tensors: Sequence[Any]) -> Any:
    """`function(*tensors)`, which JAX compiles as one program.

    One op at a time, JAX would compile each of them apart, and most of a test's time
    would go there. The arrays are too small for optimizing the program to pay.
    """
    if keras.backend.backend() != "jax":
        return function(*tensors)
    import jax

    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*tensors).compile(options)(*tensors)


def with_variables(function: Callable[..., Any], variables: Sequence[Any]) -> Callable:
    """`function(*inputs)` as a function of its inputs and then the variables' values.

    With this the gradient of a layer's weights is one more argument's gradient.
    """

    def call(*tensors):
        split = len(tensors) - len(variables)
        mapping = list(zip(variables, tensors[split:], strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function(*tensors[:split])

    return call


def backend_jit(function: Callable[..., Any], *, xla: bool = False) -> Callable:
    """`function`, compiled by the backend: jax.jit, tf.function or torch.compile.

    `xla` asks TensorFlow for `jit_compile=True`; elsewhere it changes nothing. PyTorch
    traces and differentiates with its own compiler but leaves out the C++ one, which
    not every machine has.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=xla)
    import torch

    return torch.compile(function, backend="aot_eager")


@contextlib.contextmanager
def kernels_exported() -> Iterator[None]:
    """Has JAX export kernels of which it promises nothing to later versions."""
    import jax

    jax.config.update("jax_export_ignore_forward_compatibility", True)
    try:
        yield
    finally:
        jax.config.update("jax_export_ignore_forward_compatibility", False)


def skip_unless_one_graph() -> None:
    """Skips a test where `torch.compile` cannot read this version of Keras at all."""
    if not _keras_is_one_graph():
        pytest.skip("torch.compile cannot read the layers of this version of Keras")


@functools.cache
def _keras_is_one_graph():
    import torch

    layer = keras.layers.Dense(1)
    x = to_tensor(np.zeros((1, 1)))
    layer(x)
    try:
        torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported:
        return False
    return True
