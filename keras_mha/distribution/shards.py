"""The axes of a mesh of JAX's along which a call of attention is shared."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_mha.distribution.parts import leaves
from keras_mha.kernels.parts import split_tensors
from keras_mha.masks import Dense, Mask


@dataclass(frozen=True)
class Shards:
    """Along which axes of a mesh what of a call is shared.

    Args:
        mesh: The devices.
        time: The axis for queries and keys.
        batch: The axis for rows of the batch; `None` if all have all.
        heads: The axis for heads; `None` if all have all.
    """

    mesh: Mesh
    time: str
    batch: str | None = None
    heads: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """The axes along which anything is shared."""
        axes = self.batch, self.heads, self.time
        return tuple(axis for axis in axes if axis is not None)

    def size(self, axis: str | None) -> int:
        """Returns how many devices are along an axis; 1 for `None`."""
        return 1 if axis is None else self.mesh.shape[axis]

    def index(self, axis: str | None) -> Any:
        """Returns the number of this device along an axis, within `run`."""
        return 0 if axis is None else jax.lax.axis_index(axis)

    def spec(self, x: Any, *axes: Any) -> PartitionSpec:
        """Returns by which axes a tensor is shared: these, but none that broadcasts."""
        return PartitionSpec(
            *(None if n == 1 else a for n, a in zip(x.shape, axes, strict=True))
        )

    def constrained(self, x: Any, spec: PartitionSpec) -> Any:
        """Returns a tensor that is shared along these axes."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def run(self, function: Any, specs: tuple, out_specs: Any, *tensors: Any) -> Any:
        """Runs a function of parts of tensors on every device."""
        # Unchecked: a loop's turns may then be skipped by each device for itself, and
        # sums over devices are written where they belong.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=out_specs,
            check_vma=False,
        )(*tensors)


def specs_of_mask(mask: Mask | None, dense: Any) -> tuple[PartitionSpec, ...]:
    """Returns by which axes the tensors of a mask are shared: `Dense` ones as `dense`
    says of their values, all others by none."""
    specs: list[PartitionSpec] = []
    for leaf in leaves(mask):
        if type(leaf) is Dense:
            specs.append(dense(leaf.values))
        else:
            specs += [PartitionSpec()] * len(split_tensors(leaf)[1])
    return tuple(specs)
