"""Contestants under TensorFlow: both Keras layers and a plain formula as function."""

import tensorflow as tf

from benchmarks.cases import Case
from benchmarks.contestants import common


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


def _contestant(forward, training, case):
    if case.compiler != "eager":
        xla = case.compiler == "xla"
        forward = tf.function(forward, jit_compile=xla)
        training = tf.function(training, jit_compile=xla)
    return lambda: _done(forward()), lambda: _done(training())


def _done(tensors):
    for tensor in tf.nest.flatten(tensors):
        # Of a GPU a number is enough to wait for, and all would take long to come.
        (tensor if "CPU" in tensor.device else tf.reshape(tensor, [-1])[:1]).numpy()


def _function(function, case):
    x = tf.cast(common.heads(case), case.dtype)

    def training():
        tensors = [tf.identity(x) for _ in range(3)]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = tf.reduce_sum(function(*tensors))
        return tape.gradient(total, tensors)

    return _contestant(lambda: function(x, x, x), training, case)


def _layer(layer, call, case):
    # A variable: of a constant the compiler might work the result out beforehand.
    x = tf.Variable(tf.cast(common.inputs(case), case.dtype))
    weights = [variable.value for variable in layer.trainable_variables]

    def training():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(call(tf.convert_to_tensor(x), True))
        return tape.gradient(total, [x, *weights])

    return _contestant(lambda: call(tf.convert_to_tensor(x), False), training, case)


def decoding(layer, call, tokens, cache, program):
    """Makes a contestant of a step; see `decoding.py`."""
    step = tf.function(call)

    def done():
        output, new = step(tokens[0], cache)
        output.numpy()  # the cache is not fetched: that would copy it
        return output, new

    return done
