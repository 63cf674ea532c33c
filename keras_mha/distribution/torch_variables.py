"""Keras variables whose values are shared by processes: DTensors."""

import functools

import keras
import torch
from torch.distributed.tensor import DTensor

from keras_mha._keras import held_value, hold_value

_GATHER = (
    "Processes share the weights of this model. To read, save or set them as a whole, "
    "do so `with keras_mha.distribution.gathered(model):`, on all processes."
)


class _Shared:
    """A variable that does not hold its whole value."""

    def numpy(self):
        self._check_is_whole()
        return super().numpy()

    def __array__(self, dtype=None):
        self._check_is_whole()
        return super().__array__(dtype)

    def assign(self, value):
        self._check_is_whole()
        return super().assign(value)

    def _check_is_whole(self):
        if isinstance(held_value(self), DTensor):
            raise ValueError(f"{_GATHER} Received: the weight {self.path!r}")


class _Following(_Shared):
    """A variable whose value is what a module has for a parameter at the time."""

    follows_a_module = True

    class _Value:
        # No `__set__`, so that another value can stand in.
        def __get__(self, variable, kind=None):
            if variable is None:
                return self
            parameters, name = variable._follows
            return parameters[name]

    _value = _Value()


@functools.cache
def _kind(base: type, kind: type) -> type:
    return type(kind.__name__, (base, kind), {})


def share(variable: keras.Variable, value: DTensor) -> None:
    """Has a variable hold a DTensor."""
    hold_value(variable, torch.nn.Parameter(value, variable.trainable))
    variable.__class__ = _kind(_Shared, type(variable))


def follow(variable: keras.Variable, module: torch.nn.Module, name: str) -> None:
    """Has a variable hold what a module has for the parameter `name`, which others
    replace."""
    variable._follows = module._parameters, name
    variable.__class__ = _kind(_Following, type(variable))
    vars(variable).pop("_value")
