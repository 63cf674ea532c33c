"""A call of a layer that has a feature, as programs that can be transformed."""

from __future__ import annotations

import contextlib
from functools import cache
from unittest import mock

import keras
import numpy as np
from keras import ops

import keras_mha
from keras_mha.kernels import backends, row_chunks, tiling
from tests.helpers import (
    outputs_and_gradients,
    second_derivatives,
    tangent,
    to_numpy,
    to_tensor,
)
from tests.transformations.features import FEATURES, QUERY, VALID, B, H, N, T
from tests.transformations.transformation import LONG

HALF = B // 2
WEIGHT, CACHE = "weight ", "cache "  # how their tensors' names begin
PROMPT, SLOTS = T - 3, T + 4


@contextlib.contextmanager
def small_tiles():
    """Cuts these small calls as long ones are cut; without it they are done at once."""
    with contextlib.ExitStack() as stack:
        for place, name, number in (
            (tiling, "TILE", 16),
            (tiling, "_MULTIPLE", 4),
            (backends.current(), "FEW_SCORES", 1),
            (row_chunks, "AT_ONCE", 1),
        ):
            stack.enter_context(mock.patch.object(place, name, number))
        if keras.backend.backend() == "torch":
            from keras_mha.kernels.torch_kernels import sdpa

            stack.enter_context(mock.patch.multiple(sdpa, _ROWS=8, _WHOLE=4))
        yield


class Program:
    """A layer with a feature, and the arrays that it is called with.

    Args:
        feature: A name of `FEATURES`.
        flash_attention: As of the layer. `False` takes the formula.
    """

    def __init__(self, feature, flash_attention=None):
        self.name, self.feature = feature, FEATURES[feature]
        self.layer = keras_mha.MultiHeadAttention(
            num_heads=N,
            key_dim=H,
            seed=3,
            flash_attention=flash_attention,
            **{k: v() if callable(v) else v for k, v in self.feature.layer.items()},
        )
        inputs = {"query": QUERY} | self.feature.tensors
        parts = (inputs.get(name) for name in ("query", "value", "key"))
        self.layer.build(*(x if x is None else x.shape for x in parts))
        rng = np.random.default_rng(1)
        for weight in self.layer.trainable_variables:
            weight.assign(rng.normal(size=weight.shape) * 0.5)
        self.state = [to_numpy(v) for v in self.layer.non_trainable_variables]
        if self.feature.decodes:
            inputs = self._decoding_inputs()
        weights = {
            f"{WEIGHT}{number}": np.array(to_numpy(weight), "float32")
            for number, weight in enumerate(self.layer.trainable_variables)
        }
        self.inputs = inputs
        self.floats = {k: v for k, v in inputs.items() if v.dtype.kind == "f"} | weights
        self.others = {k: v for k, v in inputs.items() if k not in self.floats}

    def _decoding_inputs(self):
        kept = self.layer.init_cache(B, SLOTS)
        prompt = to_tensor(QUERY[:, :PROMPT])
        valid = to_tensor(VALID[:, :PROMPT])
        kept = self.layer(prompt, query_mask=valid, cache=kept, use_causal_mask=True)[1]
        arrays = {f"{CACHE}{k}": ops.convert_to_numpy(v) for k, v in kept.items()}
        return {"query": QUERY[:, PROMPT:], **arrays}

    def reset(self):
        """Lets dropout begin anew."""
        for variable, array in zip(
            self.layer.non_trainable_variables, self.state, strict=True
        ):
            variable.assign(array)

    def __call__(self, inputs):
        """Returns all tensors of the layer's results; `inputs` are tensors by name."""
        inputs = dict(inputs)
        query = inputs.pop("query")
        if self.feature.before:
            query = self.feature.before(query)
        slots = [name for name in inputs if name.startswith(CACHE)]
        kept = {name.removeprefix(CACHE): inputs.pop(name) for name in slots}
        results = self.layer(query, **inputs, **self.feature.call, cache=kept or None)
        return keras.tree.flatten(results)

    def pure(self, floats, others):
        """The same of all that it depends on: `floats` hold the weights too."""
        split = len(self.layer.trainable_variables)
        inputs = {k: v for k, v in floats.items() if not k.startswith(WEIGHT)}
        given = [floats[f"{WEIGHT}{number}"] for number in range(split)]
        variables = self.layer.trainable_variables + self.layer.non_trainable_variables
        values = given + [to_tensor(x.astype("uint32")) for x in self.state]
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self(inputs | others)


def tensors(arrays):
    """A dictionary of arrays as one of tensors."""
    return {name: to_tensor(array) for name, array in arrays.items()}


def is_shared(name):
    """Whether a tensor has no batch."""
    return name.startswith(WEIGHT)


def directions(floats):
    """Where derivatives are taken along: a tensor like each of `floats`."""
    rng = np.random.default_rng(2)
    return {name: to_tensor(rng.normal(size=x.shape)) for name, x in floats.items()}


def floating(outputs):
    """Those of the tensors that have derivatives, as float32."""
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in outputs]
    return [
        ops.cast(x, "float32")
        for x, dtype in zip(outputs, dtypes, strict=True)
        if "float" in dtype
    ]


def total(outputs):
    """What gradients are taken of: a number that every output changes, not linearly."""
    return sum(ops.sum(ops.sin(x)) for x in floating(outputs))


def halved(function):
    """`function(floats, others)` called with each half of the batch."""

    def run(floats, others):
        halves = [
            function(half(floats, rows), half(others, rows))
            for rows in (slice(0, HALF), slice(HALF, B))
        ]
        return [ops.concatenate(pair) for pair in zip(*halves, strict=True)]

    return run


def half(tensors, rows):
    return {k: x if is_shared(k) else x[rows] for k, x in tensors.items()}


class Expected:
    """What the formula gives, one operation after the other, and its derivatives.

    Args:
        feature: A name of `FEATURES`.
        halves: Whether the layer is called with each half of the batch. Of dropout
            this makes a difference: both halves have the same seed.
    """

    def __init__(self, feature, halves):
        self.program = Program(feature, flash_attention=False)
        self.function = halved(self.program.pure) if halves else self.program.pure
        self.names = list(self.program.floats)
        self.arrays = list(self.program.floats.values())

    def outputs(self):
        floats, others = tensors(self.program.floats), tensors(self.program.others)
        return [to_numpy(x) for x in self.function(floats, others)]

    def gradients(self):
        return self.outputs() + self.first_derivatives(self.arrays)

    def first_derivatives(self, arrays):
        def loss(*floats):
            return total(self._call(*floats))

        return outputs_and_gradients(loss, arrays, [np.ones(())])[1]

    def tangents(self):
        return [tangent(self.flat, self.arrays, self.directions())]

    def second(self):
        def loss(*floats):
            return total(self._call(*floats))

        return second_derivatives(loss, self.arrays, np.ones(()), self.directions())

    def directions(self):
        return list(map(to_numpy, directions(self.program.floats).values()))

    def flat(self, *floats):
        return flat(self._call(*floats))

    def _call(self, *floats):
        others = tensors(self.program.others)
        return self.function(dict(zip(self.names, floats, strict=True)), others)


def flat(outputs):
    """All numbers that have derivatives in one axis."""
    return ops.concatenate([ops.reshape(x, (-1,)) for x in floating(outputs)])


@cache
def expected(feature, gives, halves):
    """The arrays that a transformation must give; `gives` is a method of `Expected`."""
    return getattr(Expected(feature, halves), gives)()


def differences(feature, gives):
    """The second of `Expected`'s derivatives, roughly: from what two steps change."""
    formula, step = Expected(feature, halves=False), 2e-3

    def ahead(step):
        moved = [
            array + step * direction
            for array, direction in zip(
                formula.arrays, formula.directions(), strict=True
            )
        ]
        if gives == "second":
            return formula.first_derivatives(moved)
        return [to_numpy(formula.flat(*map(to_tensor, moved)))]

    return [
        (after - before) / (2 * step)
        for after, before in zip(ahead(step), ahead(-step), strict=True)
    ]


def largest_error(found, wanted):
    """How much the worst number is off, as a share of the largest of them all."""
    pairs = [
        (np.asarray(one, "float64"), np.asarray(two, "float64"))
        for one, two in zip(found, wanted, strict=True)
    ]
    if any(one.shape != two.shape for one, two in pairs):
        return np.inf
    error = max(np.abs(one - two).max() for one, two in pairs)
    largest = max(np.abs(two).max() for _, two in pairs)
    return error / largest if np.isfinite(error) else np.inf


def limit(feature):
    return 0.05 if FEATURES[feature].column == "bfloat16" else 3e-5


def check(feature, transformation):
    """Raises if a feature gives other numbers under a transformation."""
    halves = transformation.halves and "dropout" in FEATURES[feature].layer
    wanted = expected(feature, transformation.gives, halves)
    for length in transformation.lengths:
        with small_tiles() if length == LONG else contextlib.nullcontext():
            found = transformation.run(Program(feature))
        error = largest_error(found, wanted)
        assert error < limit(feature), f"wrong numbers of {length} calls"
