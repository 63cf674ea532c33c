"""Copies of Keras models, object by object.

Keras copies a model by its configuration, which holds neither what was changed since
it was made nor what a layer makes for itself, and which many subclassed models lack.
Here a copy is put together like its original: of copies of all that it holds, in the
same attributes, tracked by Keras where the original's are. Graphs of Functional models
are called anew.
"""

import contextlib
import copy as shallow
import functools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_mha.interop.held import (
    BACKENDS_OWN,
    attributes,
    held_by,
    held_by_function,
    holds_parts,
    is_empty,
    is_of_tensorflow,
    is_part,
    is_variable_of_a_backend,
)

Layer, Metric = keras.layers.Layer, keras.metrics.Metric
Optimizer = keras.optimizers.Optimizer

# Attributes that Keras's constructors set and later calls change.
_CHANGED = (
    "_auto_config",
    "_build_shapes_dict",
    "_call_context_args",
    "_call_has_context_arg",
    "_dtype_policy",
    "_input_spec",
    "activity_regularizer",
)
_PLAIN = (bool, int, float, str, type(None))


class ModelCopy:
    """Copies a model, each of its objects once.

    Copied are layers, variables (a backend's own too), metrics, optimizers, seed
    generators, symbolic tensors, and the containers, methods, functions and other
    objects that hold them.
    All else (vocabularies, arrays, functions of global names) is what the original has.
    """

    def __init__(self):
        self.copies = {}  # by the id of the original
        self._originals = []  # keeps the ids from being used again
        self._variables = []  # those that Keras knows of

    def copy_apart(self, model: Layer) -> Layer:
        """Returns a model's copy that holds nothing of it, or raises."""
        # Not its `variables`, which never end where layers hold each other.
        self._variables = [
            variable
            for layer in model._flatten_layers()
            for variable in layer._trainable_variables + layer._non_trainable_variables
        ]
        copy = self.copy(model)
        self._check_apart(copy)
        return copy

    def copy(self, x: Any) -> Any:
        """Returns the copy of anything that may hold a part of the model."""
        if id(x) in self.copies:
            return self.copies[id(x)]
        if isinstance(x, _PLAIN):
            return x
        for kind, method in self._kinds():
            if isinstance(x, kind):
                return self.remember(x, method(x))
        if is_variable_of_a_backend(x):
            return self.remember(x, self._variable_of_a_backend(x))
        self._check_copies(x)
        return self.remember(x, self._object(x)) if holds_parts(x) else x

    def _kinds(self) -> tuple:
        return (
            (Layer, self.copy_layer),
            (keras.Variable, self._variable),
            (keras.random.SeedGenerator, self._seed_generator),
            (Metric | Optimizer, self._metric_or_optimizer),
            (types.MethodType, self._method),
            (types.FunctionType, self._function),
            (functools.partial, self._partial),
            (list, self._list),
            (dict, self._dictionary),
            (tuple, self._tuple),
            (set | frozenset | deque, lambda x: type(x)(self.copy(y) for y in x)),
        )

    def remember(self, original: Any, copy: Any) -> Any:
        """Notes the copy of an original, and returns it."""
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
        self.remember(layer, new)
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
            functional, inputs, outputs = self._graph(layer)
            # `keras.Model.__init__` would make a Functional of a class that is one.
            functional.__init__(new, inputs, outputs, name=layer.name)
            operations = [self.copies[id(x)] for x in layer.operations]
            object.__setattr__(new, "_operations", operations)
        else:
            base = keras.Model if isinstance(layer, keras.Model) else Layer
            base.__init__(new, name=layer.name, dtype=layer.dtype_policy)

    def _graph(self, model: keras.Model) -> tuple[type, Any, Any]:
        """Returns Keras's class of a graph, and its inputs and outputs copied."""
        inputs = keras.tree.map_structure(
            lambda x: self.copy(x._keras_history.operation).output, model.input
        )
        nodes = [node for nodes in model._nodes_by_depth.values() for node in nodes]
        tensors = [tensor for node in nodes for tensor in node.outputs]
        # Not the model itself: Keras would compile its copy by its configuration.
        plain = keras.Model(model.input, [model.output, tensors], name=model.name)
        graph = keras.models.clone_model(
            plain, input_tensors=inputs, clone_function=self._operation
        )
        outputs, copies = graph.output
        for tensor, copy in zip(tensors, copies, strict=True):
            self.remember(tensor, copy)
        return type(graph), graph.input, outputs

    def _operation(self, operation: Any) -> Any:
        if isinstance(operation, Layer):
            return self.copy(operation)
        if id(operation) in self.copies:
            return self.copies[id(operation)]
        new = type(operation).__new__(type(operation))
        vars(new).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
        return self.remember(operation, new)

    def _fill(self, layer: Layer, new: Layer) -> None:
        """Gives a copy what its original has beyond what the constructor made."""
        made = set(vars(new)) | set(vars(new).get("_modules", ()))
        tracked = set().union(*layer._tracker.stored_ids.values())
        new._tracker.unlock()
        for variable in layer._trainable_variables + layer._non_trainable_variables:
            new._track_variable(self.copy(variable))
        _, sublayers = layer._tracker.config["layers"]
        for sublayer in sublayers:
            new._tracker.track(self.copy(sublayer))
        for name, value in attributes(layer):
            if _is_of_training(layer, name, value):
                vars(new)[name] = None
            elif name in made:
                if name in _CHANGED or (name != "_lock" and isinstance(value, _PLAIN)):
                    Layer.__setattr__(new, name, value)
            elif (
                id(value) in tracked
                or hasattr(value, "tracker")
                or is_variable_of_a_backend(value)  # the backend tracks those
            ):
                Layer.__setattr__(new, name, self.copy(value))
            else:
                vars(new)[name] = self.copy(value)
        if layer._tracker.locked:
            new._lock_state()
        # In the order of the original, which that of weights and files follows.
        order = {id(self.copies[id(x)]): place for place, x in enumerate(sublayers)}
        _, copies = new._tracker.config["layers"]
        copies.sort(key=lambda x: order.get(id(x), len(order)))

    # ------------------------------------------------------------------ state

    def _variable(self, variable: keras.Variable) -> keras.Variable:
        with name_scopes(variable.path):
            new = keras.Variable(
                value_of(variable),
                dtype=variable.dtype,
                trainable=variable.trainable,
                autocast=variable._autocast,
                aggregation=variable.aggregation,
                name=variable.name,
            )
        copy_rules(variable, new)
        return new

    def _variable_of_a_backend(self, variable: Any) -> Any:
        """Returns the copy of a variable that Keras does not know of, or hides."""
        for keras_variable in self._variables:
            if keras_variable.value is variable:
                return self.copy(keras_variable).value
        if not is_of_tensorflow(variable):
            return shallow.deepcopy(variable)
        # Its `deepcopy` would forget which lengths may change.
        return sys.modules["tensorflow"].Variable(
            variable.read_value(),
            trainable=variable.trainable,
            name=variable.name.removesuffix(":0"),
            shape=variable.shape,
            constraint=self.copy(variable.constraint),
            synchronization=variable.synchronization,
            aggregation=variable.aggregation,
        )

    def _seed_generator(self, generator: keras.random.SeedGenerator):
        new = type(generator).from_config(generator.get_config())
        new.state.assign(value_of(generator.state))
        self.remember(generator.state, new.state)
        return new

    def _metric_or_optimizer(self, x: Metric | Optimizer) -> Metric | Optimizer:
        new = type(x).__new__(type(x))
        self.remember(x, new)
        if isinstance(x, Metric):
            Metric.__init__(new, name=x.name)
        else:
            Optimizer.__init__(new, learning_rate=0.0, name=x.name)
        tracked = {}
        for store, (is_kind, held) in x._tracker.config.items():
            tracked[store] = (is_kind, [self.copy(y) for y in held])
        new._tracker = type(x._tracker)(tracked)
        for store, (_, held) in tracked.items():
            new._tracker.stored_ids[store].update(map(id, held))
        for name, value in vars(x).items():
            if name.removeprefix("_") in tracked:
                vars(new)[name] = tracked[name.removeprefix("_")][1]
            elif name != "_tracker" and not name.startswith(BACKENDS_OWN):
                vars(new)[name] = self.copy(value)
        if isinstance(x, Optimizer):
            self._exchange_keys(x, new)
        return new

    def _exchange_keys(self, optimizer: Optimizer, new: Optimizer) -> None:
        """Brings what is kept by variables' ids to those of the copies."""
        variables = [x for x in self._originals if isinstance(x, keras.Variable)]
        key = optimizer._var_key
        keys = {key(x): key(self.copies[id(x)]) for x in variables}
        indices = getattr(optimizer, "_trainable_variables_indices", {})
        new._trainable_variables_indices = {keys[k]: i for k, i in indices.items()}
        excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
        if excluded is not None:
            new._exclude_from_weight_decay = {keys.get(k, k) for k in excluded}
        vars(new).pop("_exclude_from_weight_decay_cache", None)

    def _compile(self, model: keras.Model, new: keras.Model) -> None:
        """Compiles the copy as the model is, whatever a `compile` of its own takes."""
        config = self.copy(dict(model._compile_config.config))
        config["optimizer"] = self.copy(model.optimizer)
        # These can be set later too.
        config["run_eagerly"] = model.run_eagerly
        config["steps_per_execution"] = model.steps_per_execution
        keras.Model.compile(new, **config)
        metrics = (config["metrics"], config["weighted_metrics"])
        for metric in keras.tree.flatten(metrics):
            if isinstance(metric, Metric):
                # TensorFlow's first evaluation takes it for a new one.
                metric.reset_state()

    # ------------------------------------------------------------------ the rest

    def _method(self, method: types.MethodType) -> types.MethodType:
        return types.MethodType(method.__func__, self.copy(method.__self__))

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Returns a function of the copies, if it holds what is copied."""
        cells = [types.CellType() for _ in function.__closure__ or ()]
        new = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            closure=tuple(cells) or None,
        )
        vars(new).update(vars(function))
        self.remember(function, new)  # it may hold itself
        old, copies = list(held_by_function(function)), []
        for value in old:
            copies.append(self.copy(value))
        if all(a is b or b is new for a, b in zip(old, copies, strict=True)):
            return function
        rest = iter(copies)
        new.__defaults__ = (
            tuple(next(rest) for _ in function.__defaults__ or ()) or None
        )
        names = function.__kwdefaults__ or {}
        new.__kwdefaults__ = {name: next(rest) for name in names} or None
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if not is_empty(original):
                cell.cell_contents = next(rest)
        return new

    def _partial(self, x: functools.partial) -> functools.partial:
        return functools.partial(
            self.copy(x.func), *self.copy(x.args), **self.copy(x.keywords)
        )

    def _list(self, x: list) -> list:
        new = self.remember(x, [])
        new.extend(self.copy(y) for y in x)
        return new

    def _dictionary(self, x: dict) -> dict:
        new = self.remember(x, OrderedDict() if isinstance(x, OrderedDict) else {})
        new.update((self.copy(key), self.copy(value)) for key, value in x.items())
        return new

    def _tuple(self, x: tuple) -> tuple:
        x = getattr(x, "__wrapped__", x)  # TensorFlow's own kind, of a named one
        values = [self.copy(y) for y in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)

    def _object(self, x: Any) -> Any:
        new = shallow.copy(x)
        self.remember(x, new)
        vars(new).update((name, self.copy(value)) for name, value in vars(x).items())
        return new

    # ------------------------------------------------------------------ checks

    def _check_copies(self, x: Any) -> None:
        """Raises for what can neither be copied nor be shared."""
        kind = type(x)
        if hasattr(kind, "named_parameters") or (
            hasattr(kind, "assign") and hasattr(kind, "shape")
        ):
            raise ValueError(
                "`model` holds weights of a backend's own, which Keras does not know "
                f"and a copy would share. Received: a {kind.__module__}.{kind.__name__}"
            )
        for name in ("__wrapped__", "python_function"):
            function = getattr(x, name, None)
            if isinstance(function, types.FunctionType | types.MethodType):
                copy = self.copy(function)
                if copy is not function and copy != function:
                    raise ValueError(
                        "`model` holds a compiled or cached function of its own "
                        "layers, which would go on working on them. Make such "
                        "functions where they are called, or set them to None before "
                        f"the conversion. Received: {x!r}"
                    )

    def _check_apart(self, copy: Layer) -> None:
        """Raises if a part of the original can be reached from its copy."""
        parts = {
            id(x) for x in self._originals if is_part(x) and self.copies[id(x)] is not x
        }
        seen, waiting = set(), [copy]
        while waiting:
            x = waiting.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            for held in held_by(x):
                if id(held) in parts:
                    raise ValueError(
                        "`model` holds a part of itself in a way that cannot be "
                        f"copied: a {type(x).__name__} that holds the "
                        f"{type(held).__name__} {getattr(held, 'name', '')!r}"
                    )
                waiting.append(held)


def _is_functional(layer: Layer) -> bool:
    return isinstance(layer, keras.Model) and hasattr(layer, "operations")


def _is_of_training(layer: Layer, name: str, value: Any) -> bool:
    """Whether something tells of the original only, or is made again when missing."""
    is_made_again = name == "generate_function"  # KerasHub's, compiled
    return isinstance(value, keras.callbacks.Callback) or (
        isinstance(layer, keras.Model) and is_made_again
    )


def value_of(variable: keras.Variable) -> np.ndarray:
    """Returns a variable's numbers as an array that shares no memory with it."""
    # JAX may give away the memory of a variable in a training step.
    return np.array(keras.ops.convert_to_numpy(variable.value))


def copy_rules(variable: keras.Variable, new: keras.Variable) -> None:
    """Gives a copied variable what an optimizer does with it beside its gradient."""
    new.regularizer = variable.regularizer
    new.constraint = variable.constraint
    new.overwrite_with_gradient = variable.overwrite_with_gradient


@contextlib.contextmanager
def name_scopes(path: str | None) -> Iterator[None]:
    """Enters the scopes in which something with this path is made."""
    with contextlib.ExitStack() as scopes:
        for name in (path or "").split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        yield
