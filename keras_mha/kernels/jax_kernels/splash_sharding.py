"""How devices share a call of splash attention: rows of the batch, and heads.

JAX's compiler shares no kernel out by itself, and raises where a program is for several
devices. So each is given its part by `jax.shard_map`, along the axes of the mesh that
is set in Keras.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras
from jax.sharding import Mesh, PartitionSpec

from keras_mha.kernels import backends
from keras_mha.kernels.backends import jax_manual_axes as manual_axes


class Sharing(NamedTuple):
    """Along which axes of a mesh devices share a call.

    Args:
        mesh: The devices.
        batch: The axis for rows of the batch; `None` if all have all.
        heads: The axis for heads; `None` if all have all.
    """

    mesh: Mesh
    batch: str | None
    heads: str | None

    def run(self, function: Callable, tensors: Any, has_heads: Any) -> Any:
        """Returns `function(*tensors)`, whose results have batch and heads in front.

        Args:
            function: Of one device's parts of the tensors.
            tensors: Their first axes are batch and heads, or one of the two.
            has_heads: As `tensors`: `"both"`, `"batch"` or `"heads"`.
        """
        specs = {
            "both": PartitionSpec(self.batch, self.heads),
            "batch": PartitionSpec(self.batch),
            "heads": PartitionSpec(self.heads),
        }
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=jax.tree.map(specs.get, has_heads),
            out_specs=specs["both"],
            check_vma=False,  # of which the kernel does not say what varies
        )(*tensors)


def refusal(batch: int, key_heads: int) -> str | None:
    """Returns why devices cannot share a call, or `None` if they can or need not."""
    if backends.current().device_count() > 1:
        found = _find(batch, key_heads)
        return found if isinstance(found, str) else None
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and manual_axes.varying(jax.lax.axis_index(manual[0])):
        return "jax's kernels do not say to jax.shard_map what varies (check_vma=True)"
    return None


def sharing(batch: int, key_heads: int) -> Sharing | None:
    """Returns how devices share a call that is not refused; `None` for one device."""
    if backends.current().device_count() == 1:
        return None
    return _find(batch, key_heads)


def _find(batch: int, key_heads: int) -> Sharing | str:
    distribution = keras.distribution.distribution()
    if jax.sharding.get_abstract_mesh().axis_names:
        return "the compiler shares no kernel of jax's out along the axes of a mesh"
    kind, heads = type(distribution), None
    if kind is keras.distribution.ModelParallel:
        # Keras has no public name for the layouts that it was given.
        layouts = getattr(distribution, "_layout_map", None)
        heads = getattr(layouts, "heads_axis", None)
        if heads is None:
            return "keras_mha.distribution.layout_map does not say who has which heads"
    elif kind is not keras.distribution.DataParallel:
        return (
            "several devices share a kernel of jax's where keras.distribution says how"
        )
    mesh = distribution.device_mesh.backend_mesh
    if mesh.size != backends.current().device_count():
        return "the program is not for the devices that keras.distribution is set to"
    if key_heads % mesh.shape.get(heads, 1):
        return "the key heads do not divide by the devices that share heads"
    shared = distribution.batch_dim_name
    # A batch that does not divide is whole on each device.
    return Sharing(mesh, None if batch % mesh.shape[shared] else shared, heads)
