"""Derivatives beyond the first gradient on TensorFlow.

Nested tapes differentiate a kernel's gradient, and a ForwardAccumulator the kernel.
Both are given the *formula*: the same call written with operations that have every
derivative.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def with_derivatives_of(formula: Callable, function: Callable, held: Any) -> Callable:
    """Returns a function that computes as one does and has the derivatives of another.

    Args:
        formula: Takes `held` and tensors; returns a list of what `function` returns.
        function: Takes `held` and tensors; returns a list of tensors.
        held: Tensors without derivatives, in dictionaries or tuples.
    """

    def run(*inputs):
        # To a gradient of a gradient only the tensors of this graph are in reach: what
        # it needs of the graph around is brought in.
        own = tf.nest.map_structure(tf.identity, held)
        inputs = [tf.identity(x) for x in inputs]
        if in_forward_mode(inputs):
            return formula(own, *inputs)

        @tf.custom_gradient
        def computed(*inputs):
            outputs = unrecorded(lambda *inputs: function(own, *inputs))(*inputs)
            own_formula = functools.partial(formula, own)
            return outputs, lambda *given: pulled_back(own_formula, inputs, [*given])

        return computed(*inputs)

    return run


def pulled_back(
    function: Callable, inputs: Sequence[Any], output_gradients: Any
) -> list[Any]:
    """Returns the gradients of all of a function's inputs."""
    if tf.executing_eagerly():
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        found = tape.gradient(outputs, inputs, output_gradients, _ZERO)
    else:  # where a ForwardAccumulator builds the graph, no tape works
        inputs = [tf.identity(x) for x in inputs]
        outputs = function(*inputs)
        found = tf.gradients(
            outputs, inputs, output_gradients, unconnected_gradients=_ZERO
        )
    return [tf.convert_to_tensor(gradient) for gradient in found]


_ZERO = tf.UnconnectedGradients.ZERO


def in_forward_mode(inputs: Sequence[Any]) -> bool:
    """Whether a `tf.autodiff.ForwardAccumulator` has tangents for any of the inputs.

    A gradient of one's own it takes eagerly only, and no tape works in what it calls.
    """
    if tf.executing_eagerly():
        return _asks_for_gradient(inputs)
    return any(map(_adds_tangents, inputs))


def _asks_for_gradient(inputs):
    asked = []

    @tf.custom_gradient
    def probe(*inputs):
        def gradient(_):
            asked.append(True)
            return [tf.zeros_like(x) for x in inputs]

        return tf.zeros(()), gradient

    probe(*inputs)
    return bool(asked)


def _adds_tangents(x):
    """Whether more than one operation comes into the graph for one of a tensor."""
    graph = tf.compat.v1.get_default_graph()
    x = tf.identity(x)  # one that the graph has, and need not capture
    before = graph.version
    tf.negative(x)
    return graph.version - before > 1


def unrecorded(function: Callable) -> Callable:
    """Returns the function of tensors, of which no tape keeps anything."""
    stop = tf.stop_gradient

    def run(*inputs):
        # A tape records what is made of tensors that it watches: it would keep every
        # tile. And in graphs zeros would be sent back through the loops over tiles.
        return tf.nest.map_structure(stop, function(*map(stop, inputs)))

    return run
