"""Rotary positions, as Hugging Face's configurations describe them."""

from typing import Any

from keras_mha.layers.rotary_embedding import RotaryEmbedding
from keras_mha.layers.rotary_scaling import KINDS, keys_of

_LENGTH = "original_max_position_embeddings"


def rotary(module: Any, *, can_be_partial: bool = False) -> RotaryEmbedding:
    """Returns the rotary embedding that a module's model rotates its heads by.

    Args:
        module: An attention module with a `config` and a `head_dim`.
        can_be_partial: Whether it lets features through that do not rotate.

    Raises:
        ValueError: If the configuration scales them in a way that is not known here.
    """
    config, parameters = module.config, _parameters(module)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in KINDS:
        raise ValueError(
            f"`module` must have rotary positions of a type among {list(KINDS)}. "
            f"Received: rope_type={kind!r} in the configuration of a "
            f"{type(module).__name__}"
        )
    share = parameters.get("partial_rotary_factor") or 1.0
    if share != 1 and not can_be_partial:
        raise ValueError(
            f"`module` is a {type(module).__name__}, which rotates all features. "
            f"Received: partial_rotary_factor={share} in its configuration"
        )
    return RotaryEmbedding(
        rotary_dim=None if share == 1 else int(module.head_dim * share),
        max_wavelength=parameters.get("rope_theta") or 10_000.0,
        scaling=_scaling(kind, parameters, config),
    )


def _parameters(module: Any) -> dict[str, Any]:
    """Returns the configuration's parameters for this module."""
    config = module.config
    parameters = getattr(config, "rope_parameters", None)
    if parameters:
        # Some have a dictionary for each type of layer.
        return parameters.get(getattr(module, "layer_type", None), parameters)
    # As transformers has them before its version 5.
    shares = {"partial_rotary_factor": getattr(config, "partial_rotary_factor", None)}
    local = getattr(config, "rope_local_base_freq", None)
    if local is not None and module.is_sliding:  # Gemma 3
        return {"rope_theta": local, **shares}
    scaling = getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": config.rope_theta, **shares, **scaling}


def _scaling(kind, parameters, config) -> dict[str, Any] | None:
    """Returns the scaling as `RotaryEmbedding` takes it.

    Keys that do not belong to the kind are left out, as transformers ignores them.
    """
    if kind == "default":
        return None
    scaling = {name: parameters.get(name) for name in keys_of(kind)}
    if kind == "dynamic":
        # Whatever else the configuration says, transformers counts from here.
        scaling[_LENGTH] = config.max_position_embeddings
    elif _LENGTH in scaling and scaling[_LENGTH] is None:
        trained = getattr(config, _LENGTH, None)
        scaling[_LENGTH] = trained or config.max_position_embeddings
    if kind == "yarn" and scaling["factor"] is None:
        scaling["factor"] = config.max_position_embeddings / scaling[_LENGTH]
    return {"rope_type": kind, **scaling}
