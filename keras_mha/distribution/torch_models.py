"""Models of PyTorch with Keras layers in them: their variables and parameters."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import torch
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from keras_mha._keras import all_layers, held_value, standing_in, track_variables


def check_module(name: str, module: Any) -> None:
    """Raises unless a module has Keras layers, and all have their weights."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"`{name}` must be a Keras layer or model, or a torch.nn.Module with such "
            f"in it. Received: {name}={module!r} (of type {type(module).__name__})"
        )
    for layer in layers_in(module):
        if not layer.built:
            raise ValueError(
                f"`{name}` must have its weights: build it, or call it once, before. "
                f"Received: the layer {layer.name!r}, which is not built"
            )


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
    """Gives all processes the weights, buffers and seeds of the first one."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [held_value(variable) for variable in variables_in(model)]
    for tensor in {id(x): x for x in tensors}.values():
        if not isinstance(tensor, DTensor):
            same = distribute_tensor(tensor.detach(), mesh, [Replicate()])
            with torch.no_grad():
                tensor.copy_(same.to_local())


def track_again(model: torch.nn.Module) -> None:
    """Has torch know the parameters that the variables give now, where it has not
    taken them over."""
    managed = set()
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            managed.update(map(id, module.modules()))
    for layer in layers_in(model):
        if id(layer) not in managed:
            track_variables(layer)


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Has variables give whole, plain tensors, which are shared out again at the end,
    and the model be what it was before it was shared."""
    layers = list(layers_in(model))
    sharded = {x for x in (*model.modules(), *layers) if isinstance(x, fsdp.FSDPModule)}
    for module in sharded:
        module.reshard()  # else some are whole already, and not what is trained
    shared = [x for x in variables_in(model) if isinstance(held_value(x), DTensor)]
    parts = [held_value(x) for x in shared]
    whole = [x.full_tensor().detach().clone() for x in parts]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if getattr(layer, "_share", None) is not None:
                stack.enter_context(_with(layer, "_share", None))
        for module in sharded:  # an archive has the names of classes
            kind = next(x for x in type(module).__mro__[1:] if x is not fsdp.FSDPModule)
            stack.enter_context(_with(module, "__class__", kind))
        stack.enter_context(standing_in(zip(shared, whole, strict=True)))
        yield
    with torch.no_grad():
        for part, x in zip(parts, whole, strict=True):
            part.copy_(distribute_tensor(x, part.device_mesh, part.placements))


@contextlib.contextmanager
def _with(x: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(x, name)
    setattr(x, name, value)
    try:
        yield
    finally:
        setattr(x, name, before)


def refuse_fit(model: torch.nn.Module) -> None:
    """Has `fit` say that Keras's optimizers do not know DTensors, unless the model has
    a training step of its own."""
    step = getattr(type(model), "train_step", None)
    if step is not None and step is keras.Model.train_step:
        model.train_step = _refused_step


def _refused_step(data: Any) -> None:
    raise NotImplementedError(
        "`fit` cannot train a model whose weights processes share: Keras's optimizers "
        "do not know DTensors. Write the loop with an optimizer of torch's, made of "
        "`model.parameters()`, or override `train_step` with one."
    )
