"""Ring attention: keys and values go around the devices that share a sequence.

A device attends from its rows to the keys that are with it, and hands these on to the
next. What it gets of each is merged by the logarithms of the rows' sums:

    lse    = log(exp(lse_1) + exp(lse_2))
    output = output_1 * exp(lse_1 - lse) + output_2 * exp(lse_2 - lse)

With output and lse of the whole the backward pass of tiles gives a part's gradients: it
goes around a second time, and the gradients of keys and values with them.

References:
    Liu et al., 2023, Ring attention: https://arxiv.org/abs/2310.01889
"""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from keras import ops

from keras_mha._keras import Tensor, at_least_float32
from keras_mha.distribution.ring_device import KEYS, Device, RingProblem, specs_of
from keras_mha.distribution.ring_order import Order, order_of
from keras_mha.distribution.shards import Shards
from keras_mha.kernels import backends, blockwise
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.parts import join_tensors
from keras_mha.kernels.problem import prepared
from keras_mha.kernels.whole import whole


def attend(shards: Shards, call: AttentionCall) -> Attended:
    """Runs one call of attention."""
    batch, rows, heads, _ = ops.shape(call.query)
    problem, tensors = prepared(call)
    problem = RingProblem(**vars(problem), shards=shards)
    # Said here for JAX, which does not look into an operation of our own for devices.
    spec = specs_of(problem, tensors)["query"]
    tensors["query"] = shards.constrained(tensors["query"], spec)
    output = backends.current().with_gradient(
        forward, backward, whole, problem, tensors
    )
    output = ops.transpose(output, (0, 4, 1, 3, 2))  # (B, T, K, G, V)
    return Attended(ops.reshape(output, (batch, rows, heads, call.value.shape[3])))


def forward(problem: RingProblem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends; takes and returns what `blockwise.forward` does."""
    specs, order = specs_of(problem, tensors), _order(problem, tensors)
    result = specs["query"]
    run = partial(_forward, problem, order, specs)
    return problem.shards.run(run, (specs,), (result, result), tensors)


def backward(
    problem: RingProblem,
    tensors: dict[str, Any],
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
) -> dict[str, Tensor]:
    """Returns gradients; takes and returns what `blockwise.backward` does."""
    specs, order = specs_of(problem, tensors), _order(problem, tensors)
    result = specs["query"]
    return problem.shards.run(
        partial(_backward, problem, order, specs),
        (specs, result, result, result),
        {name: specs[name] for name in problem.differentiable},
        *(tensors, output, lse, d_output),
    )


def _order(problem: RingProblem, tensors: dict[str, Any]) -> Order:
    mask = join_tensors(problem.mask, tensors["mask"])
    rows, columns = tensors["query"].shape[4], tensors["key"].shape[3]
    return order_of(mask, rows, columns, problem.shards.size(problem.shards.time))


# ------------------------------------------------------------------ on each device


def _forward(problem, order, specs, tensors):
    device = Device(problem, order, specs, tensors)
    query, width = device.tensors["query"], tensors["value"].shape[2]
    shape = (*query.shape[:2], width, *query.shape[3:])
    output = jnp.zeros(shape, query.dtype)
    lse = jnp.full((*shape[:2], 1, *shape[3:]), -math.inf, query.dtype)

    def visit(pair, keys, _, so_far):
        new_output, new_lse = blockwise.forward(*device.problem_of(pair, keys))
        new = new_output, jnp.where(new_lse == math.inf, -math.inf, new_lse)
        old = tuple(pair.rows_of(x) for x in so_far)
        merged = zip(so_far, _merged(old, new), strict=True)
        return (), tuple(pair.with_rows(x, rows) for x, rows in merged)

    _, (output, lse) = device.go_around(visit, (), (output, lse))
    if "sink" in tensors:
        sink = device.sink(query.dtype)
        output, lse = _merged((output, lse), (0.0, jnp.broadcast_to(sink, lse.shape)))
    lse = jnp.where(lse == -math.inf, math.inf, lse)
    output, lse = (device.in_tokens_order(x, 4) for x in (output, lse))
    return output.astype(tensors["query"].dtype), lse


def _merged(one: tuple, other: tuple) -> tuple:
    """Merges two outputs and logarithms of rows' sums."""
    (x, x_lse), (y, y_lse) = one, other
    lse = jnp.logaddexp(x_lse, y_lse)
    safe = jnp.where(lse == -math.inf, 0.0, lse)  # both see nothing: 0 of each
    return x * jnp.exp(x_lse - safe) + y * jnp.exp(y_lse - safe), lse


def _backward(problem, order, specs, tensors, output, lse, d_output):
    device = Device(problem, order, specs, tensors)
    names = device.differentiable
    results = [device.in_order(at_least_float32(x), 4) for x in (output, lse, d_output)]
    zeros = {n: jnp.zeros_like(at_least_float32(device.tensors[n])) for n in names}
    of_keys = {name: zeros.pop(name) for name in KEYS if name in names}

    def visit(pair, keys, of_keys, others):
        found = blockwise.backward(
            *device.problem_of(pair, keys), *map(pair.rows_of, results)
        )

        def adding(sums):
            return {
                name: device.adding(name, pair, x, found[name])
                for name, x in sums.items()
            }

        return adding(of_keys), adding(others)

    of_keys, others = device.go_around(visit, of_keys, zeros) if names else ({}, {})
    found = device.gradients_in_tokens_order({**of_keys, **others})
    if "sink" in problem.differentiable:
        output, lse, d_output = results
        share = jnp.sum(d_output * output, axis=2, keepdims=True)
        weights = jnp.exp(device.sink(lse.dtype) - lse)
        found["sink"] = -jnp.sum(weights * share, axis=(0, 2, 4))
    return {
        name: device.summed(x, specs[name]).astype(tensors[name].dtype)
        for name, x in found.items()
    }
