"""From how many scores on tiles are better than whole scores, for a kind of device."""

from typing import Any

from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall, Device
from keras_mha.kernels.few_scores import few_of
from keras_mha.masks import is_plain_causal

# Off a CPU whole scores are the faster, and what speaks against them is their memory.
# Of that a layer may take this share for its scores in float32, of which training holds
# a few at a time.
SHARE_OF_MEMORY = 1 / 64
MEMORY = 16 * 2**30  # bytes of a device, where it does not say
UNKNOWN_BATCH = 32  # rows of a batch whose size is not known yet


def few_scores(
    device: Device | None, sequences: int = UNKNOWN_BATCH, kind: str = "plain"
) -> int:
    """Returns how many scores, of one head and sequence, are too many to have at once.

    Args:
        device: The kind of device; `None` counts as a CPU.
        sequences: How many heads and sequences there are.
        kind: What `kind_of` says of the call.
    """
    backend = backends.current()
    if device in ("cpu", None):
        return few_of(backend.FEW_SCORES, kind, sequences)
    memory = backend.device_memory() or MEMORY
    return int(memory * SHARE_OF_MEMORY) // 4 // max(sequences, 1)


def few_scores_of(call: AttentionCall) -> int:
    """Returns the number for a call."""
    batch, heads = call.scores_shape[:2]
    batch = batch if isinstance(batch, int) else UNKNOWN_BATCH
    return few_scores(call.device_kind, batch * heads, kind_of(call))


def kind_of(call: AttentionCall) -> str:
    """Returns `"dropout"`, `"grouped"`, `"causal"`, `"masked"` or `"plain"`: the first
    that a call is."""
    if call.dropout:
        return "dropout"
    if call.key.shape[2] != call.query.shape[2]:
        return "grouped"
    if call.mask is None:
        return "plain"
    return "causal" if is_plain_causal(call.mask) else "masked"


def has_few_scores(call: AttentionCall) -> bool | None:
    """Whether a call is better off with whole scores; `None` if it is not known yet."""
    lengths: tuple[Any, Any] = call.scores_shape[2:]
    if not all(isinstance(length, int) for length in lengths):
        return None
    return lengths[0] * lengths[1] < few_scores_of(call)
