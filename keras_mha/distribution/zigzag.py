"""Exchanges halves between devices, from the order of tokens to zigzag and back.

Of `2 n` chunks device `d` of `n` has `2 d` and `2 d + 1` at first, and in zigzag `d`
and `2 n - 1 - d`. All even chunks go to different devices, and so do all odd ones.
"""

import jax.numpy as jnp
from jax import lax

from keras_mha._keras import Tensor


def ordered(x: Tensor, mesh_axis: str, axis: int) -> Tensor:
    """Returns a device's chunks in zigzag, of those that it has in the tokens' order.

    Args:
        x: What belongs to the device's tokens.
        mesh_axis: Of the devices that share them.
        axis: Of the tokens.
    """
    even, odd = jnp.split(x, 2, axis)
    even = lax.ppermute(even, mesh_axis, _moves(mesh_axis, 0))
    odd = lax.ppermute(odd, mesh_axis, _moves(mesh_axis, 1))
    return jnp.concatenate(_swapped_if_odd(even, odd, mesh_axis), axis)


def restored(x: Tensor, mesh_axis: str, axis: int) -> Tensor:
    """The way back from `ordered`."""
    even, odd = _swapped_if_odd(*jnp.split(x, 2, axis), mesh_axis)
    even = lax.ppermute(even, mesh_axis, _back(_moves(mesh_axis, 0)))
    odd = lax.ppermute(odd, mesh_axis, _back(_moves(mesh_axis, 1)))
    return jnp.concatenate([even, odd], axis)


def _moves(mesh_axis, odd):
    """Returns from which device to which the even or the odd chunks go."""
    size = lax.axis_size(mesh_axis)
    chunks = [2 * device + odd for device in range(size)]
    return [(c // 2, c if c < size else 2 * size - 1 - c) for c in chunks]


def _back(moves):
    return [(after, before) for before, after in moves]


def _swapped_if_odd(first, second, mesh_axis):
    """A device's first chunk has the parity of its number, and the second the other."""
    is_odd = lax.axis_index(mesh_axis) % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
