"""Axes of a mesh along which tensors vary within `jax.shard_map`.

A loop's carry, or what two branches return, must vary along the same axes at every
turn, and zeros vary along none: they are cast to vary as the tensors of the call do.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax

Axes = frozenset[str]

_axes: ContextVar[Axes] = ContextVar("axes", default=frozenset())


def varying(*tensors: Any) -> Axes:
    """Returns the axes along which any of these tensors varies."""
    return frozenset().union(*map(_varying, tensors))


def _varying(x):
    kind = jax.typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)  # since JAX 0.10
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def cast(x: Any, axes: Axes) -> Any:
    """Casts a tensor to vary along these axes too."""
    missing = axes - varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


@contextlib.contextmanager
def computing(*tensors: Any) -> Iterator[None]:
    """Sets for `alike` what these tensors, of one call, vary along."""
    token = _axes.set(varying(*tensors))
    try:
        yield
    finally:
        _axes.reset(token)


def alike(tree: Any) -> Any:
    """Casts all tensors to vary as those of the call that is being computed."""
    axes = _axes.get()
    return jax.tree.map(lambda x: cast(x, axes), tree) if axes else tree


def is_varying() -> bool:
    """Whether tensors of the call that is being computed vary along any axis."""
    return bool(_axes.get())


def shard_index(*tensors: Any) -> Any:
    """Returns the number of this device among those that these tensors vary over, or
    `None` where nothing says that they vary."""
    axes = varying(*tensors)
    if not axes:
        return None
    # In the mesh's order, in which arrays are sharded along several axes.
    mesh = jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.axis_index(tuple(axis for axis in mesh if axis in axes))
