"""Attention on JAX with derivatives of every order and in both modes.

`jax.custom_vjp` has one gradient and nothing else. So these are primitives:

    attend    the kernel; its tangents are those of `tangent`
    tangent   linear in the tangents; transposed, it is `pull_back`
    pull_back the kernel's gradient, which needs memory linear in the lengths

What `tangent` computes where it is not transposed, and the derivatives of `tangent` and
`pull_back`, are those of the *formula*: the same call written with operations that have
every derivative. In all of them the tensors come as a flat list: those that move (have
derivatives), then the rest, then what is the primitive's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_mha.kernels.backends import jax_manual_axes as manual_axes
from keras_mha.kernels.backends import jax_program
from keras_mha.kernels.backends.jax_explicit_axes import in_auto_axes

# The kinds of device that programs are lowered for, by the names of JAX's platforms.
DEVICES = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}


@dataclass(frozen=True)
class _Call:
    """What of a call is no tensor.

    Args:
        forward: Of the problem and its tensors makes the output and a second result,
            which the gradient needs.
        backward: Of these, those two and the output's gradient makes the gradients.
        formula: Of the problem and its tensors makes the output.
        problem: What is to be computed.
        names: Of the tensors that move.
        tree: How the rest of the tensors is arranged.
        levels: For every `jax.vmap` around the call, from the innermost on, which of
            the rest it maps. All that moves is mapped, along the first axis.
        wanted: Positions, among those that move, of those that tangents are given for
            or gradients asked for.
    """

    forward: Callable
    backward: Callable
    formula: Callable
    problem: Any
    names: tuple[str, ...]
    tree: Any
    levels: tuple[tuple[bool, ...], ...] = ()
    wanted: tuple[int, ...] = ()
    program: tuple[Any, ...] = ()

    @property
    def inputs(self) -> int:
        """How many tensors the call has."""
        return len(self.names) + self.tree.num_leaves

    def lowered_for(self, device: str) -> "_Call":
        """Returns the call as it is computed on a kind of device."""
        return replace(self, problem=self.problem.lowered_for(device))

    def split(self, tensors: tuple) -> tuple[tuple, tuple, tuple]:
        """Returns what moves, the rest, and what comes after."""
        moving, inputs = len(self.names), self.inputs
        return tensors[:moving], tensors[moving:inputs], tensors[inputs:]

    def named(self, moving: tuple, rest: tuple) -> dict[str, Any]:
        """Returns the tensors by name."""
        named = dict(zip(self.names, moving, strict=True))
        return jax.tree.unflatten(self.tree, rest) | named

    def mapped(self, function: Callable) -> Callable:
        """Returns a function of what moves, the rest, and more that is mapped, as the
        `jax.vmap`s around the call make it."""
        for level in self.levels:
            axes = tuple(0 if is_mapped else None for is_mapped in level)
            function = _vmap(function, axes)
        return function


def _vmap(function, axes):
    return lambda moving, rest, *others: jax.vmap(
        function, in_axes=(0, axes, *(0,) * len(others))
    )(moving, rest, *others)


def with_gradient(
    forward: Callable,
    backward: Callable,
    formula: Callable,
    problem: Any,
    tensors: dict[str, Any],
) -> Any:
    """Runs `forward` and differentiates it by `backward`, and by `formula` where more
    than a gradient is asked for; see `blockwise`."""
    attend = partial(_with_gradient, forward, backward, formula, problem)
    return in_auto_axes(attend, tensors)


def _with_gradient(forward, backward, formula, problem, tensors):
    names = tuple(name for name in problem.differentiable if name in tensors)
    rest, tree = jax.tree.flatten({n: x for n, x in tensors.items() if n not in names})
    call = _Call(forward, backward, formula, problem, names, tree)
    inputs = [*(jnp.asarray(tensors[name]) for name in names), *rest]
    # Gradients are then summed over the devices that share what did not vary.
    axes = manual_axes.varying(*inputs)
    inputs = [manual_axes.cast(x, axes) for x in inputs]
    return _attend.bind(*inputs, call=call)[0]


# ------------------------------------------------------------- what they compute


def _compute_attend(call, *tensors):
    def run(moving, rest):
        return tuple(call.forward(call.problem, call.named(moving, rest)))

    moving, rest, _ = call.split(tensors)
    with manual_axes.computing(*tensors):
        return call.mapped(run)(moving, rest)


def _compute_pull_back(call, *tensors):
    wanted = tuple(call.names[position] for position in call.wanted)
    problem = replace(call.problem, differentiable=wanted)

    def run(moving, rest, *others):
        found = call.backward(problem, call.named(moving, rest), *others)
        return tuple(found[name] for name in wanted)

    moving, rest, others = call.split(tensors)
    with manual_axes.computing(*tensors):
        return call.mapped(run)(moving, rest, *others)


def _compute_tangent(call, *tensors):
    moving, rest, (_, _, *tangents) = call.split(tensors)
    return (_formula_tangent(call, moving, rest, tuple(tangents)),)


# ----------------------------------------------------------------- by the formula


def _of_wanted(call, moving, rest):
    """Returns the formula as a function of the tensors that are wanted."""

    def run(*wanted):
        every = list(moving)
        for position, x in zip(call.wanted, wanted, strict=True):
            every[position] = x
        return call.formula(call.problem, call.named(every, rest))

    return run, tuple(moving[position] for position in call.wanted)


def _formula_tangent(call, moving, rest, tangents):
    def run(moving, rest, tangents):
        return jax.jvp(*_of_wanted(call, moving, rest), tangents)[1]

    return call.mapped(run)(moving, rest, tangents)


def _formula_gradients(call, moving, rest, output_gradient):
    def run(moving, rest, output_gradient):
        function, wanted = _of_wanted(call, moving, rest)
        return jax.vjp(function, *wanted)[1](output_gradient)

    return call.mapped(run)(moving, rest, output_gradient)


# Compiled here too, for calls from outside of any `jax.jit`: a loop that is run eagerly
# would be compiled in every call.
@partial(jax.jit, static_argnums=(0, 1))
def _run(function, call, *arguments):
    return function(call, *arguments)


@partial(jax.jit, static_argnums=(0, 1))
def _bind(primitive, call, *tensors):
    return primitive.bind(*tensors, call=call)


@partial(jax.jit, static_argnums=(0, 1))
def _run_tangent(function, call, primals, rest, tangents):
    """Returns the tangents of `function(call, moving, rest, other)`."""
    return jax.jvp(
        lambda moving, other: function(call, moving, rest, other), primals, tangents
    )[1]


# --------------------------------------------------------------------- primitives


def _primitive(name, compute, abstract):
    primitive = Primitive(f"keras_mha_{name}")
    primitive.multiple_results = True

    # A program may be lowered for another platform than that of the machine on which it
    # was traced, and not before then is it known: each has a lowering of its own.
    for platform, device in (*DEVICES.items(), (None, "other")):
        lower = partial(_lower, compute, device)
        mlir.register_lowering(primitive, lower, platform=platform)
    primitive.def_impl(lambda *tensors, call: _bind(primitive, call, *tensors))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = partial(_map, primitive)
    return primitive


def _lower(compute, device, context, *tensors, call):
    # Neither is it known before for how many devices it is, nor may what was traced for
    # one way to share it be taken for another.
    count = getattr(context.module_context.axis_context, "num_devices", None)
    program = jax_program.Program(count, context.is_forward_compat())
    call = replace(
        call.lowered_for(device), program=(program, keras.distribution.distribution())
    )

    def run(*tensors):
        with jax_program.lowering_into(program):
            return _run(compute, call, *tensors)

    return mlir.lower_fun(run, multiple_results=True)(context, *tensors)


def _map(primitive, tensors, axes, *, call):
    size = next(
        x.shape[axis] for x, axis in zip(tensors, axes, strict=True) if axis is not None
    )

    def first(x, axis):
        if axis is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, axis, 0)

    _, rest_axes, _ = call.split(axes)
    level = tuple(axis is not None for axis in rest_axes)
    fixed = range(len(call.names), call.inputs)
    tensors = [
        x if axis is None and i in fixed else first(x, axis)
        for i, (x, axis) in enumerate(zip(tensors, axes, strict=True))
    ]
    found = primitive.bind(*tensors, call=replace(call, levels=(*call.levels, level)))
    return found, (0,) * len(found)


def _abstract_attend(*tensors, call):
    # Of the same shapes on every device; tiles say it without a device's library.
    compute = partial(_run, _compute_attend, call.lowered_for("cpu"))
    return jax.make_jaxpr(compute)(*tensors).out_avals


def _abstract_pull_back(*tensors, call):
    return [tensors[position] for position in call.wanted]


def _abstract_tangent(*tensors, call):
    return [tensors[call.inputs]]  # like the output


_attend = _primitive("attend", _compute_attend, _abstract_attend)
_pull_back = _primitive("pull_back", _compute_pull_back, _abstract_pull_back)
_tangent = _primitive("tangent", _compute_tangent, _abstract_tangent)


def require_devices() -> None:
    """Lets kernels say, from now on, how devices are to share them: JAX then keeps at
    hand which devices a program is lowered for. No way to ask for it is public."""
    from jax._src import dispatch

    dispatch.prim_requires_devices_during_lowering.update((_attend, _pull_back))


def _is_zero(tangent):
    return type(tangent) is ad.Zero


def _zeros_like(results):
    return [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]


def _attend_jvp(primals, tangents, *, call):
    found = _attend.bind(*primals, call=call)
    moving, *_ = call.split(tangents)
    wanted = tuple(i for i, tangent in enumerate(moving) if not _is_zero(tangent))
    zeros = _zeros_like(found)
    if not wanted:
        return found, zeros
    given = [moving[position] for position in wanted]
    call = replace(call, wanted=wanted)
    # The second result is the gradient's alone, which is not differentiated by it.
    return found, [_tangent.bind(*primals, *found, *given, call=call)[0], zeros[1]]


def _tangent_transpose(gradients, *tensors, call):
    inputs = tensors[: call.inputs + 2]
    if _is_zero(gradients[0]):
        return [None] * len(tensors)
    found = _pull_back.bind(*inputs, gradients[0], call=call)
    return [None] * len(inputs) + list(found)


def _tangent_jvp(primals, tangents, *, call):
    found = _tangent.bind(*primals, call=call)
    tangent = _formula_jvp(_formula_tangent, call, primals, tangents, tuple)
    return found, _zeros_like(found) if tangent is None else [tangent]


def _pull_back_jvp(primals, tangents, *, call):
    found = _pull_back.bind(*primals, call=call)
    tangent = _formula_jvp(_formula_gradients, call, primals, tangents, _the_one)
    return found, _zeros_like(found) if tangent is None else list(tangent)


def _formula_jvp(function, call, primals, tangents, arranged):
    moving, rest, (_, _, *other) = call.split(primals)
    d_moving, _, (_, _, *d_other) = call.split(tangents)
    if all(map(_is_zero, (*d_moving, *d_other))):
        return None
    primals = tuple(moving), arranged(other)
    d_moving, d_other = (
        [ad.instantiate_zeros(tangent) for tangent in each]
        for each in (d_moving, d_other)
    )
    tangents = tuple(d_moving), arranged(d_other)
    return _run_tangent(function, call, primals, rest, tangents)


def _the_one(values):
    (value,) = values
    return value


ad.primitive_jvps[_attend] = _attend_jvp
ad.primitive_jvps[_tangent] = _tangent_jvp
ad.primitive_jvps[_pull_back] = _pull_back_jvp
ad.primitive_transposes[_tangent] = _tangent_transpose
