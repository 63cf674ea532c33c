"""Copies of Keras models, object by object.

Keras copies a model by its configuration, which holds neither what was changed since
it was made nor what a layer makes for itself, and which many subclassed models lack.
Here a copy is put together like its original: of copies of all that Keras tracks, in
the same attributes. Graphs of Functional models are called anew.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

Layer = keras.layers.Layer

# Set anew for each copy, by its constructor or by what is added to it.
_OWN = {"_lock", "_tracker", "_layers", "compiled"}
# What Keras's constructors have set and a later call or build has changed.
_CHANGED = (
    "_auto_config",
    "_build_shapes_dict",
    "_call_context_args",
    "_call_has_context_arg",
    "_dtype_policy",
    "_input_spec",
    "activity_regularizer",
)
# How backends' own base classes keep track of what a layer holds.
_BACKENDS_OWN = (
    "_modules",
    "_torch_params",
    "_self_name_based_restores",
    "_self_saveable_object_factories",
    "_self_setattr_tracking",
    "_self_unconditional_",
    "_self_update_uid",
)
_PARTS = (Layer, keras.Variable, keras.metrics.Metric, keras.optimizers.Optimizer)
# Whose objects are not looked into for layers.
_LIBRARIES = ("builtins", "jax", "jaxlib", "keras", "numpy", "tensorflow", "torch")
_PLAIN = (bool, int, float, str, type(None))


class ModelCopy:
    """Copies a model, each of its objects once.

    Copied are layers, variables, metrics, optimizers, seed generators, symbolic
    tensors, and the containers, methods, closures and other objects that hold them.
    All else (functions, vocabularies, arrays) is what the original has.
    """

    def __init__(self):
        self.copies = {}  # by the id of the original
        self._originals = []  # keeps the ids from being used again

    def copy(self, x: Any) -> Any:
        """Returns the copy of anything that may hold a part of the model."""
        if id(x) in self.copies:
            return self.copies[id(x)]
        if isinstance(x, _PLAIN):
            return x
        for kind, method in self._kinds():
            if isinstance(x, kind):
                return self._remember(x, method(x))
        self._check_compiled(x)
        return self._remember(x, self._object(x)) if self._holds_parts(x) else x

    def _kinds(self) -> tuple:
        return (
            (Layer, self.copy_layer),
            (keras.Variable, self._variable),
            (keras.random.SeedGenerator, self._stateful),
            (keras.metrics.Metric, self._stateful),
            (keras.optimizers.Optimizer, self._optimizer),
            (keras.KerasTensor, self._symbolic),
            (types.MethodType, self._method),
            (types.FunctionType, self._function),
            (functools.partial, self._partial),
            (list, lambda x: [self.copy(y) for y in x]),
            (tuple, self._tuple),
            (dict, self._dictionary),
            (set, lambda x: {self.copy(y) for y in x}),
        )

    def _remember(self, original: Any, copy: Any) -> Any:
        self.copies[id(original)] = copy
        self._originals.append(original)
        return copy

    # ------------------------------------------------------------------ layers

    def copy_layer(self, layer: Layer) -> Layer:
        """Returns a layer like the one given, with copies of all that it holds."""
        if isinstance(layer, keras.layers.InputLayer):
            return type(layer).from_config(layer.get_config())
        new = type(layer).__new__(type(layer))
        # Now already, for what it holds may hold it in turn.
        self._remember(layer, new)
        self._construct(layer, new)
        self._fill(layer, new)
        if isinstance(layer, keras.Model) and layer.compiled:
            self._compile(layer, new)
        return new

    def _construct(self, layer: Layer, new: Layer) -> None:
        """Calls the constructor of Keras's own class of a layer."""
        if isinstance(layer, keras.Sequential):
            layers = [self.copy(x) for x in layer._layers]
            keras.Sequential.__init__(new, layers, name=layer.name)
            if layer.built and not new.built:
                new.build_from_config(layer.get_build_config())
        elif _is_functional(layer):
            graph = self._graph(layer)
            # `keras.Model.__init__` would make a Functional of a class that is one.
            type(graph).__init__(new, graph.input, graph.output, name=layer.name)
            operations = [self.copies[id(x)] for x in layer.operations]
            object.__setattr__(new, "_operations", operations)
        else:
            base = keras.Model if isinstance(layer, keras.Model) else Layer
            base.__init__(new, name=layer.name, dtype=layer.dtype_policy)

    def _graph(self, model: keras.Model) -> keras.Model:
        """Returns a model's graph, of copies of its layers."""
        inputs = keras.tree.map_structure(
            lambda x: self.copy(x._keras_history.operation).output, model.input
        )
        # Not the model itself: Keras would compile its copy by its configuration.
        plain = keras.Model(model.input, model.output, name=model.name)
        return keras.models.clone_model(
            plain, input_tensors=inputs, clone_function=self._operation
        )

    def _operation(self, operation: Any) -> Any:
        if isinstance(operation, Layer):
            return self.copy(operation)
        if id(operation) in self.copies:
            return self.copies[id(operation)]
        new = type(operation).__new__(type(operation))
        vars(new).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
        return self._remember(operation, new)

    def _fill(self, layer: Layer, new: Layer) -> None:
        """Gives a copy what its original has beyond what the constructor made."""
        own = set(vars(new)) | set(vars(new).get("_modules", ()))
        new._tracker.unlock()
        for name in ("_trainable_variables", "_non_trainable_variables"):
            for variable in getattr(layer, name):
                new._track_variable(self.copy(variable))
        for name, value in _attributes(layer):
            if name not in own:
                Layer.__setattr__(new, name, self.copy(value))
            elif name in _CHANGED or (name not in _OWN and isinstance(value, _PLAIN)):
                Layer.__setattr__(new, name, value)
        if layer._tracker.locked:
            new._lock_state()
        # In the order of the original, which that of weights and files follows.
        _, sublayers = new._tracker.config["layers"]
        order = {id(self.copies[id(x)]): i for i, x in enumerate(layer._layers)}
        sublayers.sort(key=lambda x: order.get(id(x), len(order)))

    # ------------------------------------------------------------------ state

    def _variable(self, variable: keras.Variable) -> keras.Variable:
        new = keras.Variable(
            value_of(variable),
            dtype=variable.dtype,
            trainable=variable.trainable,
            autocast=variable._autocast,
            aggregation=variable.aggregation,
            name=variable.name,
        )
        new._path = variable.path
        new.regularizer = variable.regularizer
        new.constraint = variable.constraint
        new.overwrite_with_gradient = variable.overwrite_with_gradient
        return new

    def _stateful(self, x: Any) -> Any:
        try:
            new = type(x).from_config(x.get_config())
        except Exception as error:
            raise ValueError(
                "`model` holds something with a state that cannot be made anew by its "
                f"`get_config()` and `from_config()`: {x!r} (of type "
                f"{type(x).__name__}). {type(error).__name__}: {error}"
            ) from error
        self._copy_values(_variables(x), _variables(new))
        return new

    def _optimizer(self, optimizer: keras.optimizers.Optimizer) -> Any:
        new = type(optimizer).from_config(optimizer.get_config())
        if optimizer.built:
            # In its own order, which that of its state follows.
            new.build([self.copy(x) for x in optimizer._trainable_variables])
        self._copy_values(optimizer.variables, new.variables)
        return new

    def _copy_values(self, variables, copies) -> None:
        for variable, copy in zip(variables, copies, strict=True):
            copy.assign(value_of(variable))
            self._remember(variable, copy)

    def _compile(self, model: keras.Model, new: keras.Model) -> None:
        """Compiles the copy as the model is, whatever a `compile` of its own takes."""
        config = dict(model._compile_config.config)
        for name in ("optimizer", "metrics", "weighted_metrics"):
            config[name] = self.copy(config.get(name))
        config["optimizer"] = self.copy(model.optimizer)
        keras.Model.compile(new, **config)
        for metric in keras.tree.flatten(
            (config["metrics"], config["weighted_metrics"])
        ):
            if isinstance(metric, keras.metrics.Metric):
                # TensorFlow's first evaluation takes it for a new one.
                metric.reset_state()

    # ------------------------------------------------------------------ the rest

    def _symbolic(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the tensor of the copied graph for one of the model's."""
        history = getattr(x, "_keras_history", None)
        if history is None or id(history.operation) not in self.copies:
            return x
        nodes = self.copies[id(history.operation)]._inbound_nodes
        return nodes[history.node_index].outputs[history.tensor_index]

    def _method(self, method: types.MethodType) -> types.MethodType:
        return types.MethodType(method.__func__, self.copy(method.__self__))

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Returns a function of the copies, if its closure holds what is copied."""
        if function.__closure__ is None:
            return function
        cells = [types.CellType() for _ in function.__closure__]
        new = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        new.__kwdefaults__ = function.__kwdefaults__
        vars(new).update(vars(function))
        self._remember(function, new)  # it may hold itself
        is_other = False
        for cell, old in zip(cells, function.__closure__, strict=True):
            try:
                content = old.cell_contents
            except ValueError:  # it is empty
                continue
            cell.cell_contents = self.copy(content)
            is_other |= not any(cell.cell_contents is x for x in (content, new))
        return new if is_other else function

    def _partial(self, x: functools.partial) -> functools.partial:
        return functools.partial(
            self.copy(x.func), *self.copy(x.args), **self.copy(x.keywords)
        )

    def _object(self, x: Any) -> Any:
        new = object.__new__(type(x))
        self._remember(x, new)
        vars(new).update((name, self.copy(value)) for name, value in vars(x).items())
        return new

    def _holds_parts(self, x: Any, seen: set[int] | None = None) -> bool:
        """Whether an object of somebody's own class holds what is copied."""
        seen = set() if seen is None else seen
        if id(x) in seen:
            return False
        seen.add(id(x))
        if isinstance(x, _PARTS):
            return True
        if isinstance(x, dict):
            values = x.values()
        elif isinstance(x, list | tuple | set):
            values = x
        elif type(x).__module__.partition(".")[0] not in _LIBRARIES:
            values = getattr(x, "__dict__", {}).values()
        else:
            return False
        return any(self._holds_parts(value, seen) for value in list(values))

    def _check_compiled(self, x: Any) -> None:
        """Raises for a compiled function of something that is copied."""
        for name in ("__wrapped__", "python_function"):
            function = getattr(x, name, None)
            if isinstance(function, types.FunctionType | types.MethodType):
                copy = self.copy(function)
                if copy is not function and copy != function:
                    raise ValueError(
                        "`model` holds a function that was compiled for it and would "
                        "go on working on it. Make such functions where they are "
                        f"called, or after the conversion. Received: {x!r}"
                    )

    def _tuple(self, x: tuple) -> tuple:
        values = [self.copy(y) for y in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)

    def _dictionary(self, x: dict) -> dict:
        kind = OrderedDict if isinstance(x, OrderedDict) else dict
        return kind((self.copy(key), self.copy(value)) for key, value in x.items())


def _is_functional(layer: Layer) -> bool:
    return isinstance(layer, keras.Model) and hasattr(layer, "operations")


def _attributes(layer: Layer) -> Iterator[tuple[str, Any]]:
    """Yields a layer's attributes; on PyTorch layers are kept apart from the others."""
    attributes = vars(layer)
    for name, value in (*attributes.items(), *attributes.get("_modules", {}).items()):
        if not name.startswith(_BACKENDS_OWN):
            yield name, value


def value_of(variable: keras.Variable) -> np.ndarray:
    """Returns a variable's numbers as an array that shares no memory with it."""
    # JAX may give away the memory of a variable in a training step.
    return np.array(keras.ops.convert_to_numpy(variable.value))


def _variables(x: Any) -> list[keras.Variable]:
    return [x.state] if isinstance(x, keras.random.SeedGenerator) else x.variables
