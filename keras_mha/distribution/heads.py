"""Which axes of an attention layer's weights have a place for each head."""

import re

QUERY_HEADS, KEY_HEADS = "query heads", "key heads"

# How a layer's weights are shared, by their paths within it, first match first: along
# the axis with the query heads or that with the key heads. The axes behind are whole.
# All other weights are whole on each device: norms' scales and output biases, which all
# heads share, talking heads' matrices, which mix them, and int8's scales.
_KERNEL = "(kernel|lora_kernel_a)"
_AXES = {
    f"(query|gate)/{_KERNEL}": (None, QUERY_HEADS),
    "(query|gate)/bias": (QUERY_HEADS,),
    f"(key|value)/{_KERNEL}": (None, KEY_HEADS),
    "(key|value)/bias": (KEY_HEADS,),
    f"attention_output/{_KERNEL}": (QUERY_HEADS,),
    "sink": (QUERY_HEADS,),
    "memory_(key|value)": (None, KEY_HEADS),
    "table": (None, QUERY_HEADS),  # of a position: T5's and Swin's
    "frequencies": (None, KEY_HEADS),  # RoPE-Mixed's
}


def axes_of(path: str) -> tuple[str | None, ...] | None:
    """Returns whose heads each of a weight's first axes has, by its path in its layer;
    `None` for a weight that all heads share."""
    for pattern, axes in _AXES.items():
        if re.fullmatch(pattern, path):
            return axes
    return None
