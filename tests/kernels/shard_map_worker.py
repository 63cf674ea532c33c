"""Attention on the four devices of a process of its own: within `jax.shard_map`, and
on a mesh of explicit axes.

Prints, for every case, how far outputs and gradients are from those of one device, and
of which share of the weights two devices agree whether to drop them.
"""

from __future__ import annotations

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import keras_mha
from keras_mha import masks
from keras_mha.kernels import tiling

jax.config.update("jax_num_cpu_devices", 4)  # before the first array
tiling.TILE = 16
B, T, N, H = 4, 37, 4, 4
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, T, N, H)).astype("float32")
MEMORY = RNG.normal(size=(1, T, N, H)).astype("float32")  # that all samples share
BIAS = RNG.normal(size=(B, N, T, T)).astype("float32")
VALID = np.arange(T) < RNG.integers(1, T, size=(B, 1))
IDS = np.sort(RNG.integers(0, 3, size=(B, T)), axis=1)
ALIBI = keras_mha.ALiBi(N)


def attend(query, memory, bias, valid, ids, **options):
    mask = options.pop("mask", lambda valid, ids: None)(valid, ids)
    groups = options.pop("groups", N)
    memory = memory[:, :, :groups]
    key = jnp.broadcast_to(memory, (query.shape[0], *memory.shape[1:]))
    value = jnp.tanh(key + query[:, :, :groups])
    if not options.pop("biased", False):
        bias = None
    return keras_mha.dot_product_attention(
        query, key, value, mask=mask, bias=bias, **options
    )


DROPOUT = {"dropout": 0.3, "seed": 3}
CASES = {
    "plain": {},
    "causal": {"mask": lambda valid, ids: masks.Causal()},
    "window": {"mask": lambda valid, ids: masks.Causal() & masks.SlidingWindow(5)},
    "padding": {"mask": lambda valid, ids: masks.Padding(valid)},
    "segments": {"mask": lambda valid, ids: masks.Causal() & masks.Segments(ids)},
    "bias": {"biased": True},
    "ALiBi": {"position_bias": ALIBI.bias()},
    "grouped heads, sink and cap": {"groups": 2, "sink": 0.3, "logit_soft_cap": 4.0},
    "dropout": {**DROPOUT, "groups": 2, "mask": lambda valid, ids: masks.Causal()},
}
KINDS = {
    "causal": ["one axis", "two axes", "unchecked"],
    "dropout": ["one axis", "two axes", "rows along both axes", "reference"],
}


def mesh(*shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "x")[: len(shape)], (kind,) * len(shape))


def sharded(function, kind="one axis"):
    is_flat = kind in ("one axis", "unchecked", "reference")
    rows = P(("data", "x")) if kind == "rows along both axes" else P("data")
    return jax.shard_map(
        function,
        mesh=mesh(4) if is_flat else mesh(2, 2),
        in_specs=(rows, P(), rows, rows, rows),
        out_specs=rows,
        check_vma=kind != "unchecked",
    )


def with_gradients(function):
    def loss(*tensors):
        output = function(*tensors, VALID, IDS)
        return (output * jnp.cos(output)).sum(), output

    gradients, output = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
        QUERY, MEMORY, BIAS
    )
    return output, *gradients


def distance(found, expected):
    return max(
        float(np.abs(np.asarray(one) - np.asarray(two)).max())
        for one, two in zip(found, expected, strict=True)
    )


def within_shard_map():
    for name, options in CASES.items():
        expected = with_gradients(
            partial(attend, implementation="reference", **options)
        )
        for kind in KINDS.get(name, ["one axis"]):
            implementation = "reference" if kind == "reference" else "blockwise"
            function = partial(attend, implementation=implementation, **options)
            found = with_gradients(sharded(function, kind))
            yield f"{name}, {kind}", distance(found, expected)


# ------------------------------------------------------------- vmap and derivatives


def attend_padded(implementation, *tensors, **options):
    def mask(valid, ids):
        return masks.Padding(valid) & masks.Causal()

    return attend(*tensors, mask=mask, implementation=implementation, **options)


def by_sample(query, memory, *others):
    """Attends by a `jax.vmap`, which maps the mask too: whether a tile has anything to
    compute is then a question for each sample."""

    def one(query, *others):
        return attend_padded(
            "blockwise", query[None], memory, *(x[None] for x in others)
        )[0]

    return jax.vmap(one)(query, *others)


def around(function):
    def run(query, memory, *others):
        query, *others = (jnp.stack([x, x[::-1]]) for x in (query, *others))
        return jax.vmap(function, (0, None, 0, 0, 0))(query, memory, *others)

    return run


def vmapped():
    reference = partial(attend_padded, "reference")
    expected = with_gradients(reference)
    yield "vmap, within", distance(with_gradients(sharded(by_sample)), expected)
    expected = with_gradients(around(reference))
    yield "vmap, around", distance(with_gradients(around(sharded(by_sample))), expected)


def derivatives(function):
    """Returns a tangent, a gradient's gradient and a gradient's tangent."""

    def loss(query, memory):
        output = function(query, memory, BIAS, VALID, IDS)
        return (output * jnp.cos(output)).sum()

    def along(query, memory):
        return jax.jvp(loss, (query, memory), (jnp.cos(query), jnp.sin(memory)))[1]

    def steepness(query, memory):
        gradients = jax.grad(loss, (0, 1))(query, memory)
        return sum((x**2).sum() for x in gradients)

    @jax.jit
    def every(*tensors):
        turned = jax.jvp(jax.grad(loss, (0, 1)), tensors, tensors)[1]
        return along(*tensors), *jax.grad(steepness, (0, 1))(*tensors), *turned

    return every(QUERY, MEMORY)


def of_second_order():
    expected = derivatives(partial(attend_padded, "reference", **DROPOUT))
    size = max(float(jnp.abs(x).max()) for x in expected)
    function = sharded(partial(attend_padded, "blockwise", **DROPOUT), "two axes")
    yield "derivatives, two axes", distance(derivatives(function), expected) / size


# ------------------------------------------------------------------- explicit meshes


def explicitly():
    function = partial(attend_padded, groups=2, **DROPOUT)
    expected = with_gradients(partial(function, "reference"))
    specs = {"rows and heads": P("data", None, "x"), "width": P(None, None, None, "x")}
    for name, spec in specs.items():

        def on_mesh(query, *others, spec=spec):
            query = jax.sharding.reshard(query, spec)
            output = function("blockwise", query, *others)
            # Its width is the value's.
            assert jax.typeof(output).sharding.spec == P(*spec[:3], None)
            return jax.sharding.reshard(output, P())

        with jax.set_mesh(mesh(2, 2, kind=AxisType.Explicit)):
            yield f"explicit axes, {name}", distance(with_gradients(on_mesh), expected)


# ------------------------------------------------- which weights devices drop, and pmap


def weights(implementation, query, key, **options):
    """Returns the attention weights after dropout, as the output of a call."""
    value = jnp.broadcast_to(jnp.eye(T)[None, :, None], (*key.shape[:3], T))
    mask = masks.Padding(jnp.arange(T)[None] < T - 3)
    return keras_mha.dot_product_attention(
        query, key, value, mask=mask, implementation=implementation, **options
    )


def pmapped(function):
    def run(query, key):
        query, key = (x.reshape(4, -1, *x.shape[1:]) for x in (query, key))
        output = jax.pmap(function, axis_name="data")(query, key)
        return output.reshape(-1, *output.shape[2:])

    return run


def mapped(query_spec, key_spec, shape=(4,), **options):
    specs = {"in_specs": (query_spec, key_spec), "out_specs": query_spec}
    return lambda function: jax.shard_map(
        function, mesh=mesh(*shape), **specs, **options
    )


def with_own_state(generator):
    """Returns what a call takes for its seed on a device, of a generator of which the
    device has set the state: where nothing says that tensors vary."""

    def run(implementation, *tensors):
        state = generator.state.value
        own = state.at[0].add(jax.lax.axis_index("data").astype(state.dtype))
        with keras.StatelessScope([(generator.state, own)]):
            return weights(implementation, *tensors, dropout=0.5, seed=generator)

    return run


ROWS, QUERIES, HEADS_AND_ROWS = P("data"), P(None, "data"), P("data", None, "x")
MAPS = {
    "heads and rows": mapped(HEADS_AND_ROWS, HEADS_AND_ROWS, (2, 2)),
    "queries": mapped(QUERIES, P()),
    "rows, unchecked": mapped(ROWS, ROWS, check_vma=False),
    "rows, pmap": pmapped,
}


def cut(x, name):
    """Returns the part of each device of an output."""
    if name == "heads and rows":
        return [half for rows in np.split(x, 2) for half in np.split(rows, 2, 2)]
    return np.split(x, 4, 1 if name == "queries" else 0)


def agreement(output, name):
    """Returns the largest share of weights that two devices agree to keep or drop."""
    kept = [part[..., : T - 3] != 0 for part in cut(np.asarray(output), name)]
    return max(float((a == b).mean()) for a, b in itertools.combinations(kept, 2))


def of_dropout(name, function):
    """Returns what differs between implementations, and the agreement of devices."""
    query = jnp.asarray(RNG.normal(size=(B, 36, N, H)), "float32")
    key = jnp.asarray(RNG.normal(size=(B, T, N, H)), "float32")

    def run(implementation):
        function_of_all = MAPS[name](partial(function, implementation))

        def loss(query, key):
            output = function_of_all(query, key)
            return jnp.cos(output).sum(), output

        found = jax.grad(loss, (0, 1), has_aux=True)
        gradients, output = (found if "pmap" in name else jax.jit(found))(query, key)
        return output, *gradients

    found, expected = run("blockwise"), run("reference")
    return distance(found, expected), agreement(found[0], name)


def main():
    errors = dict(
        itertools.chain(within_shard_map(), vmapped(), of_second_order(), explicitly())
    )
    agreements = {}
    functions = dict.fromkeys(MAPS, partial(weights, dropout=0.5, seed=3))
    own = with_own_state(keras.random.SeedGenerator(3))
    for name, function in [*functions.items(), ("rows, pmap", own)]:
        case = f"{name}, own state" if function is own else name
        errors[f"dropped, {case}"], agreements[case] = of_dropout(name, function)
    print(json.dumps({"errors": errors, "agreements": agreements}))


main()
