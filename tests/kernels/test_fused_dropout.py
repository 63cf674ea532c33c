"""Dropout of PyTorch's fused kernel, which GPUs are given: by the seed, and by nothing
else.

No GPU is asked here: one is said to be there, and PyTorch's function drops weights of
tensors on a CPU by the CPU's generator. Values that are the rows of an identity matrix
tell which.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends
from keras_mha.kernels.dropout import DrawnSeed, OfPart, SeedOfHeads
from tests import oracle
from tests.helpers import (
    backend_jit,
    outputs_and_gradients,
    second_derivatives,
    to_numpy,
    to_tensor,
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="speaks of the PyTorch backend"
)

B, T, N, RATE = 2, 40, 3, 0.3
IDENTITY = np.broadcast_to(np.eye(T)[None, :, None], (B, T, N, T))
i, j = np.arange(T)[:, None], np.arange(T)
CASES = {
    "plain": (lambda: None, np.ones((T, T), bool)),
    "causal": (masks.Causal, j <= i),
    "window": (lambda: masks.Causal() & masks.SlidingWindow(9), (j <= i) & (i - j < 9)),
    "rows that see nothing": (lambda: masks.Causal(-5), j <= i - 5),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(backends.current(), "device_kind", lambda x: "gpu")


@pytest.fixture(params=["in one call", "in slices"])
def kernel(request, monkeypatch):
    """A whole call is one of torch's, or many of some rows each."""
    if request.param == "in slices":
        from keras_mha.kernels.torch_kernels import sdpa

        monkeypatch.setattr(sdpa, "_WHOLE", 0)
        monkeypatch.setattr(sdpa, "_ROWS_ELSEWHERE", 16)
    return request.param


def everybody():
    """Allows all, which neither torch's kernel nor what calls it knows."""
    return masks.Causal() | masks.Prefix(T)


def attention(mask=everybody, seed=7, dropout=RATE):
    def function(query, key, value):
        options = {"mask": mask(), "dropout": dropout, "seed": seed}
        plan = keras_mha.plan_attention(query, key, value, **options)
        assert plan.implementation == "fused"
        return keras_mha.dot_product_attention(query, key, value, **options)

    return function


def drawn(*shapes):
    return [np.random.default_rng(1).normal(size=shape) for shape in shapes]


def kept(function):
    """Booleans `(B, N, T, T)`: the weights of a call that are not dropped."""
    zeros = np.zeros((B, T, N, T))  # all weights alike
    weights = function(*(to_tensor(x) for x in (zeros, zeros, IDENTITY)))
    return to_numpy(weights).transpose(0, 2, 1, 3) != 0


def check(function, booleans):
    """Compares with the oracle, of the weights that the call says it keeps."""
    visible = np.broadcast_to(booleans, (B, N, T, T))
    multiplier = kept(function) / (1 - RATE)
    assert not (multiplier[~visible] != 0).any()
    arrays = drawn(*[(B, T, N, T)] * 4)
    (output,), found = outputs_and_gradients(function, arrays[:3], arrays[3:])
    options = {"mask": booleans, "dropout_multiplier": multiplier}
    expected, _ = oracle.dot_product_attention(*arrays[:3], **options)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    expected = oracle.dot_product_attention_gradients(
        *arrays[:3], output_cotangent=arrays[3], **options
    )
    for name, gradient in zip(("dquery", "dkey", "dvalue"), found, strict=True):
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5, err_msg=name)
    return multiplier[visible] != 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradient_belong_to_the_same_weights(case, compiled, kernel):
    mask, booleans = case

    def function(query, key, value):
        return keras_mha.dot_product_attention(
            query, key, value, mask=mask(), dropout=RATE, seed=7, implementation="fused"
        )

    share = check(backend_jit(function) if compiled else function, booleans).mean()
    assert abs(share - (1 - RATE)) < 0.06


def test_equal_seeds_drop_the_same_and_others_do_not(kernel):
    first = kept(attention())
    np.testing.assert_array_equal(kept(attention()), first)
    for seed in (8, 0, 7 + 2**20):
        other = kept(attention(seed=seed))
        assert 0.5 < (other == first).mean() < 0.65  # 0.7^2 + 0.3^2 are 0.58


def test_every_row_head_and_sequence_drops_its_own(kernel):
    found = kept(attention())
    rows = found.reshape(-1, T)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_a_generator_goes_on_from_call_to_call(kernel):
    def two_calls():
        generator = keras.random.SeedGenerator(3)
        return [kept(attention(seed=generator)) for _ in range(2)]

    first, second = two_calls()
    assert (first != second).any()
    np.testing.assert_array_equal(two_calls(), [first, second])


def test_the_users_random_numbers_are_left_alone(kernel):
    import torch

    function, arrays = attention(CASES["window"][0]), drawn(*[(B, T, N, 8)] * 4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    outputs_and_gradients(function, arrays[:3], arrays[3:])
    assert (torch.get_rng_state() == before).all()
    output = function(*(to_tensor(x) for x in arrays[:3]))
    torch.manual_seed(1)
    again = function(*(to_tensor(x) for x in arrays[:3]))
    np.testing.assert_array_equal(to_numpy(output), to_numpy(again))


def test_the_users_random_numbers_are_left_alone_by_an_error(monkeypatch):
    import torch
    from torch.nn import functional

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(functional, "scaled_dot_product_attention", fail)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        kept(attention())
    assert (torch.get_rng_state() == before).all()


def test_what_a_checkpoint_computes_again_drops_the_same(kernel):
    from torch.utils.checkpoint import checkpoint

    generator = keras.random.SeedGenerator(3)
    mask, booleans = CASES["window"]
    function = attention(mask, generator)

    def checkpointed(*tensors):
        state = generator.state.value.clone()
        try:
            return checkpoint(function, *tensors, use_reentrant=False)
        finally:
            generator.state.assign(state)  # for the next call to drop the same

    check(checkpointed, booleans)


def test_a_gradient_that_is_differentiated_again_is_refused(kernel):
    arrays = drawn(*[(B, T, N, 8)] * 4)
    for mask, _ in (CASES["plain"], CASES["window"]):
        with pytest.raises(RuntimeError, match="flash_attention=False"):
            second_derivatives(attention(mask), arrays[:3], arrays[3], arrays[:3])


def test_the_layer_trains_with_it(monkeypatch):
    from torch.nn import functional

    rates, function = [], functional.scaled_dot_product_attention

    def wrapper(*args, **kwargs):
        rates.append(kwargs["dropout_p"])
        return function(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", wrapper)
    layer = keras_mha.MultiHeadAttention(2, 8, dropout=0.5, seed=1)
    x = to_tensor(np.ones((1, 6, 8)))
    layer(x, training=True)
    layer(x, training=False)
    assert rates == [0.5, 0.0]


# --------------------------------------------------------------------------- planner


def plan(x=None, **options):
    x = keras.KerasTensor((2, 2048, 4, 64), "float32") if x is None else x
    return keras_mha.plan_attention(x, x, x, **({"dropout": RATE} | options))


@pytest.mark.parametrize("seed", [None, 3, keras.random.SeedGenerator(3)])
def test_a_gpu_is_given_dropout(seed):
    assert plan(seed=seed).implementation == "fused"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout": 1.0}, "dropout=1"),
        ({"seed": SeedOfHeads(3, 0, 4, 8)}, "among all heads"),
        ({"seed": DrawnSeed(OfPart(None, 0, 0, 0, 0, 4, 8))}, "among all heads"),
        ({"device": "cpu"}, "does not follow the layer's seed"),
        ({"device": "tpu"}, "does not follow the layer's seed"),
        ({"return_scores": True}, "scores"),
    ],
)
def test_dropout_that_is_not_torchs_own(options, why):
    found = plan(**options)
    assert found.implementation != "fused"
    assert why in found.reason


def test_a_drawn_seed_of_some_heads_is_seen_as_such():
    pair = to_tensor(np.zeros(5, "int32"))
    assert plan(seed=DrawnSeed(pair)).implementation != "fused"
    assert plan(seed=DrawnSeed(pair[:2])).implementation == "fused"


def test_derivatives_of_other_kinds_are_those_of_the_tiles_dropout():
    import torch

    x = to_tensor(drawn((1, T, 2, 8))[0])

    def function(x, implementation):
        return keras_mha.dot_product_attention(
            x, x, x, dropout=RATE, seed=3, implementation=implementation
        ).sum()

    found = torch.func.grad(lambda x: function(x, "auto"))(x)
    expected = torch.func.grad(lambda x: function(x, "reference"))(x)
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-5)


def test_processes_that_share_sequences_are_told_that_there_is_no_dropout(monkeypatch):
    monkeypatch.setattr(backends.current(), "splits_sequences", lambda: True)
    from keras_mha.kernels.torch_kernels import sdpa

    monkeypatch.setattr(sdpa, "splits_sequences", lambda: True)
    with pytest.raises(ValueError, match="context_parallel"):
        plan()


def test_a_cuda_graph_that_is_recorded_takes_the_seeds_own_dropout(monkeypatch):
    from keras_mha.kernels.torch_kernels import sdpa

    monkeypatch.setattr(sdpa, "is_held", lambda device: True)
    x = to_tensor(np.ones((1, 2048, 1, 8)))
    found = plan(x)
    assert found.implementation != "fused"
    assert "CUDA graph" in found.reason


def test_in_a_compiled_program_no_cuda_graph_is_recorded_of_it():
    import torch

    tags = []

    def read(graph, inputs):
        for node in graph.graph.nodes:
            if "attend" in str(node.target):
                tags.append(node.target.tags)
        return graph

    x = to_tensor(np.ones((1, 6, 2, 8)))
    for rate in (RATE, 0.0):
        options = {"dropout": rate, "seed": 3, "mask": masks.SlidingWindow(2)}
        torch.compile(
            lambda x: keras_mha.dot_product_attention(x, x, x, **options),  # noqa: B023
            backend=read,
        )(x)
    assert len(tags) == 1
    assert torch.Tag.cudagraph_unsafe in tags[0]


# ------------------------------------------------------------------------- the seeding


def test_a_seeds_two_numbers_make_one_that_no_others_make():
    from keras_mha.kernels.torch_kernels.seeded import number_of

    pairs = [(0, 0), (0, 1), (1, 0), (-1, 0), (0, -1), (-1, -1), (2**31 - 1, -(2**31))]
    numbers = {number_of(to_tensor(np.array(pair, "int32"))) for pair in pairs}
    assert len(numbers) == len(pairs)
    assert all(0 <= number < 2**64 for number in numbers)


def test_of_a_gpu_its_own_generator_is_seeded(monkeypatch):
    import torch

    from keras_mha.kernels.torch_kernels.seeded import seeded

    generators = [torch.Generator() for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    others = torch.default_generator.get_state()
    for device, which in (("cuda:1", 1), ("cuda", 0)):
        states = [generator.get_state() for generator in generators]
        with seeded(torch.device(device), 5):
            assert generators[which].initial_seed() == 5
            torch.rand(3, generator=generators[which])
        for generator, state in zip(generators, states, strict=True):
            assert (generator.get_state() == state).all()
    assert (torch.default_generator.get_state() == others).all()
