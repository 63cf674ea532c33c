"""Meshes whose axes are of the type `Explicit`, where shardings are part of types.

Every operation must then say how its result is sharded, which a tile, smaller than what
a device holds, cannot. So tiles are computed with axes of the type `Auto`, where the
compiler sees to it, and the result is sharded as the query is.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def in_auto_axes(function: Callable, tensors: dict[str, Any]) -> Any:
    """Returns `function(tensors)`, a tensor with the axes of `"query"` but for the
    width, computed without the types of a mesh's explicit axes."""
    meshes = (_mesh(x) for x in jax.tree.leaves(tensors))
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return function(tensors)
    query = tensors["query"]
    spec = PartitionSpec() if _mesh(query) is None else jax.typeof(query).sharding.spec
    batch, groups, _, shared, rows = (*spec, *(None,) * (5 - len(spec)))
    sharding = NamedSharding(mesh, PartitionSpec(batch, groups, None, shared, rows))
    run = jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=sharding
    )
    return run(tensors)


def _mesh(x):
    """Returns the mesh of a tensor if any axis of it is explicit."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return mesh if getattr(mesh, "explicit_axes", ()) else None
