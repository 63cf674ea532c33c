"""Loops, tiles and gradients on TensorFlow: Python's eagerly, `tf.while_loop` else."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def loop(count: Any, body: Callable, carry: tuple) -> tuple:
    """Returns the carry after `carry = body(i, carry)` for `i` in `0 ... count - 1`."""
    if tf.executing_eagerly() or isinstance(count, int) and count <= 1:
        for index in range(int(count)):
            carry = body(index, carry)
        return carry
    return tf.while_loop(
        lambda index, carry: index < count,
        lambda index, carry: (index + 1, body(index, carry)),
        (tf.constant(0), carry),
        parallel_iterations=1,
    )[1]


def either(condition: Any, yes: Callable, no: Callable) -> Any:
    """Runs one of two functions without arguments, by a boolean worked out now."""
    return tf.cond(condition, yes, no)


def table(numbers: Any) -> Any:
    """Returns an array of integers that a loop's index may index."""
    return numbers if tf.executing_eagerly() else tf.constant(numbers)


def new_tiles(count: Any, shape: tuple, dtype: str, like: Any) -> Any:
    """Returns `count` tiles of zeros."""
    zeros = tf.zeros((count, *shape), dtype)
    # An array's elements are written in place; a tensor would be copied each time.
    tiles = tf.TensorArray(
        dtype, count, element_shape=zeros.shape[1:], clear_after_read=False
    )
    return tiles.unstack(zeros)


def put_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with one of them written."""
    return tiles.write(index, tile)


def add_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with something added to one of them."""
    return tiles.write(index, tiles.read(index) + tile)


def stacked(tiles: Any) -> Any:
    """Returns all tiles as one tensor, `(count, *shape)`."""
    return tiles.stack()


def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
    """Multiplies matrices, the last two axes."""
    return tf.matmul(x, y, transpose_a=transpose_x, transpose_b=transpose_y)


def row_max(x: Any) -> Any:
    """Returns the largest number along the last axis."""
    return tf.reduce_max(x, -1)


def xor_shifted(x: Any, bits: int) -> Any:
    """Returns `x ^ (x >> bits)` of int32, with the sign shifted in."""
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, bits))


def on_cpu(x: Any) -> bool:
    """Whether computations with `x` run on a CPU."""
    return not tf.config.list_logical_devices("GPU")


def with_gradient(
    forward: Callable, backward: Callable, problem: Any, tensors: dict[str, Any]
) -> Any:
    """Runs `forward` and differentiates it by `backward`; see `blockwise`."""
    names = [name for name in problem.differentiable if name in tensors]

    @tf.custom_gradient
    def attention(*inputs):
        output, lse = forward(problem, tensors | dict(zip(names, inputs, strict=True)))

        def gradient(output_gradient):
            found = backward(problem, tensors, output, lse, output_gradient)
            return [found[name] for name in names]

        return output, gradient

    return attention(*(tensors[name] for name in names))
