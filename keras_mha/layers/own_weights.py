"""The layer's weights beside its projections, each only where an option asks for it."""

from typing import Any

from keras_mha.layers import memory_key_values


def add_own_weights(layer: Any) -> None:
    """Gives a layer what its options learn; `None` where they learn nothing.

    All but learned keys and values keep their precision under a mixed policy.
    """

    def add(name, shape, initializer, is_wanted):
        weight = None
        if is_wanted:
            weight = layer.add_weight(
                name=name, shape=shape, initializer=initializer, autocast=False
            )
        setattr(layer, name, weight)

    has_scale = layer._qk_norm in ("rms", "layer")
    add("query_norm_scale", (layer.key_dim,), "ones", has_scale)
    add("key_norm_scale", (layer.key_dim,), "ones", has_scale)
    heads = (layer.num_heads,)
    add("sink", heads, "zeros", layer._attention_sink == "learned")
    for where in ("pre", "post"):
        is_wanted = layer._talking_heads in (where, "both")
        # Nothing is said yet: each head is what it would be without.
        add(f"talking_heads_{where}", heads * 2, "identity", is_wanted)
    memory_key_values.add_weights(layer, layer._num_memory_key_values)


def arguments_of(layer: Any) -> dict[str, Any]:
    """Returns what these weights are as arguments of `dot_product_attention`."""
    arguments = {"sink": 0.0 if layer._attention_sink == "zero" else layer.sink}
    if layer._talking_heads is not None:
        mixing = layer.talking_heads_pre, layer.talking_heads_post
        arguments["talking_heads"] = mixing
    return arguments
