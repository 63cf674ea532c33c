"""Shares sequences between eight devices that a CPU pretends to be, and prints as JSON
how far what came out is from what one device computes."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Programs are small and many: most of the time goes into compiling them.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from keras.src.backend.common.symbolic_scope import SymbolicScope

import keras_mha
from keras_mha import masks
from keras_mha.distribution import SequenceParallel
from keras_mha.kernels import tiling

tiling.TILE = 16
B, T, N, H, V = 2, 64, 8, 4, 3
RNG = np.random.default_rng(0)
VALID = np.arange(T) < np.array([[50], [33]])
IDS = np.sort(RNG.integers(0, 3, size=(B, T)), axis=1)
TABLE = RNG.normal(size=(32, N)).astype("float32")


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Even(masks.Mask):
    """A user's own mask, with one for each head, that knows of no tiles' batch."""

    def __init__(self, hidden):
        self.hidden = hidden

    def block(self, tile):
        heads = jnp.arange(N)[:, None, None]
        rows, columns = tile.row_indices, tile.column_indices
        hidden = self.hidden[:, None, None, None]
        return ((rows + columns + heads) % 2 == 0) & (columns % 7 != hidden)


def relative(table):
    position = keras_mha.RelativePositionBias(N)
    position.build()
    position.table = table
    return position.bias()


def by_ids(ids):
    return keras_mha.ALiBi(N).bias(ids, ids)


# For each case what is given beside query, key and value: what has a gradient, and what
# has none, or is made in the call.
CAUSAL = masks.Causal()
DROPOUT = {"dropout": 0.3, "seed": 3}
CASES = {
    "causal": {"mask": CAUSAL},
    "window, grouped": {"mask": CAUSAL & masks.SlidingWindow(9), "groups": 2},
    "window, segments, ALiBi": {
        "mask": masks.SlidingWindow(12) & masks.Segments(IDS),
        "position_bias": keras_mha.ALiBi(N).bias(),
    },
    "padding, dropout, sink, cap": {
        "mask": CAUSAL & masks.Padding(VALID),
        "logit_soft_cap": 3.0,
        "gradient": {"sink": normal(N)},
        **DROPOUT,
    },
    "bias of all, prefix": {
        "mask": CAUSAL | masks.Prefix(3),
        "gradient": {"bias": normal(B, N, T, T)},
        "groups": 4,
    },
    "T5, bias of keys": {
        "gradient": {"table": TABLE, "bias": normal(32)},
        "mask": ~masks.SlidingWindow(5) | masks.Prefix(np.array([0, 9])),
        "columns": 32,
    },
    "bias of rows, dense": {
        "gradient": {"bias": normal(1, T, 1)},
        "mask": masks.Dense(RNG.random((T, T)) < 0.6) & CAUSAL,
        "sink": 0.3,  # what is added to all of a row else does not matter
    },
    "bias of pairs, dense by head": {
        "gradient": {"bias": normal(B, 1, T, T)},
        "mask": masks.Dense(RNG.random((B, N, T, T)) < 0.6),
        **DROPOUT,
    },
    "a mask of one's own, positions": {
        "mask": Even(jnp.array([1, 3])) & masks.Where(lambda i, j: (i >= j) & (i > 9)),
        "position_bias": by_ids(jnp.asarray(RNG.integers(0, 99, size=(B, T)))),
    },
    "half": {"mask": CAUSAL, "dtype": "bfloat16"},
}
# Which mesh and method each is run with: 2 x 4 shares the batch too.
RUNS = [
    *(("causal", "8", "ring"), ("causal", "8", "all_to_all")),
    ("window, grouped", "8", "ring"),
    ("window, segments, ALiBi", "2 x 4", "ring"),
    *itertools.product(
        ["padding, dropout, sink, cap"], ["8", "2 x 4"], ["ring", "all_to_all"]
    ),
    ("bias of all, prefix", "8", "ring"),
    *(("T5, bias of keys", "2 x 4", "ring"), ("T5, bias of keys", "8", "all_to_all")),
    ("bias of rows, dense", "8", "ring"),
    *(("bias of pairs, dense by head", "2 x 4", x) for x in ("ring", "all_to_all")),
    *(("a mask of one's own, positions", "2 x 4", x) for x in ("ring", "all_to_all")),
    ("half", "8", "ring"),
]
MESHES = {"8": (("seq",), (8,)), "2 x 4": (("batch", "seq"), (2, 4))}


def parallel(mesh="8", method="auto", layout_map=None, devices=8):
    names, shape = MESHES[mesh]
    shape = shape[:-1] + (devices // int(np.prod(shape[:-1])),)
    devices = keras.distribution.list_devices()[:devices]
    mesh = keras.distribution.DeviceMesh(shape, names, devices)
    batch_axis = "batch" if "batch" in names else None
    return SequenceParallel(mesh, "seq", batch_axis, layout_map, method)


def function_of(case):
    """Returns a function of differentiable tensors, and these."""
    case = dict(case)
    groups, columns = case.pop("groups", N), case.pop("columns", T)
    dtype, gradient = case.pop("dtype", "float32"), case.pop("gradient", {})
    rows = [normal(B, T, N, H), normal(B, columns, groups, H)]
    rows = [jnp.asarray(x, dtype) for x in (*rows, normal(B, columns, groups, V))]
    weights = normal(B, T, N, V)

    def attend(rows, gradient, implementation):
        given = dict(gradient)
        if "table" in given:
            given["position_bias"] = relative(given.pop("table"))
        return keras_mha.dot_product_attention(
            *rows, **given, **case, implementation=implementation
        )

    def loss(tensors, implementation):
        output = attend(*tensors, implementation)
        return (output.astype("float32") * weights).sum(), output

    def both(implementation):
        """Output and gradients, in one program."""
        return jax.jit(
            lambda *tensors: jax.grad(loss, has_aux=True)(tensors, implementation)
        )(rows, gradient)

    return both, lambda: keras_mha.plan_attention(*rows, **case)


def distance(found, expected):
    """The largest difference, relative to the largest number of each tensor."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(jnp.abs(x.astype("float32") - y.astype("float32")).max())
        / (float(jnp.abs(y).max()) + 1e-9)
        for x, y in pairs
    )


def numbers(case, mesh, method):
    """Says what a case is planned as, and how far off it is."""
    both, planned = function_of(CASES[case])
    expected = both("reference")
    with parallel(mesh, method):
        # Of few scores by tiles too, not only by the formula.
        implementation = "blockwise" if mesh == "8" else "auto"
        found = distance(both(implementation), expected)
        return {"plan": planned().implementation, "error": found}


def all_numbers():
    return {", ".join(run): numbers(*run) for run in RUNS}


# ------------------------------------------------------------- beyond one gradient


def steepness(query):
    def loss(query):
        output = keras_mha.dot_product_attention(query, query, query)
        return (output * jnp.cos(output)).sum()

    return jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()))(query)


def of_second_order():
    query = normal(1, 16, 2, H)
    expected = steepness(query)
    with parallel(method="ring"):
        return distance(steepness(query), expected)


def rows_sums():
    """The rows' sums and their gradients, of which a ring has none."""
    rows, weights = normal(B, T, N, H), normal(B, N, T)

    def sums(rows):
        options = {"mask": CAUSAL, "return_lse": True}
        output, lse = keras_mha.dot_product_attention(rows, rows, rows, **options)
        return (lse * weights).sum(), (output, lse)

    def both():
        return jax.jit(jax.grad(sums, has_aux=True))(rows)

    expected, found = both(), {}
    for method in ("ring", "all_to_all"):
        with parallel(method=method):
            found[method] = distance(both(), expected)
    return found


# -------------------------------------------------------- what is sent, and memory


def compiled(devices, method, mask=CAUSAL):
    """Returns the program of a call's gradients on some devices."""
    distribution = parallel(method=method, devices=devices)
    mesh = distribution.device_mesh.backend_mesh
    sharding = NamedSharding(mesh, P(None, "seq"))
    x = jax.ShapeDtypeStruct((1, 2048, N, H), "float32", sharding=sharding)

    def loss(query, key, value, weights):
        output = keras_mha.dot_product_attention(query, key, value, mask=mask)
        return (output * weights).sum()

    with distribution:
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(sharding,) * 3)
        return gradients.lower(x, x, x, x).compile()


def kinds_of_traffic(program):
    """Returns what a program sends between devices: how often each kind is written in
    it (a loop's body counts once)."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= \S.* ({kinds})(?:-start)?\(", program.as_text())
    return {kind: found.count(kind) for kind in sorted(set(found))}


def programs():
    """Returns what programs send, and the bytes per device that they take beside the
    call's tensors."""
    tiling.TILE = 128
    try:
        found = {
            f"{method}, {devices}": compiled(devices, method)
            for method in ("ring", "all_to_all")
            for devices in (2, 8)
        }
        window = CAUSAL & masks.SlidingWindow(64)
        found["ring, 8, window"] = compiled(8, "ring", window)
    finally:
        tiling.TILE = 16
    return {
        name: {
            "traffic": kinds_of_traffic(program),
            "memory": program.memory_analysis().temp_size_in_bytes,
        }
        for name, program in found.items()
    }


# ------------------------------------------------------------------ models

BATCH, WORDS = 4, 20
TOKENS = RNG.integers(1, WORDS, size=(BATCH, T)) * (np.arange(T) < 50)
TARGETS = RNG.integers(0, WORDS, size=(BATCH, T))


def made():
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(WORDS, 16, mask_zero=True)(inputs)
    layer = keras_mha.MultiHeadAttention(
        *(4, 4),
        dropout=0.2,
        seed=1,
        position=keras_mha.RotaryEmbedding(),
        num_key_value_heads=2,
        name="rotary",
    )
    x = x + layer(x, use_causal_mask=True)
    layer = keras_mha.MultiHeadAttention(
        *(8, 2),
        sliding_window=9,
        attention_sink="learned",
        position=keras_mha.RelativePositionBias(),
        name="relative",
    )
    outputs = keras.layers.Dense(WORDS)(x + layer(x))
    return keras.Model(inputs, outputs)


def trained(distribution, weights=None):
    """Returns the model, its first weights, its losses and what it predicts."""
    keras.backend.clear_session()
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = made()
    if weights is None:
        draws = np.random.default_rng(1)
        weights = [draws.normal(size=w.shape) * 0.3 for w in model.weights]
        weights = [
            w if np.issubdtype(v.dtype, np.floating) else np.asarray(v)
            for w, v in zip(weights, model.get_weights(), strict=True)
        ]
    model.set_weights(weights)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    fit = model.fit(TOKENS, TARGETS, batch_size=BATCH, epochs=3, verbose=0)
    return model, weights, fit.history["loss"], model.predict(TOKENS, verbose=0)


def heads_too(method):
    devices = keras.distribution.list_devices()
    names = ["batch", "model", "seq"]
    mesh = keras.distribution.DeviceMesh((2, 2, 2), names, devices)
    layouts = keras_mha.distribution.layout_map(mesh)
    return SequenceParallel(mesh, "seq", "batch", layouts, method)


def models():
    _, weights, losses, expected = trained(None)
    kinds = {"2 x 4": parallel("2 x 4", "ring"), "2 x 2 x 2": heads_too("auto")}
    results = {}
    for kind, distribution in kinds.items():
        model, _, shared, found = trained(distribution, weights)
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/model.keras")
            loaded = keras.saving.load_model(f"{folder}/model.keras")
            again = loaded.predict(TOKENS, verbose=0)
            keras.distribution.set_distribution(None)
            without = keras.saving.load_model(f"{folder}/model.keras")
        without = without.predict(TOKENS, verbose=0)
        results[kind] = {
            "losses": [losses, shared],
            "error": distance(found, expected),
            "error once loaded": distance(again, found),
            "error without": distance(without, found),
        }
    return results


# ------------------------------------------------------------------ layers


def gathered(distribution):
    """Returns the dtypes of what devices gather in the gradients of a layer whose
    inputs are shared."""
    with distribution:
        keras.utils.set_random_seed(0)
        position = keras_mha.RotaryEmbedding()
        layer = keras_mha.MultiHeadAttention(8, 4, position=position)
        layer.build((None, T, 8))
        x, valid = (
            jax.device_put(x, distribution.get_data_layout(x.shape).backend_layout)
            for x in (normal(4, T, 8), np.arange(T) < np.full((4, 1), 50))
        )

        def loss(weights, x, valid):
            masks = {"query_mask": valid, "value_mask": valid, "use_causal_mask": True}
            return (layer.stateless_call(weights, [], x, **masks)[0] ** 2).sum()

        weights = [variable.value for variable in layer.trainable_variables]
        program = jax.jit(jax.grad(loss, (0, 1))).lower(weights, x, valid).compile()
    found = re.findall(r"= \(?(\w+)\[\S* all-gather(?:-start)?\(", program.as_text())
    return sorted(set(found))


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """Whose shapes Keras finds out by running it on a batch of no known size."""

    def __init__(self):
        super().__init__()
        self.attention = keras_mha.MultiHeadAttention(8, 2)

    def call(self, x):
        return x + self.attention(x, use_causal_mask=True)


def within_a_model(x):
    inputs = keras.Input((T, 16))
    return keras.Model(inputs, Block()(inputs)).predict(x, verbose=0)


def with_a_cache(x):
    position = keras_mha.RotaryEmbedding()
    layer = keras_mha.MultiHeadAttention(8, 2, position=position)
    cache, outputs = layer.init_cache(BATCH, T), []
    for step in (x[:, :32], x[:, 32:33]):
        output, cache = layer(step, cache=cache, use_causal_mask=True)
        outputs.append(output)
    return outputs


def layers():
    x, found = normal(BATCH, T, 16), {}
    for function in (within_a_model, with_a_cache):
        keras.utils.set_random_seed(0)
        expected = function(x)
        with parallel("2 x 4", "ring"):
            keras.utils.set_random_seed(0)
            found[function.__name__] = distance(function(x), expected)
    return found


# ------------------------------------------------------------------ plans and refusals


def attend(length=T, heads=N, groups=None, **options):
    query = normal(1, length, heads, H)
    key = normal(1, options.pop("columns", length), groups or heads, H)
    return keras_mha.plan_attention(query, key, key, **options)


def plans():
    """Says what calls are planned as, by each method."""
    calls = {
        "heads divide": {},
        "key heads do not divide": {"groups": 2},
        "dense": {"mask": np.ones((T, T), bool)},
        "dense by head": {"mask": np.ones((1, N, T, T), bool)},
        "bias": {"bias": np.zeros((T, T), "float32")},
        "padding": {"mask": masks.Padding(np.ones((1, T), bool))},
        "scores": {"return_scores": True},
        "sums": {"return_lse": True},
        "talking heads": {"talking_heads": (np.eye(N, dtype="float32"), None)},
        "one token": {"length": 1, "columns": T},
        "reference": {"implementation": "reference"},
    }
    found = {}
    for name, call in calls.items():
        for method in ("auto", "ring"):
            with parallel(method=method):
                plan = attend(**call)
            found[f"{name}, {method}"] = [plan.implementation, plan.reason]
    return found


def refused():
    """Returns what wrong uses are told."""
    mesh = parallel().device_mesh
    other = keras.distribution.DeviceMesh((1,), ["seq"], ["cpu:0"])
    layouts = keras.distribution.LayoutMap(other)
    heads = keras_mha.distribution.layout_map(
        parallel("2 x 4").device_mesh, "seq", "batch"
    )

    def within(*arguments, **call):
        with parallel(*arguments):
            attend(**call)

    def of_placeholders():
        with SymbolicScope():  # as of Keras's that fill in numbers for lengths
            within(length=83)

    uses = {
        "placeholders": of_placeholders,
        "length": lambda: within(length=60),
        "key length": lambda: within(columns=60),
        "heads": lambda: within("8", "all_to_all", heads=6),
        "key heads": lambda: within("8", "all_to_all", groups=2),
        "no mesh": lambda: SequenceParallel(None),
        "no such axis": lambda: SequenceParallel(mesh, "time"),
        "no such batch axis": lambda: SequenceParallel(mesh, "seq", "data"),
        "one axis": lambda: SequenceParallel(mesh, "seq", "seq"),
        "no layouts": lambda: SequenceParallel(mesh, layout_map={}),
        "other mesh": lambda: SequenceParallel(mesh, layout_map=layouts),
        "heads' axis": lambda: SequenceParallel(
            heads.device_mesh, "seq", layout_map=heads
        ),
        "method": lambda: SequenceParallel(mesh, method="tree"),
    }
    return {name: message_of(use) for name, use in uses.items()}


def message_of(use):
    try:
        use()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def context():
    """Returns which distribution is set within contexts and behind them."""
    one, two = parallel(), parallel("2 x 4")
    found = []

    def note():
        now = keras.distribution.distribution()
        found.append(None if now is None else now.device_mesh.shape)

    with one:
        note()
        with two, one:
            note()
        note()
    note()
    return found


def layouts_of_data():
    distribution = parallel("2 x 4")
    shapes = (4, 8, 3), (4, 8), (4,), (3, 8), (4, 6), (4, 6, 8), ()
    return [list(distribution.get_data_layout(shape).axes) for shape in shapes]


def main(only):
    parts = {
        "numbers": all_numbers,
        "second order": of_second_order,
        "sums": rows_sums,
        "programs": programs,
        "models": models,
        "gathered": lambda: {
            "ring": gathered(parallel("2 x 4", "ring")),
            "all_to_all": gathered(parallel("2 x 4", "all_to_all")),
            "ring and heads": gathered(heads_too("ring")),
            "all_to_all and heads": gathered(heads_too("all_to_all")),
        },
        "layers": layers,
        "plans": plans,
        "refused": refused,
        "context": context,
        "layouts of data": layouts_of_data,
    }
    print(json.dumps({name: parts[name]() for name in only or parts}))


if __name__ == "__main__":
    main(sys.argv[1:])
