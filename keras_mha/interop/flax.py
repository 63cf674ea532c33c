"""From `flax.nnx.MultiHeadAttention`."""

from typing import TYPE_CHECKING, Any

from keras_mha.info import require
from keras_mha.interop.projections import Projection, as_numpy
from keras_mha.interop.recipe import Recipe, make_layer
from keras_mha.layers.multi_head_attention import MultiHeadAttention

if TYPE_CHECKING:
    from flax import nnx


def from_flax(module: "nnx.MultiHeadAttention", **kwargs: Any) -> MultiHeadAttention:
    """Makes our layer of a `flax.nnx.MultiHeadAttention`, with its weights.

    Flax need only be installed, whatever backend Keras runs on. Heads and key and value
    heads, `qkv_features`, `out_features`, `dropout_rate`, `use_bias` and `normalize_qk`
    (a `qk_norm="layer"` here) are taken over. Calls here are `layer(query, value, key)`
    where Flax's are `module(query, key, value)`. A query that may see nothing gives
    zeros here, and attends evenly there; a `decode` cache is not taken over.

    Args:
        module: The module, which stays as it is.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Returns:
        A `MultiHeadAttention`, built.

    Raises:
        MissingExtra: If Flax is not installed.
        TypeError: If `module` is no `flax.nnx.MultiHeadAttention`, or of a subclass
            with a `__call__` of its own.
        ValueError: If it has an `attention_fn` of its own.

    Example:

    >>> rngs = flax.nnx.Rngs(0)
    >>> module = flax.nnx.MultiHeadAttention(8, 512, decode=False, rngs=rngs)
    >>> layer = keras_mha.interop.from_flax(module)
    """
    require("from_flax", {"flax": "flax"}, "flax")
    from flax import nnx

    is_plain = isinstance(module, nnx.MultiHeadAttention) and (
        type(module).__call__ is nnx.MultiHeadAttention.__call__
    )
    if not is_plain:
        raise TypeError(
            "`module` must be a flax.nnx.MultiHeadAttention, not of a subclass with a "
            "`__call__` of its own. "
            f"Received: module={module!r} (of type {type(module).__name__})"
        )
    if module.attention_fn is not nnx.dot_product_attention:
        raise ValueError(
            "`module` has an attention_fn of its own, of which nothing is known. "
            "Set what remains with `set_projections`. "
            f"Received: attention_fn={module.attention_fn!r}"
        )
    arguments = {
        "num_heads": module.num_heads,
        "key_dim": module.head_dim,
        "num_key_value_heads": module.num_kv_heads,
        "output_shape": module.out_features,
        "dropout": module.dropout_rate,
    }
    weights = {}
    if module.normalize_qk:
        arguments["qk_norm"] = "layer"
        arguments["qk_norm_epsilon"] = module.query_ln.epsilon
        weights = {
            "query_norm_scale": as_numpy(module.query_ln.scale[...]),
            "key_norm_scale": as_numpy(module.key_ln.scale[...]),
        }
    parts = (module.query, module.key, module.value, module.out)
    projections = map(_projection, parts)
    return make_layer(
        Recipe(arguments, *projections, layout="keras", weights=weights), **kwargs
    )


def _projection(dense: "nnx.LinearGeneral") -> Projection:
    bias = None if dense.bias is None else dense.bias[...]
    return Projection(dense.kernel[...], bias)
