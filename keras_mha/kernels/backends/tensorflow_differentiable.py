"""Derivatives beyond the first gradient on TensorFlow.

Nested tapes, and forward mode with them, differentiate a kernel's gradient. That they do
by the *formula*: the same call written with operations that have every derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def with_derivatives_of(formula: Callable, function: Callable) -> Callable:
    """Returns a function that computes as one does and has the derivatives of another.

    Args:
        formula: Takes tensors, and returns a list of what `function` returns.
        function: Takes tensors, and returns a list of tensors.
    """

    @tf.custom_gradient
    def run(*inputs):
        outputs = unrecorded(function)(*inputs)

        def gradient(*output_gradients):
            _, found = pulled_back(formula, inputs, list(output_gradients))
            return found

        return outputs, gradient

    return run


def pulled_back(
    function: Callable, inputs: Sequence[Any], output_gradients: Any
) -> tuple[Any, list[Any]]:
    """Returns what the function gives, and the gradients of all its inputs."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs)
    found = tape.gradient(
        outputs, inputs, output_gradients, tf.UnconnectedGradients.ZERO
    )
    return outputs, [tf.convert_to_tensor(gradient) for gradient in found]


def unrecorded(function: Callable) -> Callable:
    """Returns the function of tensors, of which no tape keeps anything."""
    # A tape records what is made of tensors that it watches: it would keep every tile.
    return lambda *inputs: function(*map(tf.stop_gradient, inputs))
