"""torch's `fully_shard` for Keras layers, whose variables it does not know of."""

from typing import Any

import keras
import torch
from torch.distributed import fsdp

from keras_mha._keras import held_value, is_float
from keras_mha.distribution.torch_models import refuse_fit, track_again, variables_in
from keras_mha.distribution.torch_variables import follow


def fully_shard(module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    """Calls torch's function, and has variables give the parameters that it makes."""
    done = {
        id(x): x for x in variables_in(module) if getattr(x, "follows_a_module", False)
    }
    track_again(module)
    new = [x for x in variables_in(module) if id(x) not in done and is_float(x)]
    places = _places(module)
    missing = [x.path for x in new if id(held_value(x)) not in places]
    if missing:
        raise ValueError(
            "`module` must have its layers' weights among its `parameters()`. "
            f"Received: a {type(module).__name__} without {missing}"
        )
    found = [(variable, *places[id(held_value(variable))]) for variable in new]
    ignored = {held_value(x) for x in variables_in(module) if not is_float(x)}
    ignored |= {held_value(x) for x in done.values()}
    ignored |= options.get("ignored_params") or set()
    options = {**options, "ignored_params": ignored}
    if isinstance(module, keras.layers.Layer):
        # Keras's layers are not all modules of the model's: torch takes each for the
        # outermost one, and would keep it whole until the gradients.
        options.setdefault("reshard_after_forward", True)
    fsdp.fully_shard(module, **options)
    for variable, holder, name in found:
        follow(variable, holder, name)
    track_again(module)
    refuse_fit(module)
    return module


def _places(module):
    """Returns by its `id` which module has a parameter, and under which name."""
    return {
        id(parameter): (part, name)
        for part in module.modules()
        for name, parameter in part._parameters.items()
    }
