"""PyTorch's flex_attention, which GPUs are given: numbers, blocks, and what it refuses.

No GPU is asked here: one is said to be there, and flex_attention runs uncompiled on
tensors of a CPU, with all scores. What its compiler makes of it is not seen.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.biases import (
    ByDistance,
    Euclidean,
    InWindow,
    Manhattan,
    Positions,
    Slopes,
)
from keras_mha.kernels import backends
from keras_mha.kernels.parts import join_tensors, split_tensors
from tests import oracle
from tests.helpers import (
    backend_jit,
    gradients,
    outputs_and_gradients,
    rounded,
    second_derivatives,
    to_numpy,
    to_tensor,
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="speaks of the PyTorch backend"
)

B, T, S, N, K, H, V = 2, 140, 131, 4, 2, 6, 5
i, j = np.arange(T)[:, None], np.arange(S)
RNG = np.random.default_rng(0)
VALID = RNG.uniform(size=(B, S)) < 0.6
VALID[1] = False  # rows that see nothing
DENSE = RNG.uniform(size=(B, N, T, S)) < 0.3
QUERY_IDS, KEY_IDS = RNG.integers(0, 3, size=(B, T)), RNG.integers(0, 3, size=(1, S))
SEGMENTS = QUERY_IDS[:, None, :, None] == KEY_IDS[:, None, None, :]
LENGTHS = np.array([3, 50])
SLOPES = (0.5, 0.25, 0.125, 0.0625)
PLACES = RNG.integers(0, 99, size=(B, T)), RNG.integers(0, 99, size=(1, S))
POINTS = RNG.integers(0, 9, size=(1, T, 2)), RNG.integers(0, 9, size=(1, S, 2))
HIDING = np.where(RNG.uniform(size=(B, 1, T, S)) < 0.3, -1e30, 1.0)
HIDING[0, 0, 100:107] = -np.inf  # rows that see nothing
CAUSAL = j <= i
COUNTED = np.arange(T), np.arange(S)


class Dilated(masks.Mask):
    """Written with Keras's operations, as users do."""

    def allowed(self, rows, columns):
        near = keras.ops.abs(rows - columns) < 40
        return keras.ops.logical_and(near, (rows - columns) % 2 == 0)


class InTiles(masks.Mask):
    def block(self, tile):
        return tile.row_indices >= tile.column_indices


class Turned(masks.Mask):
    """Looks at its place among the others, as well as at positions."""

    def allowed(self, rows, columns):
        return rows.flip(0) >= columns


class Branching(masks.Mask):
    def allowed(self, rows, columns):
        return columns <= rows if rows.max() > 3 else columns < 5


def at(*tensors):
    return [to_tensor(x) for x in tensors]


# A mask, and what it says.
MASKS = {
    "offset": (lambda: masks.Causal(3), j <= i + 3),
    "offsets": (
        lambda: masks.Causal(to_tensor(LENGTHS)),
        j <= i + LENGTHS[:, None, None, None],
    ),
    "window": (lambda: masks.Causal() & masks.SlidingWindow(9), CAUSAL & (i - j < 9)),
    "padding": (
        lambda: masks.Causal(-20) & masks.Padding(to_tensor(VALID)),
        (j <= i - 20) & VALID[:, None, None],
    ),
    "segments": (
        lambda: masks.Segments(*at(QUERY_IDS, KEY_IDS)) & masks.Causal(),
        SEGMENTS & CAUSAL,
    ),
    "prefix": (lambda: masks.Causal() | masks.Prefix(30), CAUSAL | (j < 30)),
    "prefixes": (
        lambda: masks.Causal() | masks.Prefix(to_tensor(LENGTHS)),
        CAUSAL | (j < LENGTHS[:, None, None, None]),
    ),
    "not": (lambda: ~masks.Causal(), ~CAUSAL),
    "dense": (lambda: masks.Dense(to_tensor(DENSE)), DENSE),
    "dense (T, S)": (lambda: masks.Dense(to_tensor(DENSE[0, 0])), DENSE[0, 0]),
    "dense (B, T, S)": (lambda: masks.Dense(to_tensor(DENSE[:, 0])), DENSE[:, :1]),
    "where": (lambda: masks.Where(lambda i, j: (i - j) % 3 == 0), (i - j) % 3 == 0),
    "a user's": (Dilated, (abs(i - j) < 40) & ((i - j) % 2 == 0)),
}


FEATURES = {
    "nothing": {},
    "soft cap": {"logit_soft_cap": 1.5},
    "sink": {"sink": RNG.normal(size=N)},
    "bias": {"bias": RNG.normal(size=(1, N, T, S))},
    "bias that broadcasts": {"bias": RNG.normal(size=(B, 1, 1, S))},
    "bias that hides": {"bias": HIDING},
    "all at once": {
        "logit_soft_cap": 1.5,
        "sink": RNG.normal(size=N),
        "bias": RNG.normal(size=(1, N, 1, S)),
    },
}
POSITION_BIASES = {
    "ALiBi": (Positions, lambda: np.abs(j - i)),
    "ALiBi of positions": (
        lambda: Positions(*at(*PLACES)),
        lambda: np.abs(PLACES[1][:, None, None, :] - PLACES[0][:, None, :, None]),
    ),
    "Manhattan": (lambda: Manhattan(*at(*POINTS)), lambda: np.abs(along()).sum(-1)),
    "Euclidean": (
        lambda: Euclidean(*at(*POINTS)),
        lambda: np.sqrt((along() ** 2).sum(-1)),
    ),
    "in a window": (
        lambda: InWindow(*at(*POINTS), window=(4, 5)),
        lambda: np.abs(
            np.clip(-along()[..., 0], -3, 3) * 9 + np.clip(-along()[..., 1], -4, 4)
        ),
    ),
}


def along():
    return POINTS[1][:, None, None, :] - POINTS[0][:, None, :, None]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Says that tensors are on a GPU, and has flex_attention take those of a CPU."""
    import torch
    from torch.nn.attention import flex_attention

    from keras_mha.kernels.torch_kernels import flex, sdpa

    monkeypatch.setattr(backends.current(), "device_kind", lambda x: "gpu")
    monkeypatch.setattr(sdpa, "_WHOLE", 0)
    # On a CPU only the way forward is compiled; uncompiled it knows the way back.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    compiled = []

    def uncompiled(function):
        compiled.append(function)
        return torch.compile(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(flex, "_compiled", uncompiled)
    flex._program.cache_clear()
    yield compiled
    flex._program.cache_clear()


def drawn(*shapes):
    return [np.random.default_rng(1).normal(size=shape) for shape in shapes]


def arrays_of_a_call():
    return drawn((B, T, N, H), (B, S, K, H), (B, S, K, V))


def attention(names=(), *, mask=None, make=None, **options):
    """A function of query, key, value and the named tensors."""

    def function(query, key, value, *others):
        given = dict(zip(names, others, strict=True)) | options
        if make is not None:
            given["position_bias"] = make(given.pop("table", None))
        given["mask"] = None if mask is None else mask()
        plan = keras_mha.plan_attention(query, key, value, **given)
        assert plan.implementation == "fused"
        assert "flex_attention runs the call" in plan.reason
        return keras_mha.dot_product_attention(query, key, value, **given)

    return function


def check(function, arrays, names=(), atol=1e-5, **oracle_options):
    """Compares with the oracle: the output, and the gradients of what is named."""
    cotangent = np.random.default_rng(2).normal(size=(B, T, N, V))
    (output,), found = outputs_and_gradients(function, arrays, [cotangent])
    qkv = arrays[:3]
    expected, _ = oracle.dot_product_attention(*qkv, **oracle_options)
    np.testing.assert_allclose(output, expected, atol=atol)
    expected = oracle.dot_product_attention_gradients(
        *qkv, output_cotangent=cotangent, **oracle_options
    )
    names = "dquery", "dkey", "dvalue", *names
    for name, gradient in zip(names, found, strict=False):
        np.testing.assert_allclose(gradient, expected[name], atol=atol, err_msg=name)
    return found, expected


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS.keys())
def test_masks(case):
    mask, booleans = case
    check(attention(mask=mask), arrays_of_a_call(), mask=booleans)


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES.keys())
def test_features(feature):
    tensors = {name: x for name, x in feature.items() if name in ("sink", "bias")}
    numbers = {name: x for name, x in feature.items() if name not in tensors}
    # Rows that see nothing, in the middle of others.
    mask = lambda: masks.Causal(-20) & masks.Where(lambda i, j: i != 70)  # noqa: E731
    check(
        attention(tensors, mask=mask, **numbers),
        [*arrays_of_a_call(), *tensors.values()],
        [f"d{name}" for name in tensors],
        mask=(j <= i - 20) & (i != 70),
        **feature,
    )


@pytest.mark.parametrize("case", POSITION_BIASES.values(), ids=POSITION_BIASES.keys())
def test_positions_that_are_not_learned(case):
    positions, distances = case
    bias = -np.array(SLOPES)[:, None, None] * distances()
    function = attention(mask=masks.Causal, make=lambda _: Slopes(SLOPES, positions()))
    check(function, arrays_of_a_call(), mask=CAUSAL, bias=bias)


def by_distance(positions=None, places=COUNTED):
    """What makes a bias of a table, and what the oracle adds then."""

    def bias(table):
        distance = places[1][None, :] - places[0][:, None]
        return table[:, np.clip(distance, -4, 4) + 4]

    def make(table):
        return ByDistance(table, Positions() if positions is None else positions())

    return make, bias


@pytest.mark.parametrize("counted", [True, False])
def test_a_table_of_distances_learns(counted):
    places = COUNTED if counted else (PLACES[0][0], PLACES[1][0])
    positions = None if counted else lambda: Positions(*at(*(x[None] for x in places)))
    make, bias = by_distance(positions, places)
    table = RNG.normal(size=(N, 9))
    found, expected = check(
        attention(["table"], mask=masks.Causal, make=make),
        [*arrays_of_a_call(), table],
        mask=CAUSAL,
        bias=bias(table)[None],
    )
    index = np.clip(places[1][None, :] - places[0][:, None], -4, 4) + 4
    of_table = np.zeros((N, 9))
    for n in range(N):
        np.add.at(of_table[n], index, expected["dbias"][0, n])
    np.testing.assert_allclose(found[3], of_table, atol=1e-4)


def test_learned_keys_are_seen_and_nothing_is_added_to_them(gpu):
    def outputs(flash):
        keras.utils.set_random_seed(0)
        layer = keras_mha.MultiHeadAttention(
            N,
            H,
            num_memory_key_values=3,
            position=keras_mha.ALiBi(),
            flash_attention=flash,
        )
        x = to_tensor(np.random.default_rng(3).normal(size=(1, T, 8)))
        return to_numpy(layer(x, attention_mask=masks.SlidingWindow(9)))

    np.testing.assert_allclose(outputs(None), outputs(False), atol=1e-5)
    assert len(gpu) == 1  # the first of the two was by flex_attention


def test_a_sink_that_takes_nothing():
    sink = np.full(N, -np.inf)
    mask = lambda: masks.Causal(-20)  # noqa: E731
    (output,), found = outputs_and_gradients(
        attention(mask=mask, sink=to_tensor(sink)),
        arrays_of_a_call(),
        [np.ones((B, T, N, V))],
    )
    expected, _ = oracle.dot_product_attention(*arrays_of_a_call(), mask=j <= i - 20)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("width", [6, 16, 80])
def test_heads_too_narrow_for_the_kernel_are_widened(width, monkeypatch):
    from torch.nn.attention import flex_attention

    widths, function = [], flex_attention.flex_attention

    def wrapper(query, key, value, **options):
        widths.extend(x.shape[3] for x in (query, key, value))
        return function(query, key, value, **options)

    monkeypatch.setattr(flex_attention, "flex_attention", wrapper)
    x, value = drawn((1, 130, 2, width), (1, 130, 2, 5))
    output = attention(mask=masks.Causal, logit_soft_cap=2.0)(*at(x, x, value))
    assert output.shape == (1, 130, 2, 5)
    assert widths == [max(width, 16)] * 2 + [16]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(dtype):
    arrays = [rounded(x, dtype) for x in arrays_of_a_call()]
    window, booleans = MASKS["window"]
    sink = FEATURES["sink"]["sink"]
    cotangent = rounded(np.ones((B, T, N, V)), dtype)
    (output,), found = outputs_and_gradients(
        attention(mask=window, sink=to_tensor(sink)), arrays, [cotangent], dtype
    )
    options = {"mask": booleans, "sink": sink}
    expected, _ = oracle.dot_product_attention(*arrays, **options)
    np.testing.assert_allclose(output, expected, atol=0.02)
    expected = oracle.dot_product_attention_gradients(
        *arrays, output_cotangent=cotangent, **options
    )
    for name, gradient in zip(("dquery", "dkey", "dvalue"), found, strict=True):
        np.testing.assert_allclose(
            gradient, expected[name], atol=0.04, rtol=0.04, err_msg=name
        )


def test_second_derivatives_are_those_of_the_reference():
    arrays, table = arrays_of_a_call(), RNG.normal(size=(N, 9))
    make, _ = by_distance()
    directions = [np.cos(x) for x in (*arrays, table)]
    rest = [*arrays, table], np.ones((B, T, N, V)), directions
    ours = attention(["table"], mask=masks.Causal, make=make, logit_soft_cap=2.0)

    def reference(query, key, value, table):
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            mask=masks.Causal(),
            position_bias=make(table),
            logit_soft_cap=2.0,
            implementation="reference",
        )

    for x, y in zip(
        second_derivatives(ours, *rest),
        second_derivatives(reference, *rest),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_compiled_program_has_it_in_it():
    window, booleans = MASKS["window"]

    def function(*tensors):
        return keras_mha.dot_product_attention(
            *tensors, mask=window(), logit_soft_cap=1.5, implementation="fused"
        )

    options = {"mask": booleans, "logit_soft_cap": 1.5}
    check(backend_jit(function), arrays_of_a_call(), **options)


# -------------------------------------------------------------------------- programs


def test_calls_that_differ_in_numbers_and_lengths_share_a_program(gpu):
    def call(length, window=9, valid=None, **options):
        x = to_tensor(np.ones((2, length, 2, 8)))
        valid = np.ones((2, length), bool) if valid is None else valid
        mask = masks.SlidingWindow(window) & masks.Padding(to_tensor(valid))
        keras_mha.dot_product_attention(x, x, x, mask=mask, **options)

    for length in (200, 210, 220):
        call(length)
    call(200, valid=np.arange(400).reshape(2, 200) % 3 > 0)
    assert len(gpu) == 1
    call(200, window=10)
    call(200, logit_soft_cap=3.0)
    assert len(gpu) == 3


def test_more_kinds_of_calls_than_a_compiler_keeps_programs_for_a_function(gpu):
    import torch

    x = to_tensor(np.random.default_rng(0).normal(size=(1, 130, 2, 8)))
    kinds = [MASKS[name][0] for name in ("offset", "window", "prefix", "where")]
    with torch._dynamo.config.patch(recompile_limit=2):
        for mask in kinds:
            found = keras_mha.dot_product_attention(x, x, x, mask=mask())
    expected = keras_mha.dot_product_attention(
        x, x, x, mask=mask(), implementation="reference"
    )
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-6)
    assert len(gpu) == 4


@pytest.mark.parametrize("cap", [1.5, 2.5])
def test_of_one_kind_the_compiler_learns_nothing_for_another(cap, gpu):
    # A number that differs from call to call it would make a tensor of.
    bias = RNG.normal(size=(1, N, 1, S))
    make, of_table = by_distance()
    for each in (1.0, cap):
        function = attention(
            ["bias", "table"], mask=masks.Causal, make=make, logit_soft_cap=each
        )
        table = RNG.normal(size=(N, 9))
        check(
            function,
            [*arrays_of_a_call(), bias, table],
            mask=CAUSAL,
            bias=bias + of_table(table)[None],
            logit_soft_cap=each,
        )
    assert len(gpu) == 2


# ---------------------------------------------------------------------------- blocks


def of_blocks(mask, rows, columns):
    """Which pairs are looked at, and which are taken for allowed without asking."""
    from keras_mha.kernels.torch_kernels.blocks import block_mask

    found = block_mask(mask, rows, columns, "cpu")
    size = found.BLOCK_SIZE[0]
    looked_at, full = np.zeros((2, rows, columns), bool)
    mixed_blocks = found.kv_num_blocks[0, 0], found.kv_indices[0, 0]
    full_blocks = found.full_kv_num_blocks[0, 0], found.full_kv_indices[0, 0]
    for counts, indices in (mixed_blocks, full_blocks):
        for block, (count, index) in enumerate(zip(counts, indices, strict=True)):
            for column in index[:count].tolist():
                place = tuple(slice(n * size, n * size + size) for n in (block, column))
                looked_at[place] = True
                full[place] |= counts is full_blocks[0]
    return looked_at, full


@pytest.mark.parametrize("columns", [300, 517, 1024])
@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.Causal() & masks.SlidingWindow(100),
        masks.Causal(40) | masks.Prefix(30),
        ~masks.Causal(),
        masks.Causal() & Dilated(),
    ],
    ids=("causal", "window", "prefix", "after", "dilated"),
)
def test_blocks_hold_all_that_is_allowed_and_what_is_full_is_allowed(mask, columns):
    rows = 517
    looked_at, full = of_blocks(mask, rows, columns)
    allowed = to_numpy(mask.block(masks.whole_tile(rows, columns))).astype(bool)
    allowed = np.broadcast_to(allowed.reshape(allowed.shape[-2:]), (rows, columns))
    assert not (allowed & ~looked_at).any()
    assert allowed[full].all()


def test_blocks_that_a_window_empties_are_left_out():
    looked_at, _ = of_blocks(masks.Causal() & masks.SlidingWindow(128), 2048, 2048)
    assert looked_at.sum() == (16 + 15) * 128**2
    looked_at, full = of_blocks(masks.Causal(), 1024, 1024)
    assert full.sum() == 8 * 7 / 2 * 128**2


def test_of_long_sequences_the_blocks_are_larger():
    from keras_mha.kernels.torch_kernels.blocks import block_mask

    found = block_mask(masks.Causal(), 2**15, 2**15, "cpu")
    assert found.kv_indices.shape == (1, 1, 64, 64)


def test_blocks_are_not_taken_from_another_mask():
    class Growing(masks.Mask):
        """Says of tiles what the numbers that it holds say."""

        def __init__(self, size):
            self.size = size

        def allowed(self, rows, columns):
            return columns < self.size

        def status(self, tile):
            return "mixed" if tile.column < int(self.size) else "empty"

    for size in (1, 200):
        looked_at, _ = of_blocks(Growing(to_tensor(np.array(size))), 256, 256)
        assert looked_at[:, 128:].all() == (size > 128)


@pytest.mark.parametrize("first", ["inference", "fake"])
def test_what_is_kept_from_a_call_can_be_used_in_another(first):
    import torch
    from torch._subclasses import FakeTensorMode

    from keras_mha.kernels.torch_kernels.blocks import block_mask

    size = {"inference": 11, "fake": 12}[first]  # of which nothing is kept yet
    slopes = tuple((size + n) / 100 for n in range(N))
    function = attention(
        mask=lambda: masks.SlidingWindow(size), make=lambda _: Slopes(slopes)
    )
    if first == "inference":
        with torch.inference_mode():
            function(*at(*arrays_of_a_call()))
    else:
        with FakeTensorMode():
            block_mask(masks.SlidingWindow(size), T, S, torch.device("cpu"))
    bias = -np.array(slopes)[:, None, None] * np.abs(j - i)
    check(function, arrays_of_a_call(), mask=abs(i - j) < size, bias=bias)


def test_a_mask_taken_apart_is_the_same_function():
    from keras_mha.kernels.torch_kernels.index_functions import mask_function

    mask = masks.Segments(*at(QUERY_IDS, KEY_IDS)) & masks.Causal(2)
    again = join_tensors(*split_tensors(mask))
    place = at(*(np.array(x, "int32") for x in (1, 0, 7, 5)))
    for each in (mask, again):
        assert bool(mask_function(each)(*place)) == (QUERY_IDS[1, 7] == KEY_IDS[0, 5])


# --------------------------------------------------------------------------- planner


def half(length=600, width=64, dtype="bfloat16", heads=4):
    return keras.KerasTensor((2, length, heads, width), dtype)


def plan(x=None, **options):
    x = half() if x is None else x
    return keras_mha.plan_attention(x, x, x, device="gpu", **options)


@pytest.fixture
def short(monkeypatch):
    from keras_mha.kernels.torch_kernels import sdpa

    monkeypatch.setattr(sdpa, "_WHOLE", 512)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": masks.SlidingWindow(9)},
        {"mask": Dilated()},
        {"mask": masks.Causal(), "logit_soft_cap": 30.0},
        {"sink": 0.0},
        {"position_bias": Slopes(SLOPES)},
    ],
)
def test_what_flex_attention_is_given(options, short):
    found = plan(**options)
    assert found.implementation == "fused"
    assert "flex_attention runs the call" in found.reason


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": masks.Causal()},
        {"mask": masks.Prefix(3)},
        {"mask": masks.SlidingWindow(9), "dropout": 0.1},
        {"x": half(500), "mask": masks.SlidingWindow(9)},
    ],
)
def test_what_the_other_kernel_does_as_well(options, short):
    found = plan(**options)
    assert found.implementation == "fused"
    assert "flex_attention" not in found.reason


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout": 0.1}, "no dropout"),
        ({"mask": InTiles()}, "asks for pairs, and InTiles answers for tiles"),
        ({"mask": Turned() & masks.Causal()}, "cannot compile what Turned does"),
        ({"mask": Branching()}, "cannot compile what Branching does"),
        ({"x": half(width=300)}, "bfloat16 up to 256 wide"),
        ({"x": half(width=130, dtype="float32")}, "float32 up to 128 wide"),
        ({"x": half(dtype="float64")}, "no float64"),
        ({"x": half(100)}, "pays from 128 queries"),
        ({"x": half(None)}, "lengths that are known"),
        ({"return_scores": True}, "scores"),
    ],
)
def test_what_flex_attention_is_not_given(options, why, short):
    found = plan(logit_soft_cap=30.0, **options)
    assert found.implementation != "fused"
    assert why in found.reason


@pytest.mark.parametrize("axes", [1, 2, 1])
def test_masks_that_look_positions_up(axes, short):
    numbers = to_tensor(np.arange(600).reshape((-1, 1)[:axes]) % 3)
    mask = masks.Where(lambda i, j: numbers[i] == numbers[j])
    found = plan(mask=mask, logit_soft_cap=30.0)
    assert (found.fused_kernel == "flex_attention") == (axes == 1)


def test_a_bias_of_a_users_answers_for_tiles_only(short):
    class Own(keras_mha.positions.Bias):
        def block(self, tile):
            return keras.ops.cast(tile.row_indices - tile.column_indices, "float32")

    found = plan(position_bias=Own(), sink=0.0)
    assert "asks for pairs, and Own answers for tiles" in found.reason


@pytest.mark.parametrize("is_there", [True, False])
def test_it_is_taken_where_its_compiler_is(is_there, short, monkeypatch):
    import torch

    from keras_mha.kernels.torch_kernels import flex

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.current(), "device_memory", lambda: None)
    asked = []
    monkeypatch.setattr(flex, "_has_compiler", lambda i: asked.append(i) or is_there)
    found = plan(logit_soft_cap=3.0)
    assert asked == [0] * len(asked) != []
    assert (found.fused_kernel == "flex_attention") == is_there
    assert ("Triton, is not there" in found.reason) != is_there


def test_of_several_gpus_that_of_the_call_is_asked(monkeypatch):
    import torch

    from keras_mha.kernels.torch_kernels import flex

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(flex, "_has_compiler", lambda index: asked.append(index))
    query = type("Tensor", (), {"device": torch.device("cuda:1")})
    flex._refusal_of_compiler(query)
    assert asked == [1]


def test_derivatives_beyond_the_gradient_are_not_asked_of_it():
    import torch

    x = to_tensor(np.random.default_rng(0).normal(size=(1, 130, 2, 8)))
    plans = []

    def function(x):
        plans.append(keras_mha.plan_attention(x, x, x, logit_soft_cap=2.0))
        return keras_mha.dot_product_attention(x, x, x, logit_soft_cap=2.0).sum()

    found = torch.func.grad(function)(x)
    assert plans[0].implementation != "fused"
    assert "beyond the gradient" in plans[0].reason
    (expected,) = gradients(
        lambda x: keras_mha.dot_product_attention(
            x, x, x, logit_soft_cap=2.0, implementation="reference"
        ),
        [to_numpy(x)],
        np.ones((1, 130, 2, 8)),
    )
    np.testing.assert_allclose(to_numpy(found), expected, atol=1e-5)


def test_on_a_cpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(backends.current(), "device_kind", lambda x: "cpu")
    x = keras.KerasTensor((2, 2048, 4, 64), "float32")
    found = keras_mha.plan_attention(x, x, x, mask=masks.SlidingWindow(9))
    assert found.reason == "the backend's own kernel can run the call"
    found = keras_mha.plan_attention(x, x, x, logit_soft_cap=3.0)
    assert found.reason == "the fused kernel has no soft cap"
