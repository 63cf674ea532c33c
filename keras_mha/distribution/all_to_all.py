"""All-to-all over heads: for attention a device gets whole sequences of some heads.

Queries, keys and values come in with a part of the time axis and all heads, and leave
with all of the time axis and a part of the heads; the output goes the way back. Between
the two a kernel runs that knows nothing of it.

References:
    Jacobs et al., 2023, DeepSpeed-Ulysses: https://arxiv.org/abs/2309.14509
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from keras import ops

from keras_mha._keras import Tensor
from keras_mha.distribution.parts import BiasOfPart, Part, leaf_of_part, with_leaves
from keras_mha.distribution.shards import Shards, specs_of_mask
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.dropout import DrawnSeed, OfPart, seed_pair
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.masks import Dense


@dataclass(frozen=True)
class _Program:
    """What of a call is no tensor, and what runs the part of a device.

    Args:
        shards: Along which axes of their mesh devices share the call.
        plan: Chooses the kernel for a call of whole sequences.
        implementation: What it is asked for.
        mask: The mask without its tensors.
        position_bias: The bias object without its tensors.
        options: Of the call, all else.
    """

    shards: Shards
    plan: Callable
    implementation: str
    mask: Any
    position_bias: Any
    options: tuple


def attend(
    shards: Shards, plan: Callable, implementation: str, call: AttentionCall
) -> Attended:
    """Runs one call of attention.

    Args:
        shards: Along which axes of their mesh devices share the call.
        plan: Chooses the kernel for a device's part of the call.
        implementation: What it is asked for.
        call: The call.
    """
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    if call.bias is not None:
        tensors["bias"] = call.bias
    if call.sink is not None:
        tensors["sink"] = ops.broadcast_to(call.sink, (call.query.shape[2],))
    if call.dropout:
        tensors["seed"] = seed_pair(call.seed)
    mask, tensors["mask"] = split_tensors(call.mask)
    position_bias, tensors["position_bias"] = split_tensors(call.position_bias)
    names = "scale", "logit_soft_cap", "dropout", "return_lse"
    options = tuple((name, getattr(call, name)) for name in names)
    program = _Program(shards, plan, implementation, mask, position_bias, options)
    return _run(program, tensors)


# Compiled here for calls from outside of any `jax.jit`.
@partial(jax.jit, static_argnums=0)
def _run(program: _Program, tensors: dict[str, Any]) -> Attended:
    shards = program.shards
    time, batch, some_heads = shards.time, shards.batch, _by_heads(shards)
    tokens = batch, time, shards.heads, None
    scores = batch, some_heads, None, None
    axes = {"query": tokens, "key": tokens, "value": tokens, "bias": scores}
    axes["sink"] = (some_heads,)
    specs = jax.tree.map(lambda _: PartitionSpec(), tensors)
    for name in axes.keys() & tensors.keys():
        specs[name] = shards.spec(tensors[name], *axes[name])

    def dense(values):
        lead = (batch, some_heads)[: len(values.shape) - 2]
        return shards.spec(values, *lead, None, None)

    mask = join_tensors(program.mask, tensors["mask"])
    specs["mask"] = specs_of_mask(mask, dense)
    lse = PartitionSpec(*scores[:3]) if dict(program.options)["return_lse"] else None
    results = Attended(specs["query"], None, lse)
    return shards.run(partial(_attend, program), (specs,), results, tensors)


def _by_heads(shards: Shards) -> tuple[str, ...]:
    """Returns the axes along which heads are shared between the two exchanges."""
    return (shards.time,) if shards.heads is None else (shards.heads, shards.time)


def _attend(program: _Program, tensors: dict[str, Any]) -> Attended:
    shards = program.shards
    tokens = tensors["query"], tensors["key"], tensors["value"]
    query, key, value = (_whole_sequences(x, shards.time) for x in tokens)
    batch, _, heads, _ = query.shape
    part = Part(
        row=0,
        column=0,
        batch=shards.index(shards.batch) * batch,
        head=lax.axis_index(_by_heads(shards)) * heads,
        batches=batch,
        heads=heads,
    )
    mask = join_tensors(program.mask, tensors["mask"])

    def of_part(leaf):
        return leaf if type(leaf) is Dense else leaf_of_part(leaf, part)

    position_bias = join_tensors(program.position_bias, tensors["position_bias"])
    call = AttentionCall(
        query,
        key,
        value,
        mask=with_leaves(mask, of_part),
        bias=tensors.get("bias"),
        position_bias=None
        if position_bias is None
        else BiasOfPart(position_bias, tuple(part)),
        sink=tensors.get("sink"),
        **dict(program.options),
    )
    if call.dropout:
        every = heads * shards.size(shards.heads) * shards.size(shards.time)
        seed = OfPart(tensors["seed"], *part[:4], heads, every)
        call = replace(call, seed=DrawnSeed(seed))
    attended = program.plan(call, program.implementation).kernel(call)
    return attended._replace(output=_shared_sequences(attended.output, shards.time))


def _whole_sequences(x: Tensor, axis: str) -> Tensor:
    """`(B, T / n, N, H) -> (B, T, N / n, H)`."""
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def _shared_sequences(x: Tensor, axis: str) -> Tensor:
    """`(B, T, N / n, H) -> (B, T / n, N, H)`."""
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)
