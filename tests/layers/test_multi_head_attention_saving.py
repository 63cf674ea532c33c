"""Configs, archives and weights files: ours, Keras's, and from one to the other."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_mha
from tests.helpers import to_numpy, to_tensor

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 16)).astype("float32")
Y = RNG.normal(size=(2, 7, 12)).astype("float32")
GOLDEN = Path(__file__).parent.parent / "golden"

OURS, KERAS = keras_mha.MultiHeadAttention, keras.layers.MultiHeadAttention
BOTH_WAYS = pytest.mark.parametrize(
    ("source", "target"), [(KERAS, OURS), (OURS, KERAS)], ids=["to ours", "to Keras"]
)


def keras_takes(**arguments):
    """Whether the Keras that is installed has these arguments."""
    try:
        KERAS(num_heads=2, key_dim=4, **arguments)
    except (TypeError, ValueError):
        return False
    return True


SHARED = [
    {},
    {"value_dim": 5, "output_shape": (2, 3)},
    {"dropout": 0.1, "seed": 7, "use_bias": False},
    {"use_gate": True},
    {"sliding_window": 3},
]
SHARED = [arguments for arguments in SHARED if keras_takes(**arguments)]


def model_with(layer_class, **arguments):
    """A model of two inputs whose weights are all random, biases too."""
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((5, 16)), keras.Input((7, 12))]
    layer = layer_class(num_heads=4, key_dim=8, name="attention", **arguments)
    # The scores are asked for because Keras's layer crashes on JAX without them when
    # `value_dim` is not `key_dim`.
    output, _ = layer(*inputs, use_causal_mask=True, return_attention_scores=True)
    model = keras.Model(inputs, output)
    for weight in model.weights:
        weight.assign(weight + RNG.normal(size=weight.shape) * 0.1)
    return model


def outputs(model):
    return to_numpy(model([to_tensor(X), to_tensor(Y)]))


def attention_of(model):
    return model.get_layer("attention")


# ---------------------------------------------------------------------- config

FULL = {
    "num_heads": 4,
    "key_dim": 8,
    "value_dim": 6,
    "dropout": 0.1,
    "use_bias": False,
    "output_shape": (3, 4),
    "attention_axes": (1,),
    "sliding_window": 3,
    "flash_attention": False,
    "kernel_initializer": keras.initializers.RandomNormal(stddev=0.02),
    "bias_initializer": "ones",
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "bias_regularizer": "l1",
    "activity_regularizer": "l2",
    "kernel_constraint": keras.constraints.MaxNorm(2.0),
    "bias_constraint": "non_neg",
    "use_gate": True,
    "seed": 5,
    "num_key_value_heads": 2,
    "qk_norm": "rms",
    "qk_norm_epsilon": 1e-5,
    "attention_sink": "learned",
    "logit_soft_cap": 30.0,
    "scale": 0.2,
    "num_memory_key_values": 3,
    "talking_heads": "both",
    "name": "full",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}


def test_every_constructor_argument_is_in_the_config_and_comes_back():
    config = json.loads(json.dumps(OURS(**FULL).get_config()))
    assert set(FULL) <= set(config)
    revived = OURS.from_config(config)
    assert json.loads(json.dumps(revived.get_config())) == config
    for name in ("num_heads", "output_shape", "qk_norm", "scale", "seed", "trainable"):
        value = config[name]
        assert value == (list(FULL[name]) if name == "output_shape" else FULL[name])
    assert revived.dtype_policy.name == "mixed_bfloat16"


def test_a_default_layers_config_is_one_that_keras_takes():
    config = OURS(num_heads=2, key_dim=4).get_config()
    theirs = KERAS(num_heads=2, key_dim=4).get_config()
    assert set(theirs) <= set(config)
    assert set(config) - set(theirs) <= {"use_gate", "sliding_window"}


def test_numpy_integers_are_as_good_as_pythons():
    layer = OURS(np.int64(4), np.int32(8), output_shape=np.int64(6))
    assert json.loads(json.dumps(layer.get_config()))["num_heads"] == 4


def test_a_layer_builds_itself_from_its_build_config():
    layer = OURS(num_heads=4, key_dim=8, qk_norm="rms", attention_sink="learned")
    layer.build((None, 5, 16), (None, 7, 12))
    revived = OURS.from_config(layer.get_config())
    revived.build_from_config(layer.get_build_config())
    shapes = [tuple(weight.shape) for weight in layer.weights]
    assert [tuple(weight.shape) for weight in revived.weights] == shapes


# ---------------------------------------------------------------------- archives


@pytest.mark.parametrize(
    "arguments",
    [
        *SHARED,
        {"num_key_value_heads": 2, "qk_norm": "layer", "attention_sink": "learned"},
        {"qk_norm": "l2", "logit_soft_cap": 5.0, "scale": 2.0},
        {"num_memory_key_values": 3, "num_key_value_heads": 2, "value_dim": 5},
        {"talking_heads": "both"},
    ],
    ids=str,
)
def test_an_archive_of_ours_comes_back_whole(arguments, tmp_path):
    model = model_with(OURS, **arguments)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    assert type(attention_of(revived)) is OURS
    assert attention_of(revived).get_config() == attention_of(model).get_config()
    np.testing.assert_allclose(outputs(revived), outputs(model), atol=1e-6)


@pytest.mark.parametrize("arguments", SHARED, ids=str)
@pytest.mark.parametrize("file", ["model.weights.h5", "model.keras"])
@BOTH_WAYS
def test_files_of_one_layer_load_into_the_other(
    source, target, file, arguments, tmp_path
):
    model, other = model_with(source, **arguments), model_with(target, **arguments)
    assert np.abs(outputs(other) - outputs(model)).max() > 1e-3
    if file.endswith(".keras"):
        model.save(tmp_path / file)
    else:
        model.save_weights(tmp_path / file)
    other.load_weights(tmp_path / file)
    np.testing.assert_allclose(outputs(other), outputs(model), atol=1e-5)


@pytest.mark.parametrize("arguments", SHARED, ids=str)
@BOTH_WAYS
def test_a_loaded_model_changes_its_layer_by_config(
    source, target, arguments, tmp_path
):
    if target is KERAS and not keras_takes(use_gate=False, sliding_window=None):
        pytest.skip("this Keras is older than the arguments its config would name")
    model_with(source, **arguments).save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")

    def exchanged(layer):
        layer_class = target if type(layer) is source else type(layer)
        return layer_class.from_config(layer.get_config())

    other = keras.models.clone_model(model, clone_function=exchanged)
    other.set_weights(model.get_weights())
    assert type(attention_of(other)) is target
    np.testing.assert_allclose(outputs(other), outputs(model), atol=1e-5)


def test_optimizer_state_goes_over_from_keras_layer(tmp_path):
    """Training begun with Keras's layer goes on with ours, step for step."""
    data = [X, Y], RNG.normal(size=(2, 5, 16)).astype("float32")
    models = model_with(KERAS), model_with(OURS)
    for model in models:
        model.compile(optimizer="adam", loss="mse")
        model.optimizer.build(model.trainable_variables)
    models[0].fit(*data, epochs=2, verbose=0, shuffle=False)
    models[0].save(tmp_path / "model.keras")
    models[1].load_weights(tmp_path / "model.keras")
    for ours, theirs in zip(
        models[1].optimizer.variables, models[0].optimizer.variables, strict=True
    ):
        ours.assign(keras.ops.convert_to_numpy(theirs))
    losses = [
        model.fit(*data, epochs=2, verbose=0, shuffle=False).history["loss"]
        for model in models
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_equal_seeds_give_keras_initial_weights():
    def weights(layer_class):
        keras.utils.set_random_seed(3)
        layer = layer_class(num_heads=4, key_dim=8, dropout=0.1)
        layer.build((None, 5, 16), (None, 7, 12))
        return layer.get_weights()

    for ours, theirs in zip(weights(OURS), weights(KERAS), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---------------------------------------------------------------------- paths


def paths(layer):
    """Variable paths, without the number in a seed generator's automatic name."""
    layer.build((None, 5, 16), (None, 7, 12))
    names = (variable.path.split("/") for variable in layer.variables)
    return [
        tuple("seed" if part.startswith("seed_generator_") else part for part in name)
        for name in names
    ]


@pytest.mark.parametrize("arguments", SHARED, ids=str)
def test_variables_have_the_paths_and_the_order_of_keras_layer(arguments):
    """Layout maps, optimizers and LoRA files find variables by path or by order."""
    ours, theirs = (
        [
            ("seed" if part.startswith("seed") else part for part in path)
            for path in paths(cls(num_heads=4, key_dim=8, name="mha", **arguments))
        ]
        for cls in (OURS, KERAS)
    )
    assert [tuple(path) for path in ours] == [tuple(path) for path in theirs]


def test_sublayers_with_weights_come_in_keras_order():
    if not keras_takes(use_gate=True):
        pytest.skip("this Keras has no gate")

    def names(layer_class):
        layer = layer_class(num_heads=4, key_dim=8, use_gate=True, dropout=0.1)
        layer.build((None, 5, 16), (None, 7, 12))
        sublayers = layer._flatten_layers(include_self=False)
        return [sublayer.name for sublayer in sublayers if sublayer.weights]

    assert names(OURS) == names(KERAS)


def test_converters_find_the_projections_under_keras_private_names():
    layer = OURS(num_heads=4, key_dim=8, use_gate=True)
    layer.build((None, 5, 16), (None, 7, 12))
    assert layer._query_dense is layer.query_dense
    assert layer._key_dense is layer.key_dense
    assert layer._value_dense is layer.value_dense
    assert layer._output_dense is layer.output_dense
    assert not hasattr(layer, "gate_dense")


# ---------------------------------------------------------------------- LoRA, int8


def test_lora_trains_its_own_weights_and_is_saved(tmp_path):
    model = model_with(OURS)
    layer = attention_of(model)
    layer.query_dense.enable_lora(2)
    layer.value_dense.enable_lora(2)
    names = {weight.path for weight in model.trainable_weights}
    assert "attention/query/lora_kernel_a" in names
    assert "attention/query/kernel" not in names
    for weight in model.trainable_weights:
        weight.assign(weight + 0.1)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs(revived), outputs(model), atol=1e-5)


def test_lora_is_merged_into_the_weights_file_of_a_plain_layer(tmp_path):
    model, plain = model_with(OURS), model_with(OURS)
    add_lora(model)
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(outputs(plain), outputs(model), atol=1e-5)


def test_a_layer_with_lora_starts_anew_from_merged_weights(tmp_path):
    model, other = model_with(OURS), model_with(OURS)
    add_lora(model)
    add_lora(other)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(outputs(other), outputs(model), atol=1e-5)
    assert not np.any(to_numpy(attention_of(other).query_dense.lora_kernel_b.value))


@BOTH_WAYS
def test_lora_merges_into_the_other_layer(source, target, tmp_path):
    model, other = model_with(source), model_with(target)
    add_lora(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(outputs(other), outputs(model), atol=1e-5)


def quantized(model):
    model.quantize("int8")


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("first", ["LoRA", "int8"])
def test_lora_and_int8_together_are_saved_to_int8s_precision(first, tmp_path):
    """Merging LoRA, Keras rounds the sum to int8 once more."""
    model = model_with(OURS)
    steps = [add_lora, quantized]
    for step in steps if first == "LoRA" else reversed(steps):
        step(model)
    expected = outputs(model)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    assert attention_of(revived).query_dense.quantization_mode == "int8"
    atol = 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(outputs(revived), expected, atol=atol)


def add_lora(model):
    """Adds LoRA that is not zero to every projection."""
    layer = attention_of(model)
    for name in ("query", "key", "value", "output"):
        dense = getattr(layer, f"_{name}_dense")
        dense.enable_lora(2)
        for weight in (dense.lora_kernel_a, dense.lora_kernel_b):
            weight.assign(RNG.normal(size=weight.shape) * 0.1)


def sequential(layer):
    return keras.Sequential([keras.Input((5, 16)), layer])


def nested(layer):
    return keras.Sequential([keras.Input((5, 16)), keras.Sequential([layer])])


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("make_model", [sequential, nested])
@pytest.mark.parametrize("dtype", ["float32", "map"])
def test_int8_is_saved_wherever_the_layer_stands_and_again(make_model, dtype, tmp_path):
    if dtype == "map":
        dtype = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
        dtype["sequential/attention/query"] = keras.DTypePolicy("mixed_bfloat16")
    model = make_model(OURS(num_heads=4, key_dim=8, name="attention", dtype=dtype))
    model.quantize("int8")
    expected = to_numpy(model(to_tensor(X)))
    for _ in range(2):
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(to_numpy(model(to_tensor(X))), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_int8_stays_near_and_is_saved(tmp_path):
    model = model_with(OURS, num_key_value_heads=2)
    before = outputs(model)
    model.quantize("int8")
    after = outputs(model)
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    assert attention_of(revived).query_dense.quantization_mode == "int8"
    np.testing.assert_allclose(outputs(revived), after, atol=1e-6)


# ---------------------------------------------------------------------- golden


@pytest.mark.parametrize(
    "archive", sorted(GOLDEN.glob("*.keras")), ids=lambda p: p.stem
)
def test_archives_of_earlier_versions_load_for_ever(archive):
    model = keras.saving.load_model(archive)
    numbers = np.load(archive.with_suffix(".npz"))
    inputs = {name: to_tensor(numbers[name]) for name in ("query", "value")}
    np.testing.assert_allclose(to_numpy(model(inputs)), numbers["output"], atol=1e-5)


def test_there_is_an_archive_of_this_version():
    assert (GOLDEN / f"v{keras_mha.__version__}.keras").exists()
