"""Contestants under TensorFlow: both Keras layers and a plain formula as function."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.cases import Case
from benchmarks.contestants import Contestant, common

COMPILERS = {"eager": "eager", "compiled": "", "xla": "xla"}  # of the grid's programs


def makers(case: Case) -> dict:
    """Returns a maker for each contestant of the case."""
    if case.kind != "function":
        return common.layers(case, _layer)
    return {
        "keras_mha": lambda case: _function(common.our_function, case),
        "plain formula": lambda case: _function(_formula, case),
    }


def _formula(query, key, value):
    # TensorFlow has no function of its own: this is what people write.
    logits = tf.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    allowed = tf.linalg.band_part(tf.ones(logits.shape[2:], tf.bool), -1, 0)
    weights = tf.nn.softmax(tf.where(allowed, logits, -1e30))
    return tf.einsum("bnts,bsnh->btnh", weights, value)


def _contestant(forward, training, compiler):
    if compiler != "eager":
        xla = compiler == "xla"
        forward = tf.function(forward, jit_compile=xla)
        training = tf.function(training, jit_compile=xla)
    return lambda: _done(forward()), lambda: _done(training())


def _done(tensors):
    for tensor in tf.nest.flatten(tensors):
        # Of a GPU a number is enough to wait for, and all would take long to come.
        (tensor if "CPU" in tensor.device else tf.reshape(tensor, [-1])[:1]).numpy()


def _function(function, case):
    return of_function(function, [common.heads(case)] * 3, case.compiler, case.dtype)


def of_function(
    function: Callable,
    arrays: list[np.ndarray],
    compiler: str = "",
    dtype: str = "float32",
) -> Contestant:
    """Makes a contestant of an attention function of query, key and value, which are
    cast to `dtype`."""
    constants = [tf.cast(array, dtype) for array in arrays]

    def training():
        tensors = [tf.identity(x) for x in constants]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = tf.reduce_sum(function(*tensors))
        return tape.gradient(total, tensors)

    return _contestant(lambda: function(*constants), training, compiler)


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
    # Variables: of a constant the compiler might work the result out beforehand.
    inputs = [tf.Variable(tf.cast(array, dtype)) for array in arrays]
    weights = [variable.value for variable in layer.trainable_variables]

    def output(training):
        return call(*(tf.convert_to_tensor(x) for x in inputs), training=training)

    def training():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(output(True))
        return tape.gradient(total, [*inputs, *weights])

    return _contestant(lambda: output(False), training, compiler)


def decoding(layer, call, tokens, cache, program):
    """Makes a contestant of a step; see `decoding.py`."""
    step = tf.function(call)

    def done():
        output, new = step(tokens[0], cache)
        output.numpy()  # the cache is not fetched: that would copy it
        return output, new

    return done
