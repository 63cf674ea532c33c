"""Chooses the kernel for a call, and says why."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from keras_mha import _checks
from keras_mha._keras import Tensor
from keras_mha.kernels import blockwise, fused, reference
from keras_mha.kernels.call import AttentionCall

Implementation = Literal["auto", "fused", "blockwise", "reference"]

IMPLEMENTATIONS = ("auto", "fused", "blockwise", "reference")


class Plan(NamedTuple):
    """Which implementation a call takes, and why.

    Args:
        implementation: `"fused"` or `"reference"`.
        reason: One clause of English.
    """

    implementation: str
    reason: str

    @property
    def kernel(self) -> Callable[[AttentionCall], tuple[Tensor, Tensor | None]]:
        """The function that runs the call."""
        kernels = {"fused": fused, "blockwise": blockwise, "reference": reference}
        return kernels[self.implementation].attend


def plan(call: AttentionCall, implementation: Implementation = "auto") -> Plan:
    """Chooses the implementation for a call of attention.

    Args:
        call: The call. Only the shapes and dtypes of its tensors are looked at.
        implementation: `"auto"` to take the best one that can run the call, or the
            name of the one to take.

    Returns:
        The plan.

    Raises:
        ValueError: If the implementation asked for cannot run this call.
    """
    _checks.choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return Plan("reference", "asked for")
    if implementation == "blockwise":
        return Plan("blockwise", "asked for")
    refusal = fused.refusal(call)
    if implementation == "fused":
        if refusal is not None:
            raise ValueError(
                f"implementation='fused' (flash_attention=True) cannot run this call: "
                f"{refusal}. Use implementation='auto' (flash_attention=None)."
            )
        return Plan("fused", "asked for")
    if refusal is None:
        return Plan("fused", "the backend's own kernel can run the whole call")
    return Plan("reference", refusal)
