"""Safetensors directories: single, sharded, damaged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from interlace.errors import CheckpointError
from interlace.plugins.checkpoints.safetensors import SafetensorsCheckpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
WEIGHTS = {f"w{index}": torch.randn(8, index + 1) for index in range(5)} | {"half": torch.ones(4, dtype=torch.bfloat16)}


def opened(path):
    return SafetensorsCheckpoint(SafetensorsCheckpoint.Options(), path)


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    placed = {}
    for number, names in enumerate((["w0", "w1", "half"], ["w2", "w3", "w4"]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: WEIGHTS[name] for name in names}, tmp_path / shard)
        placed |= dict.fromkeys(names, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tmp_path


def same(found):
    assert set(found) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_single(single):
    checkpoint = opened(single)
    assert checkpoint.matches(single) and checkpoint.num_weights() == len(WEIGHTS)
    same(dict(checkpoint.weights()))
    config = checkpoint.config()
    assert (config.architecture, config.head_size, config.dtype) == ("LlamaForCausalLM", 8, "bfloat16")
    assert config.eos_token_ids == (2,)


def test_one_file_of_a_directory(single):
    checkpoint = opened(single / "model.safetensors")
    assert checkpoint.matches(checkpoint.path)
    same(dict(checkpoint.weights()))
    assert checkpoint.config().hidden_size == 32


def test_generation_config_decides_the_eos_tokens(single):
    (single / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert opened(single).config().eos_token_ids == (2, 7)


def test_sharded(sharded):
    checkpoint = opened(sharded)
    assert checkpoint.matches(sharded) and checkpoint.num_weights() == len(WEIGHTS)
    same(dict(checkpoint.weights()))


def test_a_tensor_outside_the_index_is_not_yielded(sharded):
    save_file(
        {name: WEIGHTS[name] for name in ("w2", "w3", "w4")} | {"stale": torch.ones(1)},
        sharded / "model-00002-of-00002.safetensors",
    )
    same(dict(opened(sharded).weights()))


def test_a_lone_file_of_another_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(WEIGHTS, tmp_path / "pytorch.safetensors")
    same(dict(opened(tmp_path).weights()))


def test_directories_of_other_formats_do_not_match(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert not SafetensorsCheckpoint.matches(tmp_path)
    assert not SafetensorsCheckpoint.matches(tmp_path / "model.gguf")


def rewrite_index(path, change):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model-00002-of-00002.safetensors").unlink(), "1 of 2 shards are missing: model-00002-of"),
        (lambda p: rewrite_index(p, lambda m: m.update(w9="model-00001-of-00002.safetensors")), "first 'w9'"),
        (lambda p: rewrite_index(p, lambda m: m.update(w9="../x.safetensors")), "not a plain file name"),
        (lambda p: rewrite_index(p, lambda m: m.clear()), "'weight_map' is missing or empty"),
        (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {'), "index.json: not readable"),
        (lambda p: (p / "model.safetensors.index.json").write_text("[1]"), "a JSON object is expected, found list"),
        (lambda p: (p / "model.safetensors.index.json").unlink(), "2 .safetensors files but neither"),
    ],
)
def test_damaged_shards(sharded, damage, message):
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as raised:
        dict(opened(sharded).weights())
    assert str(sharded) in str(raised.value)


def test_truncated(single):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file.*fetch it again"):
        dict(opened(single).weights())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json: the file is missing"),
        ("{", r"config\.json: not readable as JSON"),
        ("[]", "a JSON object is expected"),
        (json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}), "lacks 'hidden_size'"),
        (json.dumps(CONFIG | {"num_attention_heads": "many"}), "malformed"),
    ],
)
def test_bad_config(single, text, message):
    (single / "config.json").unlink()
    if text is not None:
        (single / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        opened(single).config()


def test_missing_tokenizer(single):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        opened(single).tokenizer()
