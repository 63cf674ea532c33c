"""Methods of Keras's layer that subclasses override, and what takes their place here.

They are private to Keras's layer, and nothing calls them in this one: a subclass whose
base was changed would attend without what it adds, and nobody would know.
"""

_REPLACEMENTS = {
    "_masked_softmax": (
        "give the mask as a `keras_mha.masks.Mask`, what is added to the scores as "
        "`attention_bias=`, and use `logit_soft_cap=` or `attention_sink=`"
    ),
    "_compute_attention": (
        "override `call` and use `keras_mha.dot_product_attention` on the heads from "
        "`query_dense`, `key_dense` and `value_dense`"
    ),
    "_compute_attention_mask": (
        "give `attention_mask=` a `keras_mha.masks.Mask`, which a subclass of it can "
        "compute"
    ),
    "_compute_causal_mask": "give `attention_mask=keras_mha.masks.Causal(offset)`",
    "_compute_sliding_window_mask": (
        "give `attention_mask=` a `keras_mha.masks.SlidingWindow`, or a `Mask` of "
        "your own"
    ),
    "_build_attention": (
        "use the arguments `scale=`, `logit_soft_cap=` and `dropout=`, or override "
        "`call`"
    ),
    "_make_output_dense": "replace `output_dense` after `super().build(...)`",
    "_get_common_kwargs_for_sublayer": (
        "use the constructor's initializers, regularizers and constraints, or replace "
        "`query_dense` and its like after `super().build(...)`"
    ),
}


def check_no_hooks(cls: type, base: type) -> None:
    """Raises if a class overrides what Keras's layer would call and this one does not.

    Args:
        cls: A subclass of `base`, just made.
        base: The layer of this package.

    Raises:
        TypeError: If it does.
    """
    for owner in cls.__mro__:
        if owner is base or owner in base.__mro__:
            continue
        for hook, replacement in _REPLACEMENTS.items():
            if hook in vars(owner):
                raise TypeError(
                    f"`{cls.__name__}.{hook}` would never be called: it is a private "
                    "method of keras.layers.MultiHeadAttention, which "
                    f"keras_mha.{base.__name__} does not have. Instead, {replacement}. "
                    f"Received: the method of {owner.__name__}"
                )
