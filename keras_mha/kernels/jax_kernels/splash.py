"""Splash attention, for TPUs."""

from keras_mha.kernels.call import AttentionCall


def refusal(call: AttentionCall) -> str | None:
    """Returns why splash attention cannot run this call, or `None` if it can."""
    return "splash attention is not asked yet"
