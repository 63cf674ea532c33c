"""Derivatives beyond the first gradient, of every kernel.

The reference kernel is plain formulas, which a backend differentiates as often as it is
asked to: the others are held to it here, and it to the float64 definition.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.biases import ByDistance, Slopes
from keras_mha.kernels import backends, blockwise, tiling
from tests import oracle
from tests.helpers import (
    backend_jit,
    call_at_once,
    gradients,
    only_jax,
    only_tensorflow,
    only_torch,
    second_derivatives,
    tangent,
    to_numpy,
    to_tensor,
    with_variables,
)

IS_TORCH = keras.backend.backend() == "torch"
B, T, S, N, K, H, V = 2, 20, 22, 4, 2, 5, 3
RNG = np.random.default_rng(0)
VALID = RNG.uniform(size=(B, S)) < 0.6
VALID[1] = False  # rows that see nothing
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], "float32")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(tiling, "_MULTIPLE", 4)
    monkeypatch.setattr(backends.current(), "FEW_SCORES", 0)


# A case: further arrays to differentiate by, and what the call is given besides. What
# torch's own kernel takes it takes in one call, and in slices if nothing in it learns.
BY_ONE_CALL = {
    "plain": ({}, {}),
    "causal": ({}, {"mask": masks.Causal}),
    "padding": ({}, {"mask": lambda: masks.Padding(to_tensor(VALID))}),
    "window": ({}, {"mask": lambda: masks.Causal() & masks.SlidingWindow(5)}),
    "ALiBi": ({}, {"position_bias": lambda: Slopes(SLOPES), "mask": masks.Causal}),
    "bias": ({"bias": (1, N, T, S)}, {"mask": masks.Causal}),
    "T5": ({"table": (N, 9)}, {"mask": masks.Causal}),
}
CASES = BY_ONE_CALL | {
    "soft cap": ({}, {"mask": masks.Causal, "logit_soft_cap": 1.5}),
    "sink": ({"sink": (N,)}, {"mask": lambda: masks.Causal(-3)}),
    "dropout": ({}, {"mask": masks.Causal, "dropout": 0.3, "seed": 5}),
}
RUNS = [(case, "blockwise") for case in CASES]
if IS_TORCH:
    RUNS += [(case, "fused") for case in BY_ONE_CALL]
    RUNS += [(case, "slices") for case in [*BY_ONE_CALL][:5]]


def draw_arrays(**shapes):
    sizes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, V)}
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=x) for name, x in (sizes | shapes).items()}


def draw_like(arrays):
    rng = np.random.default_rng(2)
    return [rng.normal(size=x.shape) for x in arrays]


def attention(names, given, implementation):
    def function(*tensors):
        tensors = dict(zip(names, tensors, strict=True))
        options = {name: x() if callable(x) else x for name, x in given.items()}
        if "table" in tensors:
            options["position_bias"] = ByDistance(tensors.pop("table"))
        return keras_mha.dot_product_attention(
            **tensors, **options, implementation=implementation
        )

    return function


@pytest.fixture
def implementation(request, monkeypatch):
    if request.param != "slices":
        return request.param
    from keras_mha.kernels.torch_kernels import sdpa

    monkeypatch.setattr(sdpa, "_ROWS", 8)
    monkeypatch.setattr(sdpa, "_WHOLE", 4)
    return "fused"


@pytest.mark.parametrize(("case", "implementation"), RUNS, indirect=["implementation"])
def test_second_derivatives_are_those_of_the_reference(case, implementation):
    shapes, given = CASES[case]
    arrays = draw_arrays(**shapes)
    cotangent, directions = np.cos(np.ones((B, T, N, V))), draw_like(arrays.values())
    found, expected = (
        second_derivatives(
            attention(arrays, given, name), [*arrays.values()], cotangent, directions
        )
        for name in (implementation, "reference")
    )
    for name, ours, theirs in zip(arrays, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)
        assert np.abs(theirs).max() > 1e-3, name


@pytest.mark.parametrize(("case", "implementation"), RUNS, indirect=["implementation"])
def test_forward_mode_is_that_of_the_reference(case, implementation):
    shapes, given = CASES[case]
    arrays = draw_arrays(**shapes)
    found, expected = (
        tangent(
            attention(arrays, given, name),
            [*arrays.values()],
            draw_like(arrays.values()),
        )
        for name in (implementation, "reference")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "implementation",
    ["reference", "blockwise", *["fused", "slices"] * IS_TORCH],
    indirect=True,
)
def test_second_derivatives_and_forward_mode_are_those_of_the_definition(
    implementation,
):
    arrays = list(draw_arrays().values())
    directions, step = draw_like(arrays), 1e-5
    cotangent = RNG.normal(size=(B, T, N, V))
    mask = np.arange(T)[:, None] >= np.arange(S)

    def ahead(step):
        moved = [x + step * d for x, d in zip(arrays, directions, strict=True)]
        output, _ = oracle.dot_product_attention(*moved, mask=mask)
        found = oracle.dot_product_attention_gradients(
            *moved, mask=mask, output_cotangent=cotangent
        )
        return output, *(found[name] for name in ("dquery", "dkey", "dvalue"))

    output, *expected = (
        (after - before) / (2 * step)
        for after, before in zip(ahead(step), ahead(-step), strict=True)
    )
    names = ("query", "key", "value")
    function = attention(names, {"mask": masks.Causal}, implementation)
    found = tangent(function, arrays, directions)
    np.testing.assert_allclose(found, output, atol=1e-5)
    found = second_derivatives(function, arrays, cotangent, directions)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", ["blockwise", *["fused"] * IS_TORCH])
def test_second_derivatives_in_a_half_type(implementation, dtype):
    arrays = draw_arrays(value=(B, S, K, H))
    cotangent, directions = np.ones((B, T, N, H)), draw_like(arrays.values())
    found, expected = (
        second_derivatives(
            attention(arrays, {"mask": masks.Causal}, name),
            [*arrays.values()],
            cotangent,
            directions,
            dtype,
        )
        for name in (implementation, "reference")
    )
    for ours, theirs in zip(found, expected, strict=True):
        limit = 0.02 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=limit)


def test_the_first_gradient_does_not_take_the_formula(monkeypatch):
    def whole(*args):
        raise AssertionError("all scores at once")

    monkeypatch.setattr(blockwise, "whole", whole)
    arrays = draw_arrays()
    function = attention(arrays, {}, "blockwise")
    cotangent = np.ones((B, T, N, V))
    for compiled in (function, backend_jit(function)):
        gradients(compiled, [*arrays.values()], cotangent)
    # That it would be taken is what says that the above can fail.
    with pytest.raises(AssertionError, match="all scores at once"):
        directions = draw_like(arrays.values())
        second_derivatives(function, [*arrays.values()], cotangent, directions)


@pytest.mark.parametrize("flash_attention", [None, True])
def test_a_penalty_on_the_layers_gradient_trains_its_weights(flash_attention):
    layers = [
        keras_mha.MultiHeadAttention(2, 4, flash_attention=flash, seed=1)
        for flash in (flash_attention, False)
    ]
    x = RNG.normal(size=(2, 20, 8))
    found = []
    for layer in layers:
        layer.build(x.shape, x.shape)
        layer.set_weights(layers[0].get_weights())
        weights = layer.trainable_variables
        arrays = [x, *map(np.asarray, layer.get_weights())]
        directions = draw_like(arrays)
        call = with_variables(
            lambda x, layer=layer: layer(x, x, use_causal_mask=True), weights
        )
        found.append(second_derivatives(call, arrays, np.ones((2, 20, 8)), directions))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


# ----------------------------------------------------------------------------- PyTorch


@only_torch
@pytest.mark.parametrize(
    "implementation", ["blockwise", "fused", "slices"], indirect=True
)
def test_torchs_own_check_of_second_derivatives(implementation):
    import torch

    tensors = [
        to_tensor(RNG.normal(size=(1, length, 1, 2)), "float64").requires_grad_()
        for length in (9, 10, 10)
    ]
    names = ("query", "key", "value")
    function = attention(names, {"mask": masks.Causal}, implementation)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@only_torch
@pytest.mark.parametrize(
    "implementation", ["blockwise", "fused", "slices"], indirect=True
)
def test_the_transformations_of_torch(implementation):
    import torch

    x = to_tensor(RNG.normal(size=(3, 10, 2, 2)))

    def loss(name):
        def function(x):
            heads = x.reshape(-1, *x.shape[-3:])
            mask = masks.Causal() & masks.SlidingWindow(4)
            return keras_mha.dot_product_attention(
                heads, heads, heads.sin(), mask=mask, implementation=name
            ).sum()

        return function

    for transformed in (
        lambda loss: torch.func.grad(loss)(x),
        lambda loss: torch.func.vmap(torch.func.grad(loss))(x),
        lambda loss: torch.func.hessian(loss)(x[:1, :4]),
        lambda loss: torch.func.vmap(torch.func.hessian(loss))(x[:, :4]),
        lambda loss: torch.func.jacrev(torch.func.jacrev(loss))(x[:1, :4]),
    ):
        found, expected = (
            transformed(loss(implementation)),
            transformed(loss("reference")),
        )
        np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-5)


@only_torch
@pytest.mark.parametrize("implementation", ["blockwise", "fused"])
def test_one_tensor_as_query_key_and_value(implementation):
    import torch

    x = to_tensor(RNG.normal(size=(1, 6, 2, 4))).requires_grad_()

    def run(name):
        heads = keras_mha.dot_product_attention(x, x, x, implementation=name)
        (first,) = torch.autograd.grad(heads.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    np.testing.assert_allclose(run(implementation), run("reference"), rtol=1e-4)


@only_torch
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_forward_mode_sees_the_weights_that_dropout_keeps(implementation):
    import torch

    x, direction = to_tensor(RNG.normal(size=(2, 1, 6, 2, 4)))

    def function(query):
        return keras_mha.dot_product_attention(
            query, x, x, dropout=0.5, seed=1, implementation=implementation
        ).sum()

    query = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(query), query)
    expected = (gradient * direction).sum()
    with torch.no_grad():
        _, found = torch.func.jvp(function, (x,), (direction,))
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), rtol=1e-4)


# --------------------------------------------------------------------------------- JAX


def jax_loss(implementation, **options):
    def loss(x):
        heads = x.reshape(-1, *x.shape[-3:])
        return (
            keras_mha.dot_product_attention(
                heads,
                heads,
                heads * 0.5,
                mask=masks.Causal(),
                implementation=implementation,
                **options,
            )
            ** 2
        ).sum()

    return loss


def scanned(loss):
    import jax

    def step(x, _):
        return x - 0.1 * jax.grad(jax.checkpoint(loss))(x), None

    return lambda x: jax.lax.scan(step, x, None, length=2)[0].sum()


TRANSFORMATIONS = {
    "linearize": lambda jax, loss, x: jax.linearize(loss, x)[1](jax.numpy.cos(x)),
    "hessian": lambda jax, loss, x: jax.hessian(loss)(x[0, :4]),
    "hessian by vmap": lambda jax, loss, x: jax.vmap(jax.hessian(loss))(x[:, :4]),
    "forward over reverse": lambda jax, loss, x: jax.jvp(
        jax.grad(loss), (x,), (jax.numpy.cos(x),)
    )[1],
    "reverse over forward": lambda jax, loss, x: jax.grad(
        lambda x: jax.jvp(loss, (x,), (jax.numpy.cos(x),))[1]
    )(x),
    "vmap of grad": lambda jax, loss, x: jax.vmap(jax.grad(loss))(x),
    "grad of nested vmap": lambda jax, loss, x: jax.grad(
        lambda x: jax.vmap(jax.vmap(loss))(x[:, None]).sum()
    )(x),
    "grad in a map": lambda jax, loss, x: jax.lax.map(jax.grad(loss), x),
    "grad of a map": lambda jax, loss, x: jax.grad(
        lambda x: jax.lax.map(loss, x, batch_size=2).sum()
    )(x),
    "grad of vmap over some": lambda jax, loss, x: jax.grad(
        lambda x: jax.vmap(lambda y: loss(x + y))(x).sum()
    )(x),
    "checkpoint": lambda jax, loss, x: jax.grad(jax.checkpoint(loss))(x),
    "grad of grad in scan": lambda jax, loss, x: jax.grad(scanned(loss))(x),
    "third": lambda jax, loss, x: jax.grad(
        lambda s: jax.grad(jax.grad(lambda s: loss(s * x)))(s)
    )(1.0),
}


@only_jax
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_transformations_of_jax(name):
    import jax

    def both(x):
        return [
            TRANSFORMATIONS[name](jax, jax_loss(kernel, dropout=0.2, seed=3), x)
            for kernel in ("blockwise", "reference")
        ]

    found, expected = call_at_once(both, [to_tensor(RNG.normal(size=(2, 20, 2, 3)))])
    # A third derivative along one number is a sum of which most cancels: in float64 it
    # agrees to 1e-11.
    share = 1e-3 if name == "third" else 1e-5
    limit = share * max(1, np.abs(to_numpy(expected)).max())
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=limit)


@only_jax
def test_masks_that_vmap_maps():
    import jax

    x = to_tensor(RNG.normal(size=(3, 2, 20, 2, 3)))
    valid = to_tensor(RNG.uniform(size=(3, 2, 20)) < 0.7)

    def gradient(name):
        def loss(x, valid):
            mask = masks.Padding(valid) & masks.Causal()
            return jax.numpy.sum(
                keras_mha.dot_product_attention(x, x, x, mask=mask, implementation=name)
                ** 2
            )

        return lambda x, valid: (
            jax.vmap(jax.grad(loss))(x, valid),
            jax.vmap(jax.grad(loss), (None, 0))(x[0], valid),
            jax.grad(lambda x: jax.vmap(loss, (0, None))(x, valid[0]).sum())(x),
        )

    found, expected = call_at_once(
        lambda *args: (gradient("blockwise")(*args), gradient("reference")(*args)),
        [x, valid],
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            to_numpy(ours), to_numpy(theirs), rtol=1e-5, atol=1e-5
        )


@only_jax
def test_masks_and_biases_that_nested_vmaps_map():
    import jax

    x = to_tensor(RNG.normal(size=(2, 3, 2, 20, 2, 3)))
    valid = to_tensor(RNG.uniform(size=(3, 2, 20)) < 0.7)  # by the inner one
    bias = to_tensor(RNG.normal(size=(2, 1, 2, 20, 20)))  # by the outer one

    def gradients(name):
        def loss(x, valid, bias):
            mask = masks.Padding(valid) & masks.Causal()
            output = keras_mha.dot_product_attention(
                x, x, x, mask=mask, bias=bias, implementation=name
            )
            return jax.numpy.sum(output**2)

        def total(x, valid, bias):
            inner = jax.vmap(loss, (0, 0, None))
            return jax.vmap(inner, (0, None, 0))(x, valid, bias).sum()

        return jax.grad(total, (0, 2))

    found, expected = call_at_once(
        lambda *args: (gradients("blockwise")(*args), gradients("reference")(*args)),
        [x, valid, bias],
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            to_numpy(ours), to_numpy(theirs), rtol=1e-5, atol=1e-5
        )


@only_jax
def test_forward_mode_without_jit():
    import jax

    x = to_tensor(RNG.normal(size=(1, 20, 2, 3)))
    found, expected = (
        jax.jvp(jax.grad(jax_loss(name)), (x,), (x,))[1]
        for name in ("blockwise", "reference")
    )
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=5e-4)


# -------------------------------------------------------------------------- TensorFlow


def tensorflow_products(x, implementation):
    """Of the second derivative with a direction, found in three ways."""
    import tensorflow as tf

    def loss(x):
        heads = keras_mha.dot_product_attention(
            x, x, tf.sin(x), mask=masks.Causal(), implementation=implementation
        )
        return tf.reduce_sum(heads**2)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return tape.gradient(value, x)

    direction = tf.cos(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        product = tf.reduce_sum(gradient(x) * direction)
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        first = gradient(x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.autodiff.ForwardAccumulator(x, direction) as inner:
            value = loss(x)
        slope = inner.jvp(value)
    return tape.gradient(product, x), accumulator.jvp(first), outer.gradient(slope, x)


@only_tensorflow
@pytest.mark.parametrize("compiled", ["eagerly", "graph", "XLA"])
def test_nested_tapes_and_forward_accumulators(compiled):
    x = to_tensor(RNG.normal(size=(1, 20, 2, 3)))
    run = tensorflow_products
    if compiled != "eagerly":
        run = backend_jit(run, xla=compiled == "XLA")
    expected = tensorflow_products(x, "reference")
    for ours, theirs in zip(run(x, "blockwise"), expected, strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), atol=1e-4)


def tensorflow_derivatives_around_a_function(x, valid, implementation):
    import tensorflow as tf

    @tf.function
    def attend(x, valid):
        mask = masks.Padding(tf.logical_not(valid)) & masks.Causal()
        return keras_mha.dot_product_attention(
            x, x, x, mask=mask, dropout=0.2, seed=1, implementation=implementation
        )

    with tf.autodiff.ForwardAccumulator(x, tf.cos(x)) as accumulator:
        output = attend(x, valid)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(attend(x, valid) ** 2)
        product = tf.reduce_sum(inner.gradient(loss, x) * tf.cos(x))
    return accumulator.jvp(output), outer.gradient(product, x)


@only_tensorflow
@pytest.mark.parametrize("compiled", ["eagerly", "graph", "XLA"])
def test_tapes_and_accumulators_around_a_function_of_a_mask_made_in_it(compiled):
    x = to_tensor(RNG.normal(size=(1, 20, 2, 3)))
    valid = to_tensor(np.arange(20)[None] > 16)
    run = tensorflow_derivatives_around_a_function
    expected = run(x, valid, "reference")
    if compiled != "eagerly":
        run = backend_jit(run, xla=compiled == "XLA")
    for ours, theirs in zip(run(x, valid, "blockwise"), expected, strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), atol=1e-4)


@only_tensorflow
def test_forward_mode_over_a_gradient_in_its_cotangent():
    import tensorflow as tf

    x = to_tensor(RNG.normal(size=(1, 20, 2, 3)))

    def run(name):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = keras_mha.dot_product_attention(x, x, x, implementation=name)
        cotangent = tf.sin(x)
        with tf.autodiff.ForwardAccumulator(cotangent, x) as accumulator:
            gradient = tape.gradient(output, x, cotangent)
        return accumulator.jvp(gradient)

    found, expected = to_numpy(run("blockwise")), to_numpy(run("reference"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@only_tensorflow
def test_second_derivatives_of_unknown_lengths():
    import tensorflow as tf

    x = to_tensor(RNG.normal(size=(1, 20, 2, 3)))

    def run(x, name):
        def attend(x):
            return keras_mha.dot_product_attention(
                x, x, x, mask=masks.Causal(), implementation=name
            )

        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(attend(x) ** 2)
            product = tf.reduce_sum(inner.gradient(loss, x) * tf.cos(x))
        return outer.gradient(product, x)

    unknown = tf.function(
        lambda x: run(x, "blockwise"),
        input_signature=[tf.TensorSpec((None, None, 2, 3))],
    )
    np.testing.assert_allclose(unknown(x), run(x, "reference"), atol=1e-4)
