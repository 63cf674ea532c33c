"""Which of PyTorch's kernels runs a call.

`scaled_dot_product_attention` takes what it can do alone: no mask, the causal one, few
rows, dropout. On NVIDIA's GPUs `flex_attention`, where its compiler is there, takes
what needs another mask, and soft caps, sinks and what learns in a bias.
"""

from keras_mha._keras import Tensor
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.torch_kernels import sdpa

refusal_of_parts = sdpa.refusal_of_parts


def refusal(call: AttentionCall) -> str | None:
    """Returns why none of PyTorch's kernels can run this call, or `None`."""
    why_not, flex_why_not = _refusals(call)
    if why_not is None or flex_why_not is None:
        return None
    if flex_why_not is _ELSEWHERE:
        return why_not
    return f"{why_not}, and {flex_why_not}"


def reason(call: AttentionCall) -> str:
    """Returns which kernel runs a call that is not refused, and why."""
    why_not, flex_why_not = _refusals(call)
    if flex_why_not is not None:
        return "the backend's own kernel can run the call"
    if why_not is None:
        why_not = "masks of all scores would be needed otherwise"
    return f"{why_not}; torch's flex_attention runs the call, compiled"


def name(call: AttentionCall) -> str:
    """Returns the name of the kernel that runs a call that is not refused."""
    is_flex = _refusals(call)[1] is None
    return "flex_attention" if is_flex else "scaled_dot_product_attention"


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    if _refusals(call)[1] is not None:
        return sdpa.attend(call)
    from keras_mha.kernels.torch_kernels import flex

    return flex.attend(call)


_ELSEWHERE = "flex_attention is taken on NVIDIA's GPUs"
_NOT_NEEDED = "the other kernel does as well"


def _refusals(call: AttentionCall) -> tuple[str | None, str | None]:
    """Returns why not `scaled_dot_product_attention`, and why not `flex_attention`."""
    why_not = sdpa.refusal(call)
    if call.device_kind != "gpu":
        return why_not, _ELSEWHERE
    if why_not is None and sdpa.is_one_call(call):
        return why_not, _NOT_NEEDED
    from keras_mha.kernels.torch_kernels import flex  # heavy, and not there everywhere

    return why_not, flex.refusal(call)
