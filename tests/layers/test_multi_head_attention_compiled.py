"""`torch.compile(fullgraph=True)`: a call is one graph, with eager's numbers.

`aot_eager` reads and differentiates all that the default backend does, and needs no
C++ compiler. What each feature does there is in `tests/transformations`.
"""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import tiling
from tests.helpers import only_torch, skip_unless_one_graph, to_numpy, to_tensor

pytestmark = only_torch

BATCH, LENGTH, WIDTH = 2, 37, 12
RNG = np.random.default_rng(0)
VALID = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 9]])
IDS = np.sort(RNG.integers(0, 3, (BATCH, LENGTH)), axis=1)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


class EveryOther(masks.Mask):
    """A mask of a user's own, which holds a tensor."""

    def __init__(self, step):
        self.step = step

    def allowed(self, rows, columns):
        return (rows - columns) % self.step == 0


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 16)


@pytest.fixture(autouse=True)
def forgotten_programs():
    import torch

    skip_unless_one_graph()
    torch.compiler.reset()


def compiled(function, programs=None, **options):
    """Compiles a function; `programs` gets what of ours each of its programs calls."""
    import torch
    from torch._dynamo.backends.debugging import aot_eager

    def compiler(graph, inputs):
        names = (str(node.target) for node in graph.graph.nodes)
        if programs is not None:
            programs.append([name for name in names if name.startswith("keras_mha.")])
        return aot_eager(graph, inputs)

    return torch.compile(function, backend=compiler, fullgraph=True, **options)


def with_gradients(layer, function, *inputs):
    import torch

    output = function(*inputs)
    weights = [weight.value for weight in layer.trainable_variables]
    gradients = torch.autograd.grad((output * output.cos()).sum(), weights)
    return [to_numpy(x.detach()) for x in (output, *gradients)]


def assert_all_close(results, expected, atol=1e-5):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=atol, rtol=1e-4)


LIMIT = 5
CALLS = {
    "causal with padding, sink and cap": (
        {"attention_sink": "learned", "logit_soft_cap": 5.0},
        {"use_causal_mask": True, "query_mask": VALID},
    ),
    "segments, a window, grouped heads and T5's bias": (
        {
            "sliding_window": 9,
            "num_key_value_heads": 2,
            "num_memory_key_values": 3,
            "attention_sink": "zero",
        },
        {"segment_ids": IDS},
    ),
    "masks of one's own": (
        {"attention_sink": "zero"},
        {
            "attention_mask": masks.Where(lambda i, j: j - i < LIMIT)
            & (EveryOther(to_tensor(np.array(2))) | masks.Prefix(np.array([3, 20])))
        },
    ),
    "dropout, twice": ({"dropout": 0.4, "seed": 3}, {"training": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_tiles_are_one_node(name):
    constructor, call = CALLS[name]
    if "T5" in name:
        constructor = {**constructor, "position": keras_mha.RelativePositionBias()}
    layer = keras_mha.MultiHeadAttention(
        num_heads=4, key_dim=4, flash_attention=True, **constructor
    )
    x = to_tensor(normal(BATCH, LENGTH, WIDTH))
    layer(x)
    state = [weight.numpy() for weight in layer.non_trainable_variables]
    steps = 2 if "twice" in name else 1

    def run(x):
        return layer(x, **call)

    expected = [with_gradients(layer, run, x) for _ in range(steps)]
    after = [weight.numpy() for weight in layer.non_trainable_variables]
    for weight, number in zip(layer.non_trainable_variables, state, strict=True):
        weight.assign(number)
    programs = []
    run = compiled(run, programs)
    for each in expected:
        assert_all_close(with_gradients(layer, run, x), each)
    assert [nodes.count("keras_mha.attend.default") for nodes in programs] == [1]
    for weight, number in zip(layer.non_trainable_variables, after, strict=True):
        np.testing.assert_array_equal(weight.numpy(), number)


def test_slices_of_the_fused_kernel_are_one_node():
    layer = keras_mha.MultiHeadAttention(
        num_heads=2, key_dim=4, sliding_window=50, position=keras_mha.ALiBi()
    )
    x = to_tensor(normal(1, 520, 8))
    bias = to_tensor(normal(1, 1, 520, 520))

    def run(x):
        return layer(x, use_causal_mask=True, attention_bias=bias)

    run(x)
    expected = with_gradients(layer, run, x)
    programs = []
    results = with_gradients(layer, compiled(run, programs), x)
    assert_all_close(results, expected, 1e-4)
    assert programs == [["keras_mha.attend.default"]]


def test_a_bias_that_is_learned_gets_its_gradient_from_tiles():
    import torch

    query, key, value = (to_tensor(normal(BATCH, LENGTH, 4, 4)) for _ in range(3))
    bias = to_tensor(normal(1, 4, LENGTH, LENGTH)).requires_grad_()

    def attend(query, key, value, bias):
        return keras_mha.dot_product_attention(
            query, key, value, bias=bias, implementation="blockwise"
        )

    def gradient(function):
        output = function(query, key, value, bias)
        return to_numpy(torch.autograd.grad(output.cos().sum(), bias)[0])

    expected = gradient(attend)
    np.testing.assert_allclose(gradient(compiled(attend)), expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "fused"])
def test_masks_may_be_made_in_the_program_and_lengths_unknown(implementation):
    def attend(query, key, value):
        mask = masks.Causal() & masks.Padding(value[:, :, 0, 0] > -1)
        return keras_mha.dot_product_attention(
            query, key, value, mask=mask, implementation=implementation
        )

    function = compiled(attend, dynamic=True)
    for length in (LENGTH, 20):
        inputs = [to_tensor(normal(BATCH, length, 4, 4)) for _ in range(3)]
        expected = to_numpy(attend(*inputs))
        np.testing.assert_allclose(to_numpy(function(*inputs)), expected, atol=1e-5)


def test_dropout_without_a_seed_draws_anew_in_every_call_of_a_program():
    query, key, value = (to_tensor(normal(1, 8, 2, 4)) for _ in range(3))

    def attend_twice():
        return [
            keras_mha.dot_product_attention(query, key, value, dropout=0.5)
            for _ in range(2)
        ]

    keras.utils.set_random_seed(0)
    expected = [to_numpy(x) for x in (*attend_twice(), *attend_twice())]
    keras.utils.set_random_seed(0)
    function = compiled(attend_twice)
    results = [to_numpy(x) for x in (*function(), *function())]
    assert_all_close(results, expected)
    for i, result in enumerate(results):
        assert all(np.abs(result - other).max() > 1e-3 for other in results[:i])


def test_what_is_drawn_without_a_seed_is_what_compilers_are_told():
    import torch

    inputs = torch.empty(0), 0
    operator = torch.ops.keras_mha.draw_of_all.default
    # Those that write machine code would read other numbers than were drawn.
    torch.library.opcheck(operator, inputs, test_utils="test_faketensor")


@pytest.mark.parametrize("seeded", [True, False])
def test_a_checkpoint_may_be_part_of_the_program(seeded):
    import torch
    from torch.utils.checkpoint import checkpoint

    inputs = [to_tensor(normal(BATCH, LENGTH, 4, 4)) for _ in range(3)]

    def results(compiler):
        keras.utils.set_random_seed(0)
        seed = keras.random.SeedGenerator(3) if seeded else None

        def attend_twice(query, key, value):
            for _ in range(2):
                query = keras_mha.dot_product_attention(
                    query,
                    key,
                    value,
                    dropout=0.4,
                    seed=seed,
                    implementation="blockwise",
                )
            return query

        def run(*inputs):
            return checkpoint(attend_twice, *inputs, use_reentrant=False)

        run, found = compiler(run), []
        for _ in range(2):
            tensors = [x.clone().requires_grad_() for x in inputs]
            output = run(*tensors)
            gradients = torch.autograd.grad(output.cos().sum(), tensors)
            found += [to_numpy(x.detach()) for x in (output, *gradients)]
        return found

    assert_all_close(results(compiled), results(lambda function: function))


def test_a_program_without_state_leaves_its_inputs_alone():
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4, dropout=0.5, seed=3)
    x = to_tensor(normal(BATCH, 8, WIDTH))
    layer(x)
    weights = [weight.value for weight in layer.trainable_variables]
    (state,) = [weight.value.clone() for weight in layer.non_trainable_variables]

    def run(state):
        return layer.stateless_call(weights, [state], x, training=True)

    output, (after,) = compiled(run)(state)
    expected, (expected_after,) = run(state)
    np.testing.assert_allclose(to_numpy(output), to_numpy(expected), atol=1e-5)
    np.testing.assert_array_equal(to_numpy(after), to_numpy(expected_after))


class Near(masks.Mask):
    """A mask of a number that may be trained."""

    def __init__(self, size):
        self.size = size

    def allowed(self, rows, columns):
        return abs(rows - columns) < self.size


@pytest.mark.parametrize("implementation", ["blockwise", "fused"])
def test_masks_may_hold_what_is_trained(implementation):
    import torch

    length = 520 if implementation == "fused" else LENGTH
    query, key, value = (to_tensor(normal(1, length, 2, 4)) for _ in range(3))
    query.requires_grad_()
    size = to_tensor(np.float32(5)).requires_grad_()

    def gradient(transform):
        def attend(query):
            return keras_mha.dot_product_attention(
                query,
                key,
                value,
                mask=Near(size) & masks.Causal() & masks.SlidingWindow(30),
                implementation=implementation,
            )

        output = transform(attend)(query)
        return to_numpy(torch.autograd.grad(output.cos().sum(), query)[0])

    expected = gradient(lambda function: function)
    np.testing.assert_allclose(gradient(compiled), expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 5, 9, 2), (2.5, 5.5, 9.5, 2.5)])
def test_masks_of_other_numbers_are_other_kernels(sizes):
    x = to_tensor(normal(BATCH, LENGTH, 4, 4))

    def attend(x, mask):
        return keras_mha.dot_product_attention(
            x, x, x, mask=mask, implementation="blockwise"
        )

    run = compiled(attend)
    for size in sizes:
        expected = to_numpy(attend(x, Near(size)))
        np.testing.assert_allclose(to_numpy(run(x, Near(size))), expected, atol=1e-5)


def test_a_program_gives_tangents_within_a_level_of_forward_mode():
    import torch
    from torch.autograd import forward_ad

    x, tangent = (to_tensor(normal(BATCH, LENGTH, 4, 4)) for _ in range(2))

    def attend(x):
        return keras_mha.dot_product_attention(
            x, x, x, mask=masks.Causal(), implementation="blockwise"
        )

    run = compiled(attend)
    run(x)
    with forward_ad.dual_level():
        output = run(forward_ad.make_dual(x, tangent))
        found = forward_ad.unpack_dual(output).tangent
    expected = torch.func.jvp(attend, (x,), (tangent,))[1]
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-5)


@pytest.mark.parametrize("implementation", ["blockwise", "fused"])
def test_a_program_may_transform_attention(implementation):
    import torch

    query, key, value = (to_tensor(normal(BATCH, LENGTH, 4, 4)) for _ in range(3))

    def attend(query):
        return keras_mha.dot_product_attention(
            query, key, value, mask=masks.Causal(), implementation=implementation
        )

    def loss(query):
        return attend(query).cos().sum()

    def transformed(query):
        return (
            torch.func.grad(loss)(query),
            torch.func.jvp(loss, (query,), (value,))[1],
            torch.func.vmap(attend)(torch.stack([query, value])),
        )

    expected = map(to_numpy, transformed(query))
    assert_all_close(map(to_numpy, compiled(transformed)(query)), expected)


def test_a_step_of_decoding_is_one_program_for_every_position():
    import torch

    layer = keras_mha.MultiHeadAttention(
        num_heads=4,
        key_dim=4,
        num_key_value_heads=2,
        position=keras_mha.RotaryEmbedding(),
        sliding_window=4,
    )
    x = to_tensor(normal(BATCH, 6, WIDTH))
    expected = to_numpy(layer(x, use_causal_mask=True))
    programs = []

    def step(x, cache):
        return layer(x, use_causal_mask=True, cache=cache)

    step, cache = compiled(step, programs=programs), layer.init_cache(BATCH, 8)
    outputs = []
    with torch.no_grad():
        for i in range(6):
            output, cache = step(x[:, i : i + 1], cache)
            outputs.append(to_numpy(output))
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected, atol=1e-5)
    assert len(programs) == 1
