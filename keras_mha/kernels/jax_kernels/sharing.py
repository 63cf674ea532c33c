"""A kernel that several devices share by rows of the batch and by heads.

JAX has rules of its own for cuDNN's kernel, which ask for more than is so: that devices
have the same share of every tensor, and within `jax.vmap` a bias of all rows and heads.
XLA knows nothing of what is in a kernel, and would give the whole of every tensor to
every device. Axes are named by letters here: `b` for the batch, `n` for query heads,
`k` for key heads, and any other for one that each device has whole. The query says how
batch and heads are shared; what has one row or head for all goes to all of them.

JAX cannot export what says so. A program that is exported elsewhere for several devices
is right without, and each device then works out the whole call.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching
from jax.sharding import NamedSharding, PartitionSpec

_SHARED = "bnk"

# The axes of the tensors that kernels take and return.
_AXES = {
    "query": "btnh",
    "key": "bskh",
    "value": "bskh",
    "bias": "bnts",
    "lengths": "b",
    "segments": "bt",
    "sums": "bnt",
    "output": "btnh",
    "d_output": "btnh",
}


def is_needed() -> bool:
    """Whether this process has several GPUs, that may share a call."""
    return jax.default_backend() == "gpu" and jax.device_count() > 1


def as_one_call(
    function: Callable[[dict[str, Any]], tuple],
    tensors: dict[str, Any],
    found: tuple[str, ...],
) -> tuple:
    """Calls a kernel, which devices share, and of whose batch becomes what `jax.vmap`
    maps.

    Args:
        function: Takes and returns tensors, and does with some rows and heads what it
            does with all. What it returns for a tensor that has one row or head for
            all is a sum over them.
        tensors: What it takes, by names that have axes in `_AXES`; query and key are
            the first.
        found: Names of what it returns.
    """
    names = tuple(tensors)
    shared = _shared_by_devices(
        lambda *values: function(dict(zip(names, values, strict=True))),
        tuple(_AXES[name] for name in names),
        tuple(_AXES[name] for name in found),
    )
    call = custom_batching.custom_vmap(shared)

    @call.def_vmap
    def rule(size, is_mapped, *values):
        values = (
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(values, is_mapped, strict=True)
        )
        given = dict(zip(names, values, strict=True))
        rows = given["query"].shape[1]
        for_all = "bias" in given and given["bias"].shape[1] == 1 != rows
        if for_all:
            shape = (size, rows, *given["bias"].shape[2:])
            given["bias"] = jnp.broadcast_to(given["bias"], shape)
        merged = {
            name: x.reshape(size * rows, *x.shape[2:]) for name, x in given.items()
        }
        results = dict(zip(found, as_one_call(function, merged, found), strict=True))
        results = {
            name: x.reshape(size, rows, *x.shape[1:]) for name, x in results.items()
        }
        if for_all and "bias" in results:
            results["bias"] = jnp.sum(results["bias"], axis=1, keepdims=True)
        return tuple(results.values()), (True,) * len(found)

    return call(*tensors.values())


def _shared_by_devices(function, inputs, outputs):
    """Returns a function as XLA can share it among devices.

    Args:
        function: Takes and returns tensors.
        inputs: The axes of each tensor that it takes.
        outputs: The axes of each that it returns.
    """
    if not is_needed():
        return function
    from jax.experimental.custom_partitioning import custom_partitioning

    def infer(mesh, given, made):
        return _sharing(given).of(outputs, made)

    def partition(mesh, given, made):
        sharing = _sharing(given)
        found = sharing.of(outputs, made)

        def run(*tensors):
            results = sharing.with_own_key_head(function, inputs, outputs, tensors)
            return tuple(map(sharing.summed, results, found))

        return mesh, run, found, sharing.of(inputs, given)

    def rule(mesh, given, made):
        return _rule(given, inputs, made, outputs)

    run = custom_partitioning(lambda *tensors: tuple(function(*tensors)))
    run.def_partition(partition, infer, sharding_rule=rule)
    return run


class _Sharing(NamedTuple):
    """How a call is shared.

    Args:
        mesh: The devices.
        spec: For each letter along which axes of the mesh it is shared, if it is.
        key_heads: How many key heads there are, if there are too few for each device
            to have its own, and each has query heads of one of them; else `None`.
        query_heads: How many query heads each device has.
        readers: How many query heads read a key head.
    """

    mesh: Any
    spec: dict[str, Any]
    key_heads: int | None
    query_heads: int
    readers: int

    def of(self, axes: tuple[str, ...], tensors: tuple) -> tuple[NamedSharding, ...]:
        """Returns the shardings of tensors that have these axes."""

        def one(letters, x):
            lengths = zip(letters, x.shape, strict=True)
            parts = (self.spec.get(a) if n > 1 else None for a, n in lengths)
            return NamedSharding(self.mesh, PartitionSpec(*parts))

        return tuple(map(one, axes, tensors))

    def summed(self, x: Any, sharding: NamedSharding) -> Any:
        """Sums what devices have of a tensor that is not shared by all of them."""
        every = {*_names(self.spec["b"]), *_names(self.spec["n"])}
        axes = every - {name for part in sharding.spec for name in _names(part)}
        return jax.lax.psum(x, tuple(axes)) if axes else x

    def with_own_key_head(self, function, inputs, outputs, tensors):
        """Calls the function with the key head that this device's query heads read."""
        if self.key_heads is None:
            return function(*tensors)
        device = jax.lax.axis_index(_names(self.spec["n"]))
        head = device * self.query_heads // self.readers

        def cut(axes, x):
            if "k" not in axes:
                return x
            return jax.lax.dynamic_slice_in_dim(x, head, 1, axes.index("k"))

        def put_back(axes, x):
            if "k" not in axes:
                return x
            axis = axes.index("k")
            shape = (*x.shape[:axis], self.key_heads, *x.shape[axis + 1 :])
            every = jnp.zeros(shape, x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(every, x, head, axis)

        return tuple(map(put_back, outputs, function(*map(cut, inputs, tensors))))


def _sharing(given):
    query, key = given[:2]
    mesh, spec = query.sharding.mesh, (*query.sharding.spec, *(None,) * 4)
    rows, heads = spec[0], spec[2]
    if query.shape[0] % _parts(mesh, rows):
        rows = None
    count, groups = query.shape[2], key.shape[2]
    parts, readers = _parts(mesh, heads), count // groups
    of_keys, key_heads = heads, None
    if groups % parts or count % parts:
        # Each device is to have query heads of one key head, else it gets all.
        of_keys = None
        if count % parts or readers % (count // parts):
            heads, parts = None, 1
        else:
            key_heads = groups
    spec = {"b": rows, "n": heads, "k": of_keys}
    return _Sharing(mesh, spec, key_heads, count // parts, readers)


def _names(part):
    """Returns the names of the mesh's axes in one part of a sharding, as a tuple."""
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _parts(mesh, part):
    return math.prod(mesh.shape[name] for name in _names(part))


def _rule(given, inputs, made, outputs):
    """Returns which axes of the tensors are the same, for the compiler to know."""
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule

    sizes: dict[str, int] = {}
    whole: list[str] = []

    def mapping(axes, x):
        factors = []
        for axis, length in zip(axes, x.shape, strict=True):
            name = "n" if axis == "k" and sizes.get("n") == length else axis
            if axis not in _SHARED or sizes.setdefault(name, length) != length:
                name = f"whole{len(whole)}"
                whole.append(name)
            factors.append(name)
        return ArrayMapping(*factors)

    return SdyShardingRule(
        tuple(map(mapping, inputs, given)),
        tuple(map(mapping, outputs, made)),
        need_replication_factors=tuple(whole),
    )
