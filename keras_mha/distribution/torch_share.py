"""A layer's heads shared by processes, on PyTorch: Megatron's way, with DTensors.

The layer's weights are DTensors. For a call each process takes its part of them as
plain tensors and computes its heads as a layer that has no others would; the output
projection's sums are then summed over the processes. So all that a layer can do with
its heads it can do with some of them, by any kernel. What is sent, torch sends.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import torch
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)

from keras_mha._keras import (
    Tensor,
    all_layers,
    held_value,
    is_float,
    standing_in,
)
from keras_mha.distribution.heads import KEY_HEADS, QUERY_HEADS, axes_of
from keras_mha.distribution.own_heads import BiasOf, Heads, mask_of
from keras_mha.distribution.torch_variables import share
from keras_mha.kernels.dropout import SeedOfHeads
from keras_mha.layers import recording
from keras_mha.layers.arguments import Call
from keras_mha.layers.mixed_rotary import MixedRotaryEmbedding
from keras_mha.layers.operands import operands_of
from keras_mha.layers.position_bias import PositionBias, RelativePositionBias
from keras_mha.masks import Mask


class _Weight(NamedTuple):
    """A weight of the layer.

    Args:
        variable: Which it is.
        axes: Whose heads each of its first axes has.
        is_added_once: Whether it is added to the sum over the processes.
    """

    variable: keras.Variable
    axes: tuple[str | None, ...]
    is_added_once: bool


class Share:
    """Computes calls of a layer by those of its heads that this process has.

    Args:
        layer: The layer, whose weights become DTensors.
        mesh: The processes, along one axis.
    """

    def __init__(self, layer: Any, mesh: Any):
        self._layer, self._mesh = layer, mesh
        size, rank = mesh.size(), mesh.get_local_rank()
        count = layer.num_heads // size
        self._heads = Heads(rank * count, count, layer.num_heads)
        self._shares_keys = layer.num_key_value_heads % size == 0
        self._key_heads = _key_heads(layer, self._heads)
        self._weights = list(_weights(layer))
        for weight in self._weights:
            self._distribute(weight)

    def __call__(self, call: Call) -> tuple[Any, ...]:
        """Returns what the layer's own `_compute` does, of all heads."""
        _check_call(self._layer, call)
        self._check_weights()
        own = self._entered(call)
        with self._own_weights():
            operands = operands_of(self._layer, own)
            bias = operands.position_bias
            if bias is not None and not _has_table(self._layer.position):
                operands = operands._replace(position_bias=BiasOf(bias, self._heads))
            output, scores, mask, cache = self._layer._compute_with(operands, own)
        if scores is not None:
            scores = self._joined(scores, Shard(1))
        return self._joined(output, Partial()), scores, mask, cache

    def seed(self, seed: Any) -> SeedOfHeads:
        """Returns a seed of the layer's for this process's heads."""
        return SeedOfHeads(seed, *self._heads)

    # ------------------------------------------------------------------ weights

    def _distribute(self, weight):
        variable = weight.variable
        if isinstance(held_value(variable), DTensor):  # of a position that layers share
            return
        placement = self._placement(weight.axes)
        value = held_value(variable).detach()
        share(variable, distribute_tensor(value, self._mesh, [placement]))

    def _placement(self, axes):
        for axis, heads in enumerate(axes):
            if heads == QUERY_HEADS or (heads == KEY_HEADS and self._shares_keys):
                return Shard(axis)
        return Replicate()

    def _check_weights(self):
        known = {id(weight.variable) for weight in self._weights}
        new = [x.path for x in self._layer.weights if id(x) not in known]
        if new:
            raise ValueError(
                "LoRA must be enabled, and weights be made, before `parallelize`. "
                f"Received: weights made since then, {new}"
            )
        _check_not_quantized(self._layer)

    @contextlib.contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Has the layer's weights be those of its own heads."""
        position, kept = self._layer.position, None
        own = [(weight.variable, self._own(weight)) for weight in self._weights]
        if _has_table(position) or isinstance(position, MixedRotaryEmbedding):
            kept, of_queries = position.num_heads, _has_table(position)
            position.num_heads = (
                self._heads.count if of_queries else len(self._key_heads)
            )
        try:
            with standing_in(own):
                yield
        finally:
            if kept is not None:
                position.num_heads = kept

    def _own(self, weight):
        value = held_value(weight.variable)
        if not value.placements[0].is_replicate():
            return value.to_local()
        value = self._enter(value.to_local())
        if KEY_HEADS in weight.axes:
            index = torch.tensor(self._key_heads, device=value.device)
            value = value.index_select(weight.axes.index(KEY_HEADS), index)
        if weight.is_added_once:
            value = value * float(self._heads.first == 0)
        return value

    # ------------------------------------------------------------------ calls

    def _entered(self, call: Call) -> Call:
        """Returns the call for this process's heads."""
        own, seen = copy.copy(call), {}
        for name in ("query", "value", "key"):
            x = getattr(call, name)
            if id(x) not in seen:
                seen[id(x)] = self._enter(x)
            setattr(own, name, seen[id(x)])
        rank, axis = len(call.scores_shape), -(2 * len(call.axes.attended) + 1)
        mask, bias = call.attention_mask, call.attention_bias
        if isinstance(mask, Mask):
            own.attention_mask = mask_of(mask, self._heads)
        elif mask is not None and len(mask.shape) == rank:
            own.attention_mask = self._heads.cut(mask, axis)
        if bias is not None:
            bias = self._enter(bias)
            has_heads = len(bias.shape) >= -axis
            own.attention_bias = self._heads.cut(bias, axis) if has_heads else bias
        return own

    def _enter(self, x: Tensor) -> Tensor:
        """Returns a tensor that all processes have, whose gradient is summed over what
        each makes of it."""
        if not isinstance(x, torch.Tensor) or not x.requires_grad:
            return x
        x = DTensor.from_local(x, self._mesh, [Replicate()], run_check=False)
        return x.to_local(grad_placements=[Partial()])

    def _joined(self, x: Tensor, placement: Any) -> Tensor:
        """Returns what all processes have together, whose gradient all know."""
        x = DTensor.from_local(x, self._mesh, [placement], run_check=False)
        return x.full_tensor(grad_placements=[Replicate()])


def _key_heads(layer, heads):
    """Returns which key heads the query heads of a process read."""
    shared = layer.num_heads // layer.num_key_value_heads
    read = [n // shared for n in range(heads.first, heads.first + heads.count)]
    distinct = sorted(set(read))
    evenly = heads.count // len(distinct)
    if read == [n for n in distinct for _ in range(evenly)]:
        return distinct
    return read  # as many as query heads


def _weights(layer):
    """Yields the layer's weights, and those of its position."""
    seen = set()
    for part in all_layers(layer)[::-1]:  # the layer itself last, which has them all
        for variable in part.weights:
            if id(variable) in seen or not is_float(variable):
                continue
            seen.add(id(variable))
            path = variable.name
            if isinstance(part, keras.layers.EinsumDense):
                path = f"{part.name}/{path}"
            axes = axes_of(path) or ()
            if isinstance(part, PositionBias) and not _has_table(part):
                axes = ()  # somebody's own, of which nothing is known
            yield _Weight(variable, axes, path == "attention_output/bias")


def _has_table(position):
    return isinstance(position, RelativePositionBias)


def check(layer: Any, mesh: Any) -> None:
    """Raises unless processes can share a layer's heads."""
    size = mesh.size()
    received = f"Received: the layer {layer.path!r} with"
    if layer._share is not None:
        raise ValueError(
            "`model` must not be parallel already. Received: the layer "
            f"{layer.path!r}, whose heads are shared"
        )
    if layer.num_heads % size:
        raise ValueError(
            f"`num_heads` must be a multiple of the {size} processes along the mesh's "
            "axis, which share the heads: choose another number of heads, or a mesh "
            f"with fewer processes along this axis. {received} "
            f"num_heads={layer.num_heads}"
        )
    if layer._talking_heads is not None:
        raise ValueError(
            "`talking_heads` must be None where processes share the heads, each of "
            f"which sees its own only. {received} "
            f"talking_heads={layer._talking_heads!r}"
        )
    for name in ("activity", "kernel", "bias"):
        if getattr(layer, f"_{name}_regularizer") is not None:
            raise ValueError(
                f"`{name}_regularizer` must be None where processes share the heads: "
                "Keras would add up what one of them has. Add its term to your loss, "
                f"or decay weights in the optimizer. {received} one"
            )
    _check_not_quantized(layer)


def _check_not_quantized(layer):
    for part in all_layers(layer):
        if getattr(part, "quantization_mode", None) is not None:
            raise ValueError(
                "A layer whose heads processes share must not be quantized, since its "
                "scales are of all heads. Received: the layer "
                f"{layer.path!r} with {part.name!r} in {part.quantization_mode}"
            )


def _check_call(layer, call):
    if call.cache is not None:
        raise ValueError(
            "`cache` must be None in a layer whose heads processes share: a cache has "
            "all of them. Generate with a copy that is not parallel."
        )
    if recording.is_on():
        raise ValueError(
            "Attention maps cannot be recorded of a layer whose heads processes share: "
            f"call {layer.name!r} with `return_attention_scores=True`, or take the "
            "maps of a copy that is not parallel."
        )
