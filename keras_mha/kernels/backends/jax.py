"""Loops, tiles and gradients on JAX: loops are `while` loops of the compiled program."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def loop(count: Any, body: Callable, carry: tuple) -> tuple:
    """Returns the carry after `carry = body(i, carry)` for `i` in `0 ... count - 1`."""
    return jax.lax.fori_loop(0, count, body, carry)


def either(condition: Any, yes: Callable, no: Callable) -> Any:
    """Runs one of two functions without arguments, by a boolean worked out now."""
    return jax.lax.cond(condition, yes, no)


def table(numbers: Any) -> Any:
    """Returns an array of integers that a loop's index may index."""
    return jnp.asarray(numbers)


def new_tiles(count: int, shape: tuple, dtype: str, like: Any) -> Any:
    """Returns `count` tiles of zeros."""
    return jnp.zeros((count, *shape), dtype)


def put_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with one of them written."""
    return tiles.at[index].set(tile)


def add_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with something added to one of them."""
    return tiles.at[index].add(tile)


def stacked(tiles: Any) -> Any:
    """Returns all tiles as one tensor, `(count, *shape)`."""
    return tiles


def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
    """Multiplies matrices, the last two axes."""
    x = x.mT if transpose_x else x
    y = y.mT if transpose_y else y
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def row_max(x: Any) -> Any:
    """Returns the largest number along the last axis."""
    return x.max(-1)


def xor_shifted(x: Any, bits: int) -> Any:
    """Returns `x ^ (x >> bits)` of int32, with the sign shifted in."""
    return x ^ (x >> bits)


def on_cpu(x: Any) -> bool:
    """Whether computations with `x` run on a CPU."""
    return jax.default_backend() == "cpu"


def with_gradient(
    forward: Callable, backward: Callable, problem: Any, tensors: dict[str, Any]
) -> Any:
    """Runs `forward` and differentiates it by `backward`; see `blockwise`."""
    return _attention(forward, backward, problem, tensors)


# Compiled here too, for calls from outside of any `jax.jit`: a loop that is run eagerly
# would be compiled in every call.
@partial(jax.jit, static_argnums=(0, 1))
def _run(function, problem, *arguments):
    return function(problem, *arguments)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(forward, backward, problem, tensors):
    return _run(forward, problem, tensors)[0]


def _attention_forward(forward, backward, problem, tensors):
    output, lse = _run(forward, problem, tensors)
    return output, (tensors, output, lse)


def _attention_backward(forward, backward, problem, saved, output_gradient):
    gradients = _run(backward, problem, *saved, output_gradient)
    # None stands for no gradient: of the mask and of the seed.
    return ({name: gradients.get(name) for name in saved[0]},)


_attention.defvjp(_attention_forward, _attention_backward)
