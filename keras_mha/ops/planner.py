"""Chooses the kernel for a call, and says why."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from keras_mha import _checks
from keras_mha.distribution import sequence_plan
from keras_mha.kernels import (
    backends,
    blockwise,
    fused,
    reference,
    row_chunks,
    thresholds,
)
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.problem import undivided

Implementation = Literal["auto", "flash", "fused", "blockwise", "reference"]

IMPLEMENTATIONS = ("auto", "flash", "fused", "blockwise", "reference")

_USE_AUTO = "Use implementation='auto' (flash_attention=None)."


@dataclass(frozen=True)
class Plan:
    """Which implementation a call takes, and why.

    Args:
        implementation: `"fused"`, `"blockwise"` or `"reference"`; under a
            `keras_mha.distribution.SequenceParallel` also `"ring"` or `"all_to_all"`.
        reason: One clause of English.
        kernel: The function that runs the call.
        fused_kernel: The name of the backend's own kernel that runs it; `None` where
            ours do.
    """

    implementation: str
    reason: str
    kernel: Callable[[AttentionCall], Attended] = field(repr=False)
    fused_kernel: str | None = None


def plan(call: AttentionCall, implementation: Implementation = "auto") -> Plan:
    """Chooses the implementation for a call of attention.

    Args:
        call: The call. Of its tensors not the numbers are looked at, only what is known
            of them: shape, dtype, device, whether they want a gradient.
        implementation: `"auto"` to take the best one that can run the call, `"flash"`
            for the best one that never holds all scores, or the name of the one to
            take.

    Returns:
        The plan.

    Raises:
        ValueError: If the implementation asked for cannot run this call, or none can
            where each process has a part of the sequences, or devices cannot share the
            sequences evenly.
    """
    _checks.choice("implementation", implementation, IMPLEMENTATIONS)
    shared = sequence_plan.plan(call, implementation, _plan)
    if shared.kernel is not None:
        return Plan(*shared)
    plan = _plan(call, implementation)
    if shared.reason is not None and shared.reason.endswith(plan.reason):
        plan = replace(plan, reason=shared.reason)
    elif shared.reason is not None:
        plan = replace(plan, reason=f"{shared.reason}; {plan.reason}")
    if backends.current().splits_sequences():
        _check_parts(call, plan)
    return plan


def _plan(call: AttentionCall, implementation: Implementation) -> Plan:
    if implementation == "reference":
        return Plan("reference", "asked for", reference.attend)
    fused_kernel, why = fused.choose(call)
    fused_refusal = why if fused_kernel is None else None
    if implementation == "fused":
        _raise_if(fused_refusal, "implementation='fused'")
        return Plan("fused", "asked for", fused.attend, fused_kernel)
    if implementation == "blockwise":
        _raise_if(blockwise.refusal(call), "implementation='blockwise'")
        return Plan("blockwise", "asked for", _tiles(call))
    if fused_refusal is None:
        return Plan("fused", why, fused.attend, fused_kernel)
    blockwise_refusal = blockwise.refusal(call)
    if 0 in call.scores_shape and not call.return_scores:
        return Plan("reference", "there are no scores", reference.attend)
    if implementation == "flash":
        _raise_if(blockwise_refusal, "flash_attention=True (implementation='flash')")
        return Plan("blockwise", fused_refusal, _by_device(call))
    return _without_fused(call, fused_refusal, blockwise_refusal)


def _tiles(call: AttentionCall) -> Callable[[AttentionCall], Attended]:
    """Returns what works a call out in parts: tiles have no gradient of rows' sums."""
    return row_chunks.attend if call.return_lse else blockwise.attend


def _by_device(call: AttentionCall) -> Callable[[AttentionCall], Attended]:
    """Returns what runs a call in parts where it turns out to have no fused kernel."""
    return row_chunks.attend if call.return_lse else fused.attend_where_lowered


def _without_fused(
    call: AttentionCall, fused_refusal: str, blockwise_refusal: str | None
) -> Plan:
    """Chooses between tiles and whole scores."""
    few, has_few = thresholds.few_scores_of(call), thresholds.has_few_scores(call)
    if call.mixes_heads and undivided(call) is None and not has_few:
        reason = f"{blockwise_refusal}; of some rows at a time"
        return Plan("reference", reason, row_chunks.attend)
    if blockwise_refusal is not None:
        return Plan("reference", blockwise_refusal, reference.attend)
    if has_few is None:
        reason = f"{fused_refusal}; in one tile if there are under {few} scores a head"
        return Plan("blockwise", reason, _by_device(call))
    if has_few and not fused.is_left_to_lowering(call):
        reason = f"{fused_refusal}; tiles pay from {few} scores a head"
        return Plan("reference", reason, reference.attend)
    return Plan("blockwise", fused_refusal, _by_device(call))


def _check_parts(call: AttentionCall, plan: Plan) -> None:
    """Raises where a call would silently attend within each process's part alone."""
    refusal = plan.reason
    if plan.implementation == "fused":
        refusal = fused.refusal_of_parts(call)
        if refusal is None:
            return
    raise ValueError(
        "Within torch's context_parallel a call can have no dropout, scores, soft cap, "
        "sink, bias or talking heads, and no mask but the causal one: only torch's own "
        "kernel then sees all processes' keys, and any other would attend within each "
        "process's part of the sequences. Leave these out, or call outside of "
        "context_parallel. "
        f"Received: a call for the {plan.implementation} kernel ({refusal})"
    )


def _raise_if(refusal: str | None, wish: str) -> None:
    if refusal is not None:
        raise ValueError(f"{wish} cannot run this call: {refusal}. {_USE_AUTO}")
