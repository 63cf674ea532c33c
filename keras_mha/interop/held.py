"""What the objects of a model hold: layers, variables and what else is part of it."""

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import keras

Layer, Metric = keras.layers.Layer, keras.metrics.Metric
Optimizer = keras.optimizers.Optimizer

# How backends' own base classes keep track of what a layer holds.
BACKENDS_OWN = (
    "_modules",
    "_torch_params",
    "_self_name_based_restores",
    "_self_saveable_object_factories",
    "_self_setattr_tracking",
    "_self_unconditional_",
    "_self_update_uid",
)
_PARTS = (Layer, keras.Variable, Metric, Optimizer, keras.random.SeedGenerator)
# Whose objects are not looked into for layers.
_LIBRARIES = ("builtins", "jax", "jaxlib", "keras", "numpy", "tensorflow", "torch")


def attributes(layer: Layer) -> Iterator[tuple[str, Any]]:
    """Yields a layer's attributes, which PyTorch keeps in several places."""
    kept = [vars(layer)]
    if keras.backend.backend() == "torch":
        kept += [layer._modules, layer._parameters]
    for names in kept:
        for name, value in tuple(names.items()):
            if not name.startswith(BACKENDS_OWN):
                yield name, value


def held_by(x: Any) -> Iterator[Any]:
    """Yields what an object holds, as far as that may be part of a model."""
    if isinstance(x, Layer):
        yield from (value for _, value in attributes(x))
    elif isinstance(x, Metric | Optimizer):
        yield from vars(x).values()
    elif isinstance(x, dict | types.MappingProxyType):
        yield from x.values()
    elif isinstance(x, list | tuple | set | frozenset | deque):
        yield from x
    elif isinstance(x, types.MethodType):
        yield x.__self__
    elif isinstance(x, types.FunctionType):
        yield from held_by_function(x)
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif type(x).__module__.partition(".")[0] not in _LIBRARIES:
        yield from list(getattr(x, "__dict__", {}).values())


def held_by_function(function: types.FunctionType) -> Iterator[Any]:
    """Yields a function's defaults and what it closes over."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        if not is_empty(cell):
            yield cell.cell_contents


def is_empty(cell: types.CellType) -> bool:
    """Whether a function's cell has nothing in it yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def holds_parts(x: Any) -> bool:
    """Whether an object of somebody's own class holds what is copied."""
    seen, waiting = set(), list(held_by(x)) if hasattr(x, "__dict__") else []
    while waiting:
        held = waiting.pop()
        if is_part(held):
            return True
        if id(held) not in seen:
            seen.add(id(held))
            waiting.extend(held_by(held))
    return False


def is_part(x: Any) -> bool:
    """Whether something is copied as what it is: a layer, a variable, a metric ..."""
    return isinstance(x, _PARTS) or is_variable_of_a_backend(x)


def is_variable_of_a_backend(x: Any) -> bool:
    """Whether something is a variable of PyTorch's or TensorFlow's own."""
    torch = sys.modules.get("torch")
    is_of_torch = torch is not None and isinstance(x, torch.nn.Parameter)
    return is_of_torch or is_of_tensorflow(x)


def is_of_tensorflow(x: Any) -> bool:
    """Whether something is a variable of TensorFlow's."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(x, tensorflow.Variable)
