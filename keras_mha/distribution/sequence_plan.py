"""Chooses how devices share the sequences of a call, and says why."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from keras_mha._keras import in_symbolic_scope
from keras_mha.distribution import sequence_parallel
from keras_mha.distribution.parts import leaves
from keras_mha.distribution.sequence_parallel import SequenceParallel
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.problem import MIXES_HEADS, undivided
from keras_mha.masks import Dense


class SharedPlan(NamedTuple):
    """How devices share a call.

    Args:
        implementation: `"ring"` or `"all_to_all"`; `None` if they do not.
        reason: Why; `None` where nothing says that they should.
        kernel: What runs the call; `None` if they do not share it.
    """

    implementation: str | None = None
    reason: str | None = None
    kernel: Callable[[AttentionCall], Attended] | None = None


def plan(call: AttentionCall, implementation: str, plan_part: Callable) -> SharedPlan:
    """Chooses how devices share the sequences of a call.

    Args:
        call: The call.
        implementation: What it asks for.
        plan_part: Chooses the kernel for what one device has to do.

    Raises:
        ValueError: If the sequences, or by `"all_to_all"` the heads, cannot be shared
            evenly.
    """
    parallel = sequence_parallel.current()
    if parallel is None or parallel.size(parallel.axis) == 1:
        return SharedPlan()
    unshared = _unshared(call, implementation)
    if unshared is None and parallel.method == "ring":
        unshared = _no_ring(call, implementation)
    if unshared is not None:
        reason = f"devices along {parallel.axis!r} do not share the call: {unshared}"
        return SharedPlan(reason=reason)
    _check_lengths(parallel, call)
    return _shared(parallel, call, implementation, plan_part)


def _unshared(call: AttentionCall, implementation: str) -> str | None:
    """Returns why devices do not share a call, or `None` if they do."""
    if implementation == "reference":
        return "all scores were asked for"
    if call.mixes_heads:
        return MIXES_HEADS
    why = undivided(call)
    if why is not None:
        return why
    if call.scores_shape[2] == 1:
        return "there is one query token"
    if None in call.scores_shape[2:] or in_symbolic_scope():
        return "lengths are not known yet"
    return None


def _no_ring(call: AttentionCall, implementation: str) -> str | None:
    """Returns why a ring cannot run a call, or `None` if it can."""
    if call.return_lse:
        return "a ring has no gradient of rows' sums"
    if implementation == "fused":
        return "a ring has tiles of its own"
    return None


def _shared(parallel, call, implementation, plan_part):
    refusal = _no_all_to_all(parallel, call)
    if parallel.method == "all_to_all":
        if refusal is not None:
            raise ValueError(
                f"SequenceParallel(method='all_to_all') cannot share this call: "
                f"{refusal}. Use method='auto' or 'ring', which share no heads, or "
                "choose a number of heads that divides."
            )
        reason = "asked for"
    elif parallel.method == "ring":
        return _ring(parallel, call, "asked for")
    elif refusal is None:
        if _whole_scores(call) and _no_ring(call, implementation) is None:
            reason = "a ring needs of what all heads share, T x S, its rows only"
            return _ring(parallel, call, reason)
        reason = "the heads divide by the devices"
    else:
        no_ring = _no_ring(call, implementation)
        if no_ring is not None:
            return SharedPlan(reason=f"{refusal}; {no_ring}")
        return _ring(parallel, call, refusal)
    from keras_mha.distribution import all_to_all

    kernel = partial(all_to_all.attend, _shards(parallel, call), plan_part)
    return SharedPlan("all_to_all", reason, partial(kernel, implementation))


def _ring(parallel, call, reason):
    from keras_mha.distribution import ring

    kernel = partial(ring.attend, _shards(parallel, call))
    return SharedPlan("ring", reason, kernel)


def _heads(call: AttentionCall) -> tuple[int, int]:
    return call.query.shape[2], call.key.shape[2]


def _no_all_to_all(parallel: SequenceParallel, call: AttentionCall) -> str | None:
    """Returns why devices cannot share the heads, or `None` if they can."""
    size, heads = parallel.size(parallel.axis), _heads(call)
    sharing = parallel.heads_axis if _share_heads(parallel, call) else None
    of_each = [count // parallel.size(sharing) for count in heads]
    if all(count % size == 0 for count in of_each):
        return None
    each = f" of each of {parallel.size(sharing)} along {sharing!r}" if sharing else ""
    return (
        f"{heads[0]} query heads and {heads[1]} key heads do not both divide by the "
        f"{size} devices along {parallel.axis!r}{each}"
    )


def _share_heads(parallel: SequenceParallel, call: AttentionCall) -> bool:
    size = parallel.size(parallel.heads_axis)
    return all(count % size == 0 for count in _heads(call))


def _whole_scores(call: AttentionCall) -> bool:
    """Whether a bias or a mask of T x S numbers is given that all heads share."""
    shapes = [] if call.bias is None else [tuple(call.bias.shape)]
    for leaf in leaves(call.mask):
        if type(leaf) is Dense:
            shapes.append((1,) * (4 - len(leaf.values.shape)) + leaf.values.shape)
            if len(leaf.values.shape) == 3:
                shapes[-1] = (leaf.values.shape[0], 1, *leaf.values.shape[1:])
    return any(s[1] == 1 and 1 not in s[2:] for s in shapes)


def _shards(parallel: SequenceParallel, call: AttentionCall):
    from keras_mha.distribution.shards import Shards

    batch = call.query.shape[0]
    size = parallel.size(parallel.batch_axis)
    return Shards(
        mesh=parallel.device_mesh.backend_mesh,
        time=parallel.axis,
        # A batch that does not divide is whole on each device.
        batch=parallel.batch_axis if batch is not None and batch % size == 0 else None,
        heads=parallel.heads_axis if _share_heads(parallel, call) else None,
    )


def _check_lengths(parallel: SequenceParallel, call: AttentionCall) -> None:
    size, (rows, columns) = parallel.size(parallel.axis), call.scores_shape[2:]
    if rows % size or columns % size:
        raise ValueError(
            f"The lengths of query and key must divide by the {size} devices along the "
            f"mesh's axis {parallel.axis!r}, which share sequences: pad the sequences "
            "(and mask what is padding), or choose a mesh with another number of "
            f"devices along this axis. Received: lengths {rows} and {columns}"
        )
