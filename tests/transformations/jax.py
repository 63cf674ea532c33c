"""JAX's transformations of a program.

Each is compiled by `jax.jit` in the end, which takes nearly all of the time: what goes
together shares a program, and only `jax.jit` by itself is run for short calls, which
are the formula in JAX's own operations.
"""

from __future__ import annotations

from tests.helpers import to_numpy
from tests.transformations.program import (
    HALF,
    directions,
    flat,
    is_shared,
    tensors,
    total,
)
from tests.transformations.transformation import LONG, SHORT, Transformation


def compiled(function, program):
    """`function(floats, others)` of the program's arrays, by `jax.jit`."""
    import jax

    results = jax.jit(function)(tensors(program.floats), tensors(program.others))
    return [to_numpy(x) for x in results]


def with_gradients(function, program):
    import jax

    def loss(floats, others):
        outputs = function(floats, others)
        return total(outputs), outputs

    def run(floats, others):
        gradients, outputs = jax.grad(loss, has_aux=True)(floats, others)
        return outputs + [gradients[name] for name in program.floats]

    return compiled(run, program)


def jit(program):
    return with_gradients(program.pure, program)


def halves(tensors):
    return {
        k: x if is_shared(k) else x.reshape(-1, HALF, *x.shape[1:])
        for k, x in tensors.items()
    }


def joined(outputs):
    return [x.reshape(-1, *x.shape[2:]) for x in outputs]


def vmap(program):
    import jax

    def run(floats, others):
        axes = {name: None if is_shared(name) else 0 for name in floats}
        mapped = jax.vmap(program.pure, (axes, 0), axis_size=2)
        return joined(mapped(halves(floats), halves(others)))

    return with_gradients(run, program)


def scan_of_checkpoint(program):
    import jax

    def run(floats, others):
        weights = {k: x for k, x in floats.items() if is_shared(k)}
        inputs = {k: x for k, x in floats.items() if not is_shared(k)}

        @jax.checkpoint
        def call(floats, others):
            return program.pure(weights | floats, others)

        def step(count, each):
            return count + 1, call(*each)

        return joined(jax.lax.scan(step, 0, (halves(inputs), halves(others)))[1])

    return with_gradients(run, program)


def shard_map(program):
    import jax
    from jax.sharding import PartitionSpec as P

    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=types)
    specs = {name: P() if is_shared(name) else P("data") for name in program.floats}
    sharded = jax.shard_map(
        program.pure, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data")
    )
    return with_gradients(sharded, program)


def jvp(program):
    import jax

    def run(floats, others):
        def function(floats):
            return flat(program.pure(floats, others))

        return [jax.jvp(function, (floats,), (directions(program.floats),))[1]]

    return compiled(run, program)


def second_order(program):
    import jax

    def run(floats, others):
        def product(floats):
            first = jax.grad(lambda x: total(program.pure(x, others)))(floats)
            along = directions(program.floats)
            return sum((first[name] * along[name]).sum() for name in first)

        second = jax.grad(product)(floats)
        return [second[name] for name in program.floats]

    return compiled(run, program)


def _kept(run):
    """`run`, once for each feature: cells that share a program have its results."""
    results = {}

    def once(program):
        if program.name not in results:
            results[program.name] = run(program)
        return results[program.name]

    return once


_shared = _kept(scan_of_checkpoint)
TRANSFORMATIONS = {
    "jax.jit": Transformation(jit, "gradients", lengths=(SHORT,)),
    "jax.vmap": Transformation(vmap, "gradients", halves=True, lengths=(LONG,)),
    "jax.shard_map": Transformation(shard_map, "gradients", lengths=(LONG,)),
    "jax.lax.scan": Transformation(_shared, "gradients", halves=True, lengths=(LONG,)),
    "jax.checkpoint": Transformation(
        _shared, "gradients", halves=True, lengths=(LONG,)
    ),
    "jax.jvp": Transformation(jvp, "tangents", lengths=(LONG,)),
    "jax.grad(jax.grad)": Transformation(second_order, "second", lengths=(LONG,)),
}
