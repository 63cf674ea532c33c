"""Contestants under JAX: both Keras layers, Flax's layer and JAX's function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from benchmarks.cases import FEATURES, GROUPS, HEADS, RATE, Case
from benchmarks.contestants import Contestant, common

COMPILERS = {"eager": "eager", "compiled": ""}  # of the grid's programs


def makers(case: Case) -> dict:
    """Returns a maker for each contestant of the case."""
    if case.kind == "function":
        found = {"keras_mha": lambda case: _function(common.our_function, case)}
        if common.has_whole_scores(case):
            found["jax.nn"] = lambda case: _function(_jax_nn, case)
        return found
    found = common.layers(case, _layer)
    # Of those that hold all scores, one will do where they take minutes.
    if case.kind != "biased" and not case.compiler and case.length <= 4096:
        found["flax.nnx"] = _flax
    return found


def _jax_nn(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def _ready(function, *arguments):
    return lambda: jax.block_until_ready(function(*arguments))


def _function(function, case):
    return of_function(function, [common.heads(case)] * 3, dtype=case.dtype)


def of_function(
    function: Callable, arrays: list[np.ndarray], dtype: str = "float32"
) -> Contestant:
    """Makes a contestant of an attention function of query, key and value, which are
    cast to `dtype`."""
    tensors = [jnp.asarray(array, dtype) for array in arrays]

    def loss(*tensors):
        return function(*tensors).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return _ready(jax.jit(function), *tensors), _ready(gradients, *tensors)


def _layer(layer, call, case):
    return of_layer(layer, call, [common.inputs(case)], case.compiler, case.dtype)


def of_layer(
    layer: keras.Layer,
    call: Callable[..., Any],
    arrays: list[np.ndarray],
    compiler: str = "",
    dtype: str = "float32",
) -> Contestant:
    """Makes a contestant of a layer.

    Args:
        layer: Built layer.
        call: How it is called: `call(*tensors, training=...)`.
        arrays: The inputs.
        compiler: As a `Case` has it.
        dtype: String, what the inputs are cast to.
    """
    tensors = [jnp.asarray(array, dtype) for array in arrays]
    weights = [variable.value for variable in layer.trainable_variables]

    def output(weights, tensors, training):
        given = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=given):
            return call(*tensors, training=training)

    def forward(weights, tensors):
        return output(weights, tensors, False)

    def loss(weights, tensors):
        return output(weights, tensors, True).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    if compiler == "eager":
        direct = _ready(lambda: call(*tensors, training=False))
        return direct, _ready(gradients, weights, tensors)
    return (
        _ready(jax.jit(forward), weights, tensors),
        _ready(jax.jit(gradients), weights, tensors),
    )


def _flax(case):
    from flax import nnx

    layer = nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        num_kv_heads=GROUPS if case.kind == "grouped" else None,
        dropout_rate=RATE if case.kind == "dropout" else 0.0,
        broadcast_dropout=False,
        decode=False,
        dtype=case.dtype,
        rngs=nnx.Rngs(0),
    )
    x = jnp.asarray(common.inputs(case), case.dtype)
    mask = jnp.asarray(common.allowed(case))[None, None]

    def forward(layer, x, mask):
        return layer(x, mask=mask, deterministic=True)

    def loss(layer, x, mask):
        return layer(x, mask=mask, deterministic=False).sum()

    gradients = nnx.jit(nnx.grad(loss, argnums=(0, 1)))
    return _ready(nnx.jit(forward), layer, x, mask), _ready(gradients, layer, x, mask)


def decoding(layer, call, tokens, cache, program):
    """Makes a contestant of a step, or of a scan of steps; see `decoding.py`."""
    weights = [variable.value for variable in layer.trainable_variables]

    def step(weights, token, cache):
        given = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=given):
            return call(token, cache)

    def scan(weights, tokens, cache):
        def body(cache, token):
            output, cache = step(weights, token, cache)
            return cache, output

        cache, outputs = jax.lax.scan(body, cache, tokens)
        return outputs, cache

    if program == "scan":
        return _ready(jax.jit(scan), weights, tokens, cache)
    return _ready(jax.jit(step), weights, tokens[0], cache)
