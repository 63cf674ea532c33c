"""What one device of a ring has of a call, what it computes of it, and hands on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from keras_mha._keras import Tensor, at_least_float32
from keras_mha.distribution import zigzag
from keras_mha.distribution.parts import (
    BiasOfPart,
    MaskOfPart,
    Part,
    leaf_of_part,
    with_leaves,
)
from keras_mha.distribution.ring_order import EMPTY, FULL, MIXED, Order
from keras_mha.distribution.shards import Shards, specs_of_mask
from keras_mha.kernels.dropout import OfPart
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.kernels.problem import Problem, groups_at_once
from keras_mha.masks import Dense, Mask

KEYS = ("key", "value")  # what goes around


@dataclass(frozen=True)
class RingProblem(Problem):
    """A problem that devices share.

    Args:
        shards: Along which axes of their mesh.
    """

    shards: Shards | None = None


def specs_of(problem: RingProblem, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns along which axes each tensor is shared."""
    shards = problem.shards
    time, batch, heads = shards.time, shards.batch, shards.heads
    axes = {
        "query": (batch, heads, None, None, time),
        "key": (batch, heads, None, time),
        "value": (batch, heads, None, time),
        "bias": (batch, heads, None, time, None),
        "sink": (heads, None),
    }
    specs = dict.fromkeys(tensors, PartitionSpec())
    for name in axes.keys() & tensors.keys():
        specs[name] = shards.spec(tensors[name], *axes[name])

    def dense(values):
        lead = (batch, heads)[: len(values.shape) - 2]  # (T, S), (B, T, S), ...
        return shards.spec(values, *lead, time, None)

    mask = join_tensors(problem.mask, tensors["mask"])
    return specs | {"mask": specs_of_mask(mask, dense)}


class Pair(NamedTuple):
    """A chunk of a device's rows and one of the keys that are with it.

    Args:
        height: How many rows.
        width: How many keys.
        rows: Where they begin among the device's.
        columns: Where they begin among the keys that are with it.
        row: Where the rows begin in the sequence.
        column: Where the keys begin in the sequence.
        masked: Whether the mask has to be looked at.
    """

    height: int
    width: int
    rows: Any
    columns: Any
    row: Any
    column: Any
    masked: bool

    def rows_of(self, x: Tensor) -> Tensor:
        """Returns these rows, of the last axis."""
        return lax.dynamic_slice_in_dim(x, self.rows, self.height, 4)

    def with_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Returns `x` with these rows replaced."""
        return lax.dynamic_update_slice_in_dim(x, rows, self.rows, 4)


class Device:
    """What a device does in a ring, in `jax.shard_map`."""

    def __init__(self, problem: RingProblem, order: Order, specs: dict, tensors: dict):
        self.problem, self.order, self.given = problem, order, tensors
        self.shards, self.specs = problem.shards, specs
        self.me = self.shards.index(self.shards.time)
        self.differentiable = [x for x in problem.differentiable if x != "sink"]
        self.height = tensors["query"].shape[4] // order.chunks
        self.width = tensors["key"].shape[3] // order.chunks
        mask = join_tensors(problem.mask, tensors["mask"])
        self.mask = with_leaves(mask, self._dense_in_order)
        # Which axis of a tensor is that of the device's tokens.
        self.time_axes = {"query": 4, "key": 3, "value": 3}
        if "bias" in tensors and specs["bias"][3] is not None:
            self.time_axes["bias"] = 3
        self.tensors = tensors | {
            name: self.in_order(tensors[name], axis)
            for name, axis in self.time_axes.items()
        }
        # What is merged and summed is in float32.
        self.tensors["query"] = at_least_float32(self.tensors["query"])

    # ------------------------------------------------------------------ order

    def in_order(self, x: Tensor, axis: int) -> Tensor:
        """Returns what belongs to a device's tokens as belonging to its chunks."""
        if self.order.chunks == 1:
            return x
        return zigzag.ordered(x, self.shards.time, axis)

    def _dense_in_order(self, leaf: Mask) -> Mask:
        if type(leaf) is not Dense or leaf.values.shape[-2] == 1:
            return leaf
        return Dense(self.in_order(leaf.values, leaf.values.ndim - 2))

    def in_tokens_order(self, x: Tensor, axis: int) -> Tensor:
        """The way back from `in_order`."""
        if self.order.chunks == 1:
            return x
        return zigzag.restored(x, self.shards.time, axis)

    def gradients_in_tokens_order(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns gradients in the order of what they are the gradients of."""
        return {
            name: self.in_tokens_order(x, self.time_axes[name])
            if name in self.time_axes
            else x
            for name, x in found.items()
        }

    def summed(self, x: Tensor, spec: PartitionSpec) -> Tensor:
        """Sums a gradient over the devices that have the same of a tensor."""
        axes = tuple(axis for axis in self.shards.all if axis not in spec)
        return lax.psum(x, axes) if axes else x

    # ------------------------------------------------------------------ loops

    def go_around(self, visit: Callable, travelling: Any, staying: Any) -> tuple:
        """Runs `travelling, staying = visit(pair, keys, travelling, staying)` for all
        pairs of chunks of which the mask does not say that they see nothing.

        What is travelling goes with the keys, and comes home in the end.
        """
        order, last = self.order, self.order.steps - 1
        keys = {name: self.tensors[name] for name in KEYS}
        keys = self._hop(keys, order.first)

        def turn(step, carry):
            keys, *carry = carry
            following = self._hop(keys, 1)  # on the way while this is computed
            travelling, staying = self._visit_pairs(visit, step, keys, *carry)
            return following, self._hop(travelling, 1), staying

        carry = keys, travelling, staying
        if last:
            carry = lax.fori_loop(0, last, turn, carry)
        keys, *carry = carry
        travelling, staying = self._visit_pairs(visit, last, keys, *carry)
        return self._hop(travelling, -(order.first + last)), staying

    def _hop(self, tree: Any, hops: int) -> Any:
        size = self.order.size
        if hops % size == 0:
            return tree
        moves = [(device, (device + hops) % size) for device in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.shards.time, moves), tree)

    def _visit_pairs(self, visit, step, keys, travelling, staying):
        order = self.order
        source = (self.me - order.first - step) % order.size
        found = np.unique(order.kinds)  # one branch for each kind that there is
        kinds = jnp.asarray(np.searchsorted(found, order.kinds))

        def turn(p, carry):
            i, j = p // order.chunks, p % order.chunks
            row, column = order.chunk(self.me, i), order.chunk(source, j)
            pair = Pair(
                *(self.height, self.width, i * self.height, j * self.width),
                *(row * self.height, column * self.width),
                masked=False,
            )
            branches = {
                EMPTY: lambda *carry: carry,
                FULL: partial(visit, pair, keys),
                MIXED: partial(visit, pair._replace(masked=True), keys),
            }
            branches = [branches[kind] for kind in found]
            return lax.switch(kinds[row, column], branches, *carry)

        return lax.fori_loop(0, order.chunks**2, turn, (travelling, staying))

    # ------------------------------------------------------------------ a pair

    def problem_of(self, pair: Pair, keys: dict) -> tuple[Problem, dict[str, Any]]:
        """Returns what there is to compute of a pair of chunks, as for `blockwise`."""
        tensors = {"query": pair.rows_of(self.tensors["query"])}
        tensors |= {
            x: at_least_float32(_cut(keys[x], self._places(x, pair))) for x in KEYS
        }
        if "bias" in self.tensors:
            bias = _cut(self.tensors["bias"], self._places("bias", pair))
            tensors["bias"] = at_least_float32(bias)
        part, groups = self._part(pair), self.given["query"].shape[1]
        if self.problem.dropout:
            heads = part.heads * self.shards.size(self.shards.heads)
            tensors["seed"] = OfPart(self.given["seed"], *part[:4], part.heads, heads)
        bias, held = self._position_bias(part)
        tensors |= held
        mask, tensors["mask"] = split_tensors(self._mask(pair, part))
        problem = replace(
            self.problem,
            mask=mask,
            position_bias=bias,
            position_tensors=tuple(held),
            differentiable=tuple(self.differentiable),
            groups_at_once=groups_at_once(part.heads, groups)
            if self.problem.device == "cpu"
            else None,
        )
        return problem, tensors

    def _part(self, pair: Pair) -> Part:
        batch, groups, _, shared, _ = self.given["query"].shape
        return Part(
            row=pair.row,
            column=pair.column,
            batch=self.shards.index(self.shards.batch) * batch,
            head=self.shards.index(self.shards.heads) * groups * shared,
            batches=batch,
            heads=groups * shared,
        )

    def _position_bias(self, part: Part) -> tuple[Any, dict[str, Tensor]]:
        names = self.problem.position_tensors
        if self.problem.position_bias is None:
            return None, {}
        held = tuple(self.given[name] for name in names)
        bias = join_tensors(self.problem.position_bias, held)
        bias, held = split_tensors(BiasOfPart(bias, tuple(part)))
        # Those of the bias come first, and keep their names.
        return bias, {f"position_bias_{i}": x for i, x in enumerate(held)}

    def _mask(self, pair: Pair, part: Part) -> Any:
        if not pair.masked:
            return None

        # Of `Dense` masks the device has its own rows.
        own = part._replace(row=0, batch=0, head=0)

        def of_part(leaf):
            if type(leaf) is not Dense:
                return leaf_of_part(leaf, part)
            values = leaf.values
            if values.shape[-2] != 1:
                axis = values.ndim - 2
                values = lax.dynamic_slice_in_dim(values, pair.rows, pair.height, axis)
            return MaskOfPart(Dense(values), tuple(own))

        return with_leaves(self.mask, of_part)

    def sink(self, dtype: Any) -> Tensor:
        """Returns the sinks, shaped for the logarithms of rows' sums."""
        return self.given["sink"].astype(dtype)[None, :, None, :, None]

    def adding(self, name: str, pair: Pair, sums: Tensor, new: Tensor) -> Tensor:
        """Returns gradients with those of a pair added."""
        places = self._places(name, pair)
        if not places:
            return sums + new
        starts = [places.get(axis, (0,))[0] for axis in range(sums.ndim)]
        new = _cut(sums, places) + new
        return lax.dynamic_update_slice(sums, new, starts)

    def _places(self, name: str, pair: Pair) -> dict[int, tuple]:
        """Returns where and how much of a tensor's axes belongs to a pair."""
        rows, columns = (pair.rows, pair.height), (pair.columns, pair.width)
        if name == "bias":
            places = {3: rows} if name in self.time_axes else {}
            if self.tensors["bias"].shape[4] != 1:
                places[4] = pair.column, pair.width
            return places
        return {"query": {4: rows}, "key": {3: columns}, "value": {3: columns}}.get(
            name, {}
        )


def _cut(x: Tensor, places: dict[int, tuple]) -> Tensor:
    for axis, (start, size) in places.items():
        x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x
