"""To and from `torch.nn.MultiheadAttention`."""

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_mha.info import require
from keras_mha.interop.projections import Projection, as_numpy
from keras_mha.interop.recipe import Recipe, make_layer
from keras_mha.layers.multi_head_attention import MultiHeadAttention

if TYPE_CHECKING:
    import torch


def from_torch(
    module: "torch.nn.MultiheadAttention", **kwargs: Any
) -> MultiHeadAttention:
    """Makes our layer of a `torch.nn.MultiheadAttention`, with its weights.

    torch need only be installed, whatever backend Keras runs on. Heads, `dropout`,
    `bias`, `kdim`, `vdim`, `add_bias_kv` (`num_memory_key_values=1` here) and
    `add_zero_attn` (an `attention_sink="zero"` here) are taken over; what is added has
    no column in the scores here. Inputs here always have the batch first, and calls are
    `layer(query, value, key)`; masks are `True` where torch's are `False`. A query that
    may see nothing gives zeros here, and NaN there.

    Args:
        module: The module, which stays as it is. Whatever its dtype, the layer has
            Keras's dtype policy unless `dtype` says otherwise.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Returns:
        A `MultiHeadAttention`, built.

    Raises:
        MissingExtra: If torch is not installed.
        TypeError: If `module` is no `torch.nn.MultiheadAttention`, or of a subclass
            with a `forward` of its own.

    Example:

    >>> module = torch.nn.MultiheadAttention(512, 8, batch_first=True)
    >>> layer = keras_mha.interop.from_torch(module)
    """
    require("from_torch", {"torch": "torch"}, "torch")
    import torch

    # Subclasses such as torch.ao's keep weights elsewhere; parametrized ones do not.
    is_plain = isinstance(module, torch.nn.MultiheadAttention) and (
        type(module).forward is torch.nn.MultiheadAttention.forward
    )
    if not is_plain:
        raise TypeError(
            "`module` must be a torch.nn.MultiheadAttention, not of a subclass with a "
            "`forward` of its own. "
            f"Received: module={module!r} (of type {type(module).__name__})"
        )
    arguments = {
        "num_heads": module.num_heads,
        "key_dim": module.head_dim,
        "dropout": module.dropout,
        "attention_sink": "zero" if module.add_zero_attn else None,
        "num_memory_key_values": None if module.bias_k is None else 1,
    }
    query, key, value = _inputs_of(module)
    output = Projection(module.out_proj.weight, module.out_proj.bias)
    weights = {}
    if module.bias_k is not None:
        heads = 1, module.num_heads, module.head_dim
        weights["memory_key"] = module.bias_k.reshape(heads)
        weights["memory_value"] = module.bias_v.reshape(heads)
    recipe = Recipe(arguments, query, key, value, output, weights=weights)
    return make_layer(recipe, **kwargs)


def _inputs_of(module: "torch.nn.MultiheadAttention") -> list[Projection]:
    if module.in_proj_weight is not None:
        kernels = module.in_proj_weight.chunk(3)
    else:  # widths differ
        kernels = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return list(map(Projection, kernels, biases))


def to_torch(layer: MultiHeadAttention) -> "torch.nn.MultiheadAttention":
    """Makes a `torch.nn.MultiheadAttention` of our layer, with its weights.

    torch need only be installed, whatever backend Keras runs on.

    Args:
        layer: A `MultiHeadAttention`, built, which stays as it is.

    Returns:
        A `torch.nn.MultiheadAttention` with `batch_first=True`, in float32 (float64 if
        the layer is), on the CPU and in evaluation mode.

    Raises:
        MissingExtra: If torch is not installed.
        TypeError: If `layer` is no `MultiHeadAttention`.
        ValueError: If the layer has no weights yet, or what torch's module has not
            (all that are in the way are named).

    Example:

    >>> layer = keras_mha.MultiHeadAttention(num_heads=8, key_dim=64)
    >>> layer.build((None, None, 512))
    >>> module = keras_mha.interop.to_torch(layer)
    """
    require("to_torch", {"torch": "torch"}, "torch")
    import torch

    if not isinstance(layer, MultiHeadAttention):
        raise TypeError(
            "`layer` must be a keras_mha.MultiHeadAttention. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    if not layer.built:
        raise ValueError(
            "`layer` has no weights yet: call or build it first. "
            f"Received: layer={layer.name!r}"
        )
    _check_torch_has_it(layer)
    kernels = {name: _flat_kernel(layer, name) for name in _PROJECTIONS}
    module = torch.nn.MultiheadAttention(
        kernels["query"].shape[1],
        layer.num_heads,
        dropout=layer.dropout,
        bias=layer.use_bias,
        add_bias_kv=layer.memory_key is not None,
        add_zero_attn=layer.get_config().get("attention_sink") == "zero",
        kdim=kernels["key"].shape[1],
        vdim=kernels["value"].shape[1],
        batch_first=True,
        dtype=torch.float64 if layer.variable_dtype == "float64" else torch.float32,
    )
    state = _state(layer, kernels, fused=module.in_proj_weight is not None)
    module.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return module.eval()


_PROJECTIONS = ("query", "key", "value", "output")


def _check_torch_has_it(layer: MultiHeadAttention) -> None:
    """Raises if the layer has options that torch's module has not."""
    config = layer.get_config()
    kernel = layer.query_dense.kernel
    width = kernel.shape[0]
    plain = 1 / math.sqrt(layer.key_dim)
    in_the_way = {
        "attention_axes": len(layer.attention_axes) > 1,
        "use_gate": config["use_gate"],
        "sliding_window": config["sliding_window"] is not None,
        "position": layer.position is not None,
        "qk_norm": config.get("qk_norm") is not None,
        "attention_sink": config.get("attention_sink") == "learned",
        "logit_soft_cap": config.get("logit_soft_cap") is not None,
        "num_memory_key_values": config.get("num_memory_key_values") not in (None, 1),
        "talking_heads": config.get("talking_heads") is not None,
        "scale": not math.isclose(layer.scale, plain),
        "num_key_value_heads": layer.num_key_value_heads != layer.num_heads,
        "value_dim": layer.value_dim != layer.key_dim,
        "key_dim": layer.num_heads * layer.key_dim != width,
        "output_shape": tuple(layer.output_dense.kernel.shape[2:]) != (width,),
        "quantize": any(
            getattr(layer, f"{name}_dense").quantization_mode is not None
            for name in _PROJECTIONS
        ),
    }
    found = [name for name, is_there in in_the_way.items() if is_there]
    if found:
        raise ValueError(
            "torch.nn.MultiheadAttention has heads of the width "
            "embed_dim / num_heads, and no other option than dropout, bias, kdim, "
            "vdim, add_bias_kv (num_memory_key_values=1) and add_zero_attn (an "
            "attention_sink='zero'). "
            f"Received: a layer that differs by {', '.join(found)}"
        )


def _flat_kernel(layer: MultiHeadAttention, name: str) -> np.ndarray:
    """Returns a kernel as torch has it, `(N H, D)`; LoRA's part is merged."""
    kernel = as_numpy(keras.ops.convert_to_tensor(_dense(layer, name).kernel))
    rows = -1 if name == "output" else kernel.shape[0]
    columns = kernel.shape[-1] if name == "output" else -1
    return np.ascontiguousarray(kernel.reshape(rows, columns).T)


def _state(layer: MultiHeadAttention, kernels: dict, fused: bool) -> dict:
    """Returns the module's weights by torch's names, as NumPy arrays."""
    inputs = _PROJECTIONS[:3]
    if fused:  # torch does so where all inputs are of one width
        state = {"in_proj_weight": np.concatenate([kernels[x] for x in inputs])}
    else:
        state = {f"{name[0]}_proj_weight": kernels[name] for name in inputs}
    state["out_proj.weight"] = kernels["output"]
    if layer.use_bias:
        biases = {name: as_numpy(_dense(layer, name).bias) for name in _PROJECTIONS}
        state["out_proj.bias"] = biases.pop("output")
        state["in_proj_bias"] = np.concatenate([x.reshape(-1) for x in biases.values()])
    if layer.memory_key is not None:
        state["bias_k"] = as_numpy(layer.memory_key).reshape(1, 1, -1)
        state["bias_v"] = as_numpy(layer.memory_value).reshape(1, 1, -1)
    return state


def _dense(layer: MultiHeadAttention, name: str) -> keras.layers.EinsumDense:
    return getattr(layer, f"{name}_dense")
