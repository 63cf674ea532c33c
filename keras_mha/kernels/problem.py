"""A call for tiles, parted into what a program is made for and the tensors it takes."""

from dataclasses import dataclass, replace
from typing import Any

from keras import ops

from keras_mha._keras import Tensor, is_float
from keras_mha._lengths import unless_one
from keras_mha.kernels import backends, dropout, tiling
from keras_mha.kernels.call import AttentionCall, Device
from keras_mha.kernels.half_products import keeps_halves
from keras_mha.kernels.parts import join_tensors, split_tensors

TALKING_HEADS = ("talking_heads_pre", "talking_heads_post")

MIXES_HEADS = "talking heads need the scores of all heads at once"


def undivided(call: AttentionCall) -> str | None:
    """Returns why a call cannot be worked out piece by piece, or `None` if it can."""
    if call.return_scores:
        return "only the reference can return the scores"
    if call.dropout == 1:
        return "dropout=1 leaves nothing to be computed in tiles"
    if 0 in call.scores_shape:
        return "there are no scores"
    lengths = call.scores_shape[2:]
    is_length = backends.current().is_length
    if not all(length is None or is_length(length) for length in lengths):
        return "tiles need lengths that are numbers, which an exported program has not"
    return None


@dataclass(frozen=True)
class Problem:
    """What of a call is no tensor. Equal problems can share a compiled program.

    Args:
        scale: Factor of the dot products.
        logit_soft_cap: As in `AttentionCall`.
        dropout: Share of the attention weights to drop, less than 1.
        mask: The mask without its tensors.
        position_bias: The bias object without its tensors.
        position_tensors: Names of the tensors that it holds, in order.
        differentiable: Names of the tensors that have gradients.
        groups_at_once: As in `Walk`.
        tile: As in `Walk`.
        extra_features: How many the output has beside those of the value, which are no
            numbers of half a type; see `row_chunks`.
        device: The kind of device that it is computed on; `None` where its program is
            not lowered yet.
    """

    scale: float
    logit_soft_cap: float | None
    dropout: float
    mask: Any
    position_bias: Any
    position_tensors: tuple[str, ...]
    differentiable: tuple[str, ...]
    groups_at_once: int | None
    tile: int | None
    extra_features: int = 0
    device: Device | None = None

    def lowered_for(self, device: Device) -> "Problem":
        """Returns the problem as it is computed on a kind of device."""
        if self.device is not None:
            return self
        is_cpu = device == "cpu"
        most = backends.current().LARGEST_TILE if is_cpu else tiling.USUAL
        return replace(
            self,
            device=device,
            groups_at_once=self.groups_at_once if is_cpu else None,
            tile=None if self.tile is None else min(self.tile, most),
        )

    @property
    def half_products(self) -> bool:
        """Whether operands of half types are multiplied as such."""
        return keeps_halves(self.device)

    @property
    def kept_factors(self) -> tuple[float, float]:
        """Two factors, in which weights that are kept are more: of the output's
        gradient and of its products."""
        factor = 1.0 / (1.0 - self.dropout)
        return (1.0, factor) if self.half_products else (factor, 1.0)


def prepared(call: AttentionCall) -> tuple[Problem, dict[str, Any]]:
    """Returns a call's problem, and its tensors as `blockwise.forward` takes them."""
    batch, rows, heads, width = ops.shape(call.query)
    groups = call.key.shape[2]
    shared = heads // groups
    query = ops.reshape(call.query, (batch, rows, groups, shared, width))
    tensors = {
        "query": ops.transpose(query, (0, 2, 4, 3, 1)),
        "key": ops.transpose(call.key, (0, 2, 3, 1)),
        "value": ops.transpose(call.value, (0, 2, 3, 1)),
    }
    if call.bias is not None:
        shape = ops.shape(call.bias)
        by_head = (unless_one(shape[1], groups), unless_one(shape[1], shared))
        tensors["bias"] = ops.reshape(call.bias, (shape[0], *by_head, *shape[2:]))
    if call.sink is not None:
        sink = ops.broadcast_to(call.sink, (heads,))
        tensors["sink"] = ops.reshape(sink, (groups, shared))
    for name, mixing in zip(TALKING_HEADS, call.talking_heads, strict=True):
        if mixing is not None:
            # A gradient of the kernel's own may not find variables of TensorFlow's.
            tensors[name] = backends.current().plain(ops.convert_to_tensor(mixing))
    position_bias, held = split_tensors(call.position_bias)
    held = {f"position_bias_{i}": tensor for i, tensor in enumerate(held)}
    differentiable = tuple(name for name, x in (tensors | held).items() if is_float(x))
    tensors |= held
    if call.dropout:
        tensors["seed"] = dropout.seed_of(call)
    mask, tensors["mask"] = split_tensors(call.mask)
    problem = Problem(
        scale=call.scale,
        logit_soft_cap=call.logit_soft_cap,
        dropout=call.dropout,
        mask=mask,
        position_bias=None if call.position_bias is None else position_bias,
        position_tensors=tuple(held),
        differentiable=differentiable,
        groups_at_once=groups_at_once(heads, groups),
        tile=tiling.TILE,
        device=call.device,
    )
    backend = backends.current()
    if not backend.LOWERS_LATER:
        problem = problem.lowered_for(backend.device_kind(call.query))
    return problem, tensors


def call_of(problem: Problem, tensors: dict[str, Any]) -> AttentionCall:
    """Returns the call that `prepared` took apart, but for its seed."""
    bias, sink = tensors.get("bias"), tensors.get("sink")
    if bias is not None:
        batch, groups, shared, *rest = ops.shape(bias)
        bias = ops.reshape(bias, (batch, groups * shared, *rest))
    held = tuple(tensors[name] for name in problem.position_tensors)
    has_position_bias = problem.position_bias is not None
    return AttentionCall(
        positions_first(tensors["query"]),
        ops.transpose(tensors["key"], (0, 3, 1, 2)),
        ops.transpose(tensors["value"], (0, 3, 1, 2)),
        mask=join_tensors(problem.mask, tensors["mask"]),
        bias=bias,
        position_bias=join_tensors(problem.position_bias, held)
        if has_position_bias
        else None,
        scale=problem.scale,
        logit_soft_cap=problem.logit_soft_cap,
        sink=None if sink is None else ops.reshape(sink, (-1,)),
        talking_heads=tuple(tensors.get(name) for name in TALKING_HEADS),
        dropout=problem.dropout,
        return_lse=problem.extra_features > 0,
        device=problem.device,
    )


def positions_first(x: Tensor) -> Tensor:
    """`(B, K, width, G, T) -> (B, T, N, width)`."""
    batch, groups, width, shared, rows = ops.shape(x)
    x = ops.transpose(x, (0, 4, 1, 3, 2))
    return ops.reshape(x, (batch, rows, groups * shared, width))


def groups_at_once(heads: int, groups: int) -> int | None:
    """Returns how many key heads are to share a tile on a CPU; see `Walk`.

    It wants a tile that fits its cache, others as much work as they can get. Several
    devices may share the heads, unknown to the call: a tile of some heads would then be
    of some devices, and gathered by all.

    Args:
        heads: Number of query heads.
        groups: Number of key heads.
    """
    backend = backends.current()
    if backend.device_count() > 1:
        return None
    most = max(backend.HEADS_PER_TILE * groups // heads, 1)
    return max(n for n in range(1, most + 1) if groups % n == 0)
