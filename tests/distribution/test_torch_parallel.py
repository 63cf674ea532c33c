"""Two processes train as one by torch's engines: DDP, FSDP2 and tensor parallel."""

from __future__ import annotations

import json

import pytest

from tests.distribution.pairs import run_pair_once

pytestmark = pytest.mark.once

CASES = (
    "plain",
    "causal",
    "padding",
    "tiles",
    "rotary",
    "ALiBi",
    "ALiBi in tiles",
    "T5",
    "2 key heads",
    "1 key head",
    "3 key heads",
    "dropout",
    "dropout in tiles",
    "gate and sinks",
    "learned keys",
    "scores",
    "bias",
    "mask",
    "own mask",
    "own mask in tiles",
    "axes",
    "RoPE-Mixed",
    "RoPE-Mixed of 1 key head",
    "LoRA",
)
MODELS = "module", "functional", "Keras's layer"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the first of two processes says of all cases."""
    torch = pytest.importorskip("torch.distributed.fsdp", exc_type=ImportError)
    if not hasattr(torch, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    module = "tests.distribution.torch_parallel_worker"
    folder = run_pair_once(module, tmp_path_factory)
    return json.loads((folder / "found.json").read_text())


def test_all_cases_are_looked_at(found):
    assert tuple(found["tensor parallel"]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_heads_give_the_numbers_of_one(found, case):
    errors = found["tensor parallel"][case]["errors"]
    assert max(errors.values()) < 1e-5, errors


def test_each_process_has_the_weights_of_its_heads(found):
    parts = found["tensor parallel"]["gate and sinks"]["parts"]
    assert parts["query/kernel"] == parts["key/kernel"] == [16, 2, 8]
    assert parts["gate/kernel"] == [16, 2, 8]
    assert parts["value/bias"] == [2, 8]
    assert parts["attention_output/kernel"] == [2, 8, 16]
    assert parts["attention_output/bias"] == [16]
    assert parts["sink"] == [2]
    parts = found["tensor parallel"]["T5"]["parts"]
    assert parts["relative_position_bias/table"] == [32, 2]
    assert found["tensor parallel"]["LoRA"]["parts"]["query/lora_kernel_a"] == [
        16,
        2,
        2,
    ]


def test_key_heads_are_whole_where_they_are_too_few(found):
    parts = found["tensor parallel"]["1 key head"]["parts"]
    assert parts["query/kernel"] == [16, 2, 8]
    assert parts["key/kernel"] == parts["value/kernel"] == [16, 1, 8]
    assert parts["memory_key"] == [2, 1, 8]
    parts = found["tensor parallel"]["3 key heads"]["parts"]
    assert parts["query/kernel"] == parts["key/kernel"] == [16, 3, 8]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["DDP", "FSDP", "FSDP by layers", "tensor parallel"])
def test_training_is_that_of_one_process(found, engine, model):
    if (engine, model) == ("tensor parallel", "Keras's layer"):
        pytest.skip("shares the heads of this package's layer")
    errors = found["engines"][f"{engine}: {model}"]["errors"]
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["FSDP", "FSDP by layers"])
def test_each_process_has_half_of_what_is_sharded(found, engine, model):
    assert found["engines"][f"{engine}: {model}"]["share"] == 0.5


def test_weights_of_shared_heads_can_be_sharded_too(found):
    assert max(found["both axes"].values()) < 1e-5


@pytest.mark.parametrize("engine", ["FSDP by layers", "tensor parallel"])
def test_archives_are_those_of_one_process(found, engine):
    found = found["archives"][engine]
    assert found["loaded"] < 1e-5
    assert found["weights loaded"] < 1e-5


@pytest.mark.parametrize("engine", ["FSDP", "tensor parallel"])
def test_reading_parts_of_weights_says_how_to_gather_them(found, engine):
    for what in ("get_weights", "set_weights"):
        assert "gathered(model)" in found["refused"][f"{engine}: {what}"]


@pytest.mark.parametrize("engine", ["FSDP", "tensor parallel"])
def test_fit_says_what_to_train_with(found, engine):
    assert "an optimizer of torch's" in found["refused"][f"{engine}: fit"]


@pytest.mark.parametrize("model", ["module", "functional", "layers"])
def test_what_torch_alone_would_shard_in_vain_is_refused(found, model):
    message = found["refused"][f"torch's fully_shard: {model}"]
    assert "Use keras_mha.distribution.fully_shard" in message
    assert "Received: a call of 'multi_head_attention" in message
