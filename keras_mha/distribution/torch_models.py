"""Models of PyTorch with Keras layers in them: their variables and parameters."""

from collections.abc import Iterator
from typing import Any

import keras
import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from keras_mha._keras import all_layers


def layers_in(model: torch.nn.Module) -> Iterator[keras.layers.Layer]:
    """Yields the Keras layers in a model, itself among them, each once."""
    seen = set()
    for module in model.modules():
        if isinstance(module, keras.layers.Layer):
            for layer in all_layers(module):
                if id(layer) not in seen:
                    seen.add(id(layer))
                    yield layer


def variables_in(model: torch.nn.Module) -> Iterator[keras.Variable]:
    """Yields the variables of the Keras layers in a model, each once."""
    seen = set()
    for layer in layers_in(model):
        for variable in layer.variables:
            if id(variable) not in seen:
                seen.add(id(variable))
                yield variable


def take_from_first(model: torch.nn.Module, mesh: Any) -> None:
    """Gives all processes the weights, buffers and seeds of the first one, but for
    DTensors, which say where they come from."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [variable._value for variable in variables_in(model)]
    for tensor in {id(x): x for x in tensors}.values():
        if not isinstance(tensor, DTensor):
            same = distribute_tensor(tensor.detach(), mesh, [Replicate()])
            with torch.no_grad():
                tensor.copy_(same.to_local())


def track_again(model: torch.nn.Module) -> None:
    """Has torch know the parameters that the variables now have."""
    for layer in layers_in(model):
        layer._track_variables()
