"""PyTorch's transformations of a program."""

from __future__ import annotations

from tests.helpers import skip_unless_one_graph, to_numpy
from tests.transformations.program import (
    HALF,
    directions,
    flat,
    is_shared,
    tensors,
    total,
)
from tests.transformations.transformation import Transformation


def arrays(tensors):
    return [to_numpy(x.detach()) for x in tensors]


def differentiable(program):
    return {
        name: x.clone().requires_grad_() for name, x in tensors(program.floats).items()
    }


def with_gradients(function, program):
    import torch

    floats = differentiable(program)
    outputs = function(floats, tensors(program.others))
    return arrays([*outputs, *torch.autograd.grad(total(outputs), [*floats.values()])])


def compiled(program):
    """As users do it: the layer itself, of which the gradient is then taken."""
    import torch

    skip_unless_one_graph()
    torch._dynamo.reset()
    program.reset()
    function = torch.compile(program, backend="aot_eager", fullgraph=True)
    floats = {k: x for k, x in differentiable(program).items() if not is_shared(k)}
    outputs = function(floats | tensors(program.others))
    weights = [variable.value for variable in program.layer.trainable_variables]
    gradients = torch.autograd.grad(total(outputs), [*floats.values(), *weights])
    return arrays([*outputs, *gradients])


def exported(program):
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = program.layer

        def forward(self, inputs):
            return program(inputs)

    program.reset()
    inputs = tensors(program.inputs)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = {name: x[:HALF] for name, x in inputs.items()}
    shapes = {"inputs": {name: {0: batch} for name in inputs}}
    with torch.no_grad():
        graph = torch.export.export(Module(), (example,), dynamic_shapes=shapes)
        program.reset()
        return arrays(graph.module()(inputs))


def func_grad(program):
    import torch

    def loss(floats, others):
        outputs = program.pure(floats, others)
        return total(outputs), outputs

    gradients, outputs = torch.func.grad(loss, has_aux=True)(
        tensors(program.floats), tensors(program.others)
    )
    return arrays([*outputs, *gradients.values()])


def func_vmap(program):
    import torch

    def run(floats, others):
        def halves(tensors):
            return {
                k: x if is_shared(k) else x.reshape(-1, HALF, *x.shape[1:])
                for k, x in tensors.items()
            }

        axes = {name: None if is_shared(name) else 0 for name in floats}
        others_axes = dict.fromkeys(others, 0)
        mapped = torch.func.vmap(program.pure, (axes, others_axes))
        outputs = mapped(halves(floats), halves(others))
        return [x.reshape(-1, *x.shape[2:]) for x in outputs]

    return with_gradients(run, program)


def func_jvp(program):
    import torch

    others = tensors(program.others)

    def run(floats):
        return flat(program.pure(floats, others))

    floats = tensors(program.floats)
    return arrays([torch.func.jvp(run, (floats,), (directions(floats),))[1]])


def checkpoint(program):
    import torch

    def run(floats, others):
        return torch.utils.checkpoint.checkpoint(
            program.pure, floats, others, use_reentrant=False
        )

    return with_gradients(run, program)


def second_order(program):
    import torch

    floats = differentiable(program)
    loss = total(program.pure(floats, tensors(program.others)))
    first = torch.autograd.grad(loss, [*floats.values()], create_graph=True)
    along = directions(program.floats).values()
    product = sum((x * y).sum() for x, y in zip(first, along, strict=True))
    return arrays(torch.autograd.grad(product, [*floats.values()]))


TRANSFORMATIONS = {
    "torch.compile": Transformation(compiled, "gradients"),
    "torch.export": Transformation(exported, "outputs"),
    "torch.func.grad": Transformation(func_grad, "gradients"),
    "torch.func.vmap": Transformation(func_vmap, "gradients", halves=True),
    "torch.func.jvp": Transformation(func_jvp, "tangents"),
    "torch.utils.checkpoint": Transformation(checkpoint, "gradients"),
    "create_graph=True": Transformation(second_order, "second"),
}
